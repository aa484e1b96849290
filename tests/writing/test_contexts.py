"""Contexts as they are given: text or tokens, whole or in segments, and what is refused."""

from functools import partial

import pytest
import torch

from tests.support import writing
from tests.support.messages import says
from tests.support.small_models import PLAIN, nameless_base, small_tokenizer, with_memory
from tests.support.tiny_models import VOCAB_SIZE, tiny_causal_lm, tiny_tokens
from tests.support.writing_text import word_tokenizer

CONTEXT, QUERY = tiny_tokens(2, 8, seed=1), tiny_tokens(2, 4, seed=2)


build = partial(writing.build, write_steps=3)


@pytest.fixture
def with_tokenizer():
    model = build(dtype=torch.float32)
    model.tokenizer = word_tokenizer()
    return model


def test_text_is_tokenised_without_special_tokens(with_tokenizer):
    written = with_tokenizer.write("w20 w21 w22")
    ids = torch.tensor([[20, 21, 22]])
    assert torch.equal(written.embeddings, with_tokenizer.write(input_ids=ids).embeddings)


def test_a_list_is_contexts_and_a_list_in_it_is_segments(with_tokenizer):
    contexts = with_tokenizer.write(["w20 w21 w22", "w30"])
    assert contexts.num_context_tokens.tolist() == [3, 1]
    assert not contexts.is_segmented.any()
    segments = with_tokenizer.write([["w20 w21", "w22"], ["w30"]])
    assert segments.segment_lengths.tolist() == [[2, 1], [1, 0]]
    ids, segment_ids = torch.tensor([[20, 21, 22]]), torch.tensor([[0, 0, 1]])
    expected = with_tokenizer.write(input_ids=ids, segment_ids=segment_ids)
    torch.testing.assert_close(segments.embeddings[0], expected.embeddings[0])
    torch.testing.assert_close(segments.embeddings[1], contexts.embeddings[1])


def test_a_path_is_the_text_in_its_file(with_tokenizer, tmp_path):
    (tmp_path / "one.txt").write_bytes(b"\xef\xbb\xbfw20 w21\r\nw22\r\n\n")
    (tmp_path / "two.md").write_text("w30", encoding="utf-8")
    one, two = tmp_path / "one.txt", tmp_path / "two.md"
    expected = with_tokenizer.write(["w20 w21\nw22", "w30"])
    assert with_tokenizer.write([one, two]) == expected
    assert with_tokenizer.write(one) == with_tokenizer.write("w20 w21\nw22")
    assert with_tokenizer.write([[one, "w40"], [two]]) == with_tokenizer.write([["w20 w21\nw22", "w40"], ["w30"]])


def test_a_path_that_holds_no_text_is_named(with_tokenizer, tmp_path):
    contents = {"blank.txt": b" \n\n", "latin.txt": "caf\xe9".encode("latin-1"), "picture.txt": b"\x89PNG\0\0"[1:]}
    for name, content in contents.items():
        (tmp_path / name).write_bytes(content)
    for name, message in (("blank.txt", "is blank"), ("latin.txt", "not UTF-8"), ("picture.txt", "the byte 0")):
        with pytest.raises(ValueError, match=rf"{name} .*{message}"):
            with_tokenizer.write(tmp_path / name)
    with pytest.raises(IsADirectoryError, match=r"is a folder.*write-dataset"):
        with_tokenizer.write(tmp_path)
    with pytest.raises(FileNotFoundError, match=r"missing\.txt"):
        with_tokenizer.write(tmp_path / "missing.txt")


@pytest.fixture(scope="module")
def model():
    model = with_memory(nameless_base(), **PLAIN)
    model.tokenizer = small_tokenizer()
    return model


@pytest.mark.parametrize(("text", "index"), [("", "0 of 1"), (["abc", ""], "1 of 2"), (["abc", []], "1 of 2")])
def test_empty_text(model, text, index):
    with pytest.raises(ValueError, match=says(f"context {index} has no tokens", "at least one token")):
        model.write(text)


def test_no_texts(model):
    with pytest.raises(ValueError, match="no context was given"):
        model.write([])


def test_row_that_is_masked_throughout(model):
    mask = torch.ones_like(CONTEXT)
    mask[1] = 0
    expected = says("context 1 of 2 has no tokens")
    with pytest.raises(ValueError, match=expected):
        model.write(input_ids=CONTEXT, attention_mask=mask)
    with pytest.raises(ValueError, match=expected):
        model(context_input_ids=CONTEXT, context_attention_mask=mask, input_ids=QUERY)


def test_something_other_than_text(model):
    with pytest.raises(TypeError, match=says("a context is a text or a list of texts", "[1, 2]")):
        model.write([[1, 2]])


def test_text_and_tokens_at_once_or_neither(model):
    for arguments in ({}, {"context": "abc", "input_ids": CONTEXT}):
        with pytest.raises(ValueError, match="either a text or input_ids, and not both"):
            model.write(**arguments)


def test_text_without_a_tokenizer():
    with pytest.raises(ValueError, match=says("no tokenizer", "tokenizer= to get_gradmem_model", "input_ids")):
        with_memory(nameless_base(), **PLAIN).write("abc")


