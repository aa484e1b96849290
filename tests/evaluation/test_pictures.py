"""Pictures of an answer's tokens and of sizes: what is drawn is what the model, or the configuration, says."""

import pytest
import torch

from hf_gradmem import GradMemForCausalLM
from hf_gradmem.base.cache_size import kv_cache_bytes
from hf_gradmem.commands.packaged import RETRIEVAL_ADAPTER
from hf_gradmem.evaluation import AnswerTokens, answer_tokens
from hf_gradmem.evaluation.plots import plot_answer, plot_memory_sizes


@pytest.fixture(scope="module")
def model() -> GradMemForCausalLM:
    return GradMemForCausalLM.from_pretrained(RETRIEVAL_ADAPTER)


def test_a_token_gains_what_the_memory_adds_to_its_log_probability(model):
    """Against forward passes from the memory and from one that was not written; the value gains most."""
    memory = model.write([["!a:7!", "!b:Q!", "!c:x!", "!d:0!"]])
    answer = answer_tokens(model, "?!b:", memory, max_new_tokens=4)
    assert answer.tokens == ["Q", "!", "|"]
    ids = model.tokenizer("?!b:Q!|", add_special_tokens=False, return_tensors="pt").input_ids
    for given, found in ((memory, answer.memory), (model.write(["!a:7!"], write_steps=0), answer.start)):
        with torch.no_grad():
            likely = model(input_ids=ids, memory=given).logits[0].log_softmax(-1)
        expected = torch.stack([likely[place, ids[0, place + 1]] for place in range(3, 6)])
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
    assert answer.gain.argmax() == 0
    with pytest.raises(ValueError, match="One memory is read for an answer, got 2"):
        answer_tokens(model, "?!b:", model.write(["!a:7!", "!b:Q!"]))


def test_every_token_is_drawn_with_its_gain_and_rows_are_broken_where_they_are_full():
    words = [f" word{number}" for number in range(30)]
    long = AnswerTokens("Why?", words, torch.zeros(30), torch.linspace(-2, 2, 30))
    cost = AnswerTokens("How much?", ["$", "4$"], torch.tensor([-0.5, -0.25]), torch.tensor([-9.5, -0.25]))
    (axes, _) = plot_answer([long, cost]).axes
    drawn = {text.get_text(): text for text in axes.texts}
    assert {"Why?", "How much?", "$", "4$", "+9.0", "+0.0", "+2.0", "-2.0"} <= drawn.keys()
    assert all(word.replace(" ", "·") in drawn for word in words)
    assert len({drawn[word.replace(" ", "·")].get_position()[1] for word in words}) > 1
    assert max(text.get_position()[0] + len(text.get_text()) for text in axes.texts) <= 64
    deep, pale = (drawn[token].get_bbox_patch().get_facecolor() for token in ("$", "4$"))
    assert deep[2] > deep[0] + 0.2  # blue
    assert max(pale[:3]) - min(pale[:3]) < 0.05  # white
    with pytest.raises(ValueError, match="no answer was given"):
        plot_answer([])


def test_sizes_are_those_of_the_base_and_of_its_memories(model):
    config, decoder = model.base_model.config, model.decoder
    (axes,) = plot_memory_sizes(config, 8, most_tokens=64).axes
    lines = {line.get_label(): list(line.get_ydata()) for line in axes.lines}
    per_token = kv_cache_bytes(decoder, 10) // 10
    assert lines["KV cache (float32)"] == [length * per_token for length in (1, 2, 4, 8, 16, 32, 64)]
    assert lines["8 input vectors"] == [8 * 64 * 4] * 2
    assert lines["8 keys and values"] == [8 * per_token] * 2
    assert lines["8 values alone"] == [4 * per_token] * 2
    with pytest.raises(ValueError, match="num_memory_tokens must be at least 1, got 0"):
        plot_memory_sizes(config, 0)
