"""Contexts that are longer than the base's window are cut until they can be written, and no others."""

import pytest

from hf_gradmem import GradMemForCausalLM
from hf_gradmem.writing.fitting import fit_contexts
from tests.support.small_models import nameless_base, small_tokenizer, with_memory

WINDOW = 128
SENTENCE = "abcdefghij" * 3


def build(**options) -> GradMemForCausalLM:
    model = with_memory(nameless_base(), **{"num_memory_tokens": 3, "write_steps": 1} | options)
    model.tokenizer = small_tokenizer()  # a token for each letter
    assert model.decoder.window == WINDOW
    return model


def fitted(model: GradMemForCausalLM, contexts: list, segment_length: int | None = None) -> list:
    return fit_contexts(model.writer, model.tokenizer, contexts, segment_length)


@pytest.mark.parametrize(
    ("options", "room", "longest"),
    [
        ({}, 125, 62),
        ({"write_prefix_segments": 0}, 125, 125),
        ({"write_prefix_segments": 3, "num_control_tokens": 2}, 121, 30),
        ({"memory_form": "key_values"}, 124, 62),
        ({"writer": "forward"}, 122, 122),
    ],
    ids=str,
)
def test_the_window_is_shared_with_memory_control_tokens_and_prefix(options, room, longest):
    model = build(**options)
    assert (model.writer.room, model.writer.longest_segment) == (room, longest)
    model.write("a" * room)
    with pytest.raises(ValueError, match=f"needs {WINDOW + 1} positions"):
        model.write("a" * (room + 1))
    if model.writer.takes_segments:
        before = model.config.write_prefix_segments
        model.write([["a" * longest] * (before + 2)])
        with pytest.raises(ValueError, match="the window of"):
            model.write([["a" * (longest + 1)] * (before + 2)])


@pytest.mark.parametrize("options", [{}, {"write_prefix_segments": 0}, {"num_control_tokens": 3}], ids=str)
def test_a_context_that_fits_stays_whole_and_a_longer_one_can_be_written(options):
    model = build(**options)
    contexts = ["a" * model.writer.room, "a" * (model.writer.room + 1), SENTENCE * 20]
    whole, cut, long = fitted(model, contexts)
    assert whole == contexts[0]
    assert (len(cut), "".join(cut)) == (2 + (model.config.write_prefix_segments > 0), contexts[1])
    assert "".join(long) == contexts[2]
    memory = model.write([whole, cut, long])
    assert memory.num_context_tokens.tolist() == [len(context) for context in contexts]


def test_segments_that_fit_stay_and_others_are_cut_within():
    model = build()
    fitting, not_together, too_long = ["a" * 60, "b" * 60], ["a" * 60, "b" * 70], ["ab", "c" * 126]
    kept, together, within = fitted(model, [fitting, not_together, too_long])
    assert kept == fitting
    assert together == ["a" * 60, "b" * 62, "b" * 8]
    assert within == ["ab", "c" * 62, "c" * 62, "cc"]
    model.write([kept, together, within])


def test_an_adapter_that_cuts_by_itself_goes_on_doing_so():
    model = build(write_segment_length=20)
    assert fitted(model, ["a" * 900]) == ["a" * 900]
    model.write("a" * 900)
    model = build(write_segment_length=100)  # with its prefix it does not fit
    (cut,) = fitted(model, ["a" * 300])
    assert len(cut) > 1
    model.write([cut])
    assert fitted(model, ["a" * 110]) == ["a" * 110]


def test_a_length_that_is_asked_for_is_that_of_every_context():
    model = build()
    assert fitted(model, ["abcdefgh", "ab", ["abcdef", "g"]], 3) == [
        ["abc", "def", "gh"],
        "ab",
        ["abc", "def", "g"],
    ]


def test_a_length_that_cannot_be_is_refused_with_the_longest_that_can():
    model = build()
    with pytest.raises(ValueError, match=r"segment_length=63 .* with the 1 before it, .* 128 .* at most 62"):
        fitted(model, ["a"], 63)
    with pytest.raises(ValueError, match="segment_length must be at least 1, got 0"):
        fitted(model, ["a"], 0)
    forward = build(writer="forward")
    assert fitted(forward, ["a" * 500]) == ["a" * 500]
    with pytest.raises(ValueError, match="takes no segments"):
        fitted(forward, ["a"], 3)