def test_context_longer_than_the_window(model):
    expected = says("needs 133 positions", "window of LlamaForCausalLM is 128", "segments", "write_segment_length")
    with pytest.raises(ValueError, match=expected):
        model.write(input_ids=tiny_tokens(1, 130))
    assert model.write(input_ids=tiny_tokens(1, 130), segment_ids=torch.arange(130)[None] // 50).is_segmented.all()


@pytest.mark.parametrize("name", ["attention_mask", "segment_ids"])
def test_mask_of_another_shape_than_its_context(model, name):
    with pytest.raises(ValueError, match=says(f"context {name}", "shape of its input_ids, (2, 8), got (2, 7)")):
        model.write(input_ids=CONTEXT, **{name: torch.ones(2, 7, dtype=torch.long)})


@pytest.mark.parametrize(
    "ids",
    [torch.ones(8, dtype=torch.long), torch.ones(2, 8), torch.ones(2, 8, dtype=torch.bool)],
    ids=["flat", "floating_point", "booleans"],
)
def test_context_that_is_no_batch_of_token_ids(model, ids):
    with pytest.raises(ValueError, match=says("context input_ids must be a tensor of token ids with 2 dim", "got")):
        model.write(input_ids=ids)


@pytest.mark.parametrize("dtype", [torch.int16, torch.uint8, torch.int32])
def test_ids_of_any_whole_numbers_are_taken(model, dtype):
    expected = model.write(input_ids=CONTEXT, segment_ids=CONTEXT % 2)
    written = model.write(input_ids=CONTEXT.to(dtype), segment_ids=(CONTEXT % 2).to(dtype))
    assert torch.equal(written.embeddings, expected.embeddings)


@pytest.mark.parametrize("token", [VOCAB_SIZE, -1])
def test_token_that_the_base_does_not_have(model, token):
    context = CONTEXT.clone()
    context[1, 3] = token
    expected = says(f"context input_ids must lie in 0..{VOCAB_SIZE - 1}", f"{token}", "resize_token_embeddings")
    with pytest.raises(ValueError, match=expected):
        model.write(input_ids=context)
    with pytest.raises(ValueError, match=expected):
        model(context_input_ids=context, input_ids=QUERY)


def test_padding_may_have_any_id(model):
    context, mask = CONTEXT.clone(), torch.ones_like(CONTEXT)
    context[0, 5:], mask[0, 5:] = VOCAB_SIZE, 0
    expected = model.write(input_ids=CONTEXT, attention_mask=mask)
    assert torch.equal(model.write(input_ids=context, attention_mask=mask).embeddings, expected.embeddings)


def test_mask_that_is_added_to_scores(model):
    additive = torch.zeros(2, 8)
    additive[0, 5:] = torch.finfo(torch.float32).min
    with pytest.raises(ValueError, match=says("context attention_mask must be 1 at tokens and 0", "got torch.float32")):
        model.write(input_ids=CONTEXT, attention_mask=additive)


def test_segment_ids_of_floating_point(model):
    with pytest.raises(ValueError, match=says("context segment_ids must be whole numbers, got torch.float32")):
        model.write(input_ids=CONTEXT, segment_ids=torch.full((2, 8), torch.nan))


@pytest.mark.parametrize("context", [{"abc": "def"}, [{"abc": "def"}], {"abc"}, 3])
def test_context_that_is_neither_a_text_nor_a_list(model, context):
    with pytest.raises(TypeError, match=says("a context is a text or a list of texts", "got a")):
        model.write(context)


@pytest.mark.parametrize(
    ("argument", "value", "expected"),
    [
        ("write_steps", -1, ("write_steps must be at least 0, got -1",)),
        ("write_learning_rate", -0.5, ("write_learning_rate must be greater than 0, got -0.5",)),
        ("write_learning_rate", 0.0, ("write_learning_rate must be greater than 0, got 0",)),
    ],
)
def test_write_argument_out_of_range(model, argument, value, expected):
    with pytest.raises(ValueError, match=says(*expected)):
        model.write(input_ids=CONTEXT, **{argument: value})


def test_write_that_diverges_names_the_context_and_what_to_lower():
    model = with_memory(tiny_causal_lm("gpt2", torch.float32), **PLAIN)
    with pytest.raises(FloatingPointError, match=says("context 0", "NaN or inf", "Lower write_learning_rate", "1e+30")):
        model.write(input_ids=CONTEXT, write_learning_rate=1e30, write_steps=4)


@pytest.mark.parametrize("batch_size", [None, 1, 2])
def test_broken_weight_is_blamed_on_the_context_that_meets_it(batch_size):
    model = with_memory(nameless_base(), **PLAIN)
    context = torch.tensor([[20, 21, 22], [20, 21, 23], [24, 50, 22]])
    with torch.no_grad():
        model.get_input_embeddings().weight[50] = torch.nan
    with pytest.raises(FloatingPointError, match=says("context 2", "(the first step is 0.4 at most)")):
        model.write(input_ids=context, batch_size=batch_size)


def test_a_broken_memory_to_go_on_from_is_said_also_without_a_step():
    model = build()
    memory = model.write(input_ids=tiny_tokens(2, 9))
    memory.embeddings[1, 0, 0] = torch.nan
    with pytest.raises(FloatingPointError, match="context 1 is to be written into holds NaN"):
        model.write(input_ids=tiny_tokens(2, 9), memory=memory, write_steps=0)
