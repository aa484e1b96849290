"""The forward-only writer: what it reads back, the conditions it runs under, and what it refuses."""

from functools import partial

import pytest
import torch
from transformers import AutoModelForCausalLM

from hf_gradmem import GradMemConfig, GradMemForCausalLM, get_gradmem_model
from tests.support import writing
from tests.support.small_models import named_base
from tests.support.tiny_models import tiny_tokens

build = partial(writing.build, writer="forward")


def read_back(model: GradMemForCausalLM, memory: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
    """One reading of one context, by the base alone and without padding."""
    embed = model.base_model.get_input_embeddings()
    embeds = torch.cat([memory, embed(tokens), memory])[None]
    return model.base_model.get_decoder()(inputs_embeds=embeds).last_hidden_state[0, -len(memory) :]


@pytest.mark.parametrize("model_type", ["llama", "gpt2", "mamba"])
@pytest.mark.parametrize("padding", [[0, 0, 1, 1, 1, 1], [1, 1, 1, 1, 0, 0], [1, 0, 1, 1, 0, 1]])
def test_each_step_reads_the_context_again(model_type, padding):
    model = build(model_type)
    tokens, mask = tiny_tokens(2, 6), torch.tensor([[1] * 6, padding])
    written = model.write(input_ids=tokens, attention_mask=mask)
    for row in range(2):
        memory = model.memory_init
        for _ in range(2):
            memory = read_back(model, memory, tokens[row, mask[row].bool()])
        torch.testing.assert_close(written.embeddings[row], memory.detach(), rtol=1e-9, atol=1e-10)
    assert written.write_losses.isnan().all()
    assert written.write_losses.shape == (2, 2)


def test_segments_are_read_as_one_context():
    model, tokens = build(), tiny_tokens(1, 6)
    whole = model.write(input_ids=tokens).embeddings
    in_segments = model.write(input_ids=tokens, segment_ids=torch.tensor([[0, 0, 1, 1, 2, 2]])).embeddings
    torch.testing.assert_close(in_segments, whole)


def test_reading_and_saving_are_as_with_any_writer(tmp_path):
    model = get_gradmem_model(named_base(tmp_path / "base"), GradMemConfig(num_memory_tokens=2, writer="forward"))
    tokens, query = torch.randint(5, 40, (1, 6)), torch.randint(5, 40, (1, 3))
    memory = model.write(input_ids=tokens)
    direct = model(context_input_ids=tokens, input_ids=query).logits
    torch.testing.assert_close(model(memory=memory, input_ids=query).logits, direct.detach())
    model.save_pretrained(tmp_path / "adapter")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "adapter")
    torch.testing.assert_close(loaded.write(input_ids=tokens).embeddings, memory.embeddings)
    more = model.write(input_ids=query, memory=memory)
    assert more.num_context_tokens.tolist() == [9]


@pytest.mark.parametrize("option", [{"tolerance": 0.1}, {"write_learning_rate": 1.0}])
def test_there_is_no_gradient_step_to_set(option):
    with pytest.raises(ValueError, match='writer="forward" takes no gradient step'):
        build().write(input_ids=tiny_tokens(1, 4), **option)


def test_both_copies_of_the_memory_count_in_the_window():
    model = build()
    window = model.decoder.window
    model.write(input_ids=tiny_tokens(1, window - 6))
    with pytest.raises(ValueError, match=rf"needs {window + 1} positions .* Shorten it"):
        model.write(input_ids=tiny_tokens(1, window - 5))
