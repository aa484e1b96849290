"""Mean embeddings as a memory."""

import pytest
import torch

from hf_gradmem import GradMemConfig, get_gradmem_model
from tests.support.tiny_models import tiny_causal_lm

IDS = torch.tensor([[5, 6, 7, 8, 9, 10, 0, 0], [5, 6, 7, 8, 9, 10, 11, 12]])
MASK = (IDS != 0).long()


def build(**options):
    return get_gradmem_model(tiny_causal_lm("llama", torch.float32), GradMemConfig(writer="pooled", **options))


@pytest.fixture
def model():
    return get_gradmem_model(
        tiny_causal_lm("llama", torch.float32), GradMemConfig(num_memory_tokens=3, writer="pooled")
    )


def test_each_vector_is_the_mean_of_its_share(model):
    memory = model.write(input_ids=IDS, attention_mask=MASK)
    embedded = model.get_input_embeddings()(IDS)
    torch.testing.assert_close(memory.embeddings[0, 1], embedded[0, 2:4].mean(0))
    assert memory.write_losses.shape == (2, 0)
    alone = model.write(input_ids=IDS[:1, :6])
    torch.testing.assert_close(memory.embeddings[0], alone.embeddings[0])


def test_a_context_shorter_than_the_memory_fills_it(model):
    memory = model.write(input_ids=IDS[:1, :1])
    torch.testing.assert_close(memory.embeddings[0], model.get_input_embeddings()(IDS[:1, :1]).expand(1, 3, -1)[0])


def test_what_it_would_not_look_at_is_refused(model):
    with pytest.raises(ValueError, match='writer="pooled" makes a memory of the context alone'):
        model.write(input_ids=IDS, memory=model.write(input_ids=IDS))
    with pytest.raises(ValueError, match=r'write_lora=.* writer="pooled" does not run it'):
        build(write_lora={"r": 2, "target_modules": ["q_proj"]})
    assert build(read_lora={"r": 2, "target_modules": ["q_proj"]}).config.writer == "pooled"


def test_it_is_read_and_takes_no_step(model):
    out = model(context_input_ids=IDS, context_attention_mask=MASK, input_ids=IDS, labels=IDS)
    assert out.loss.isfinite()
    for option in ({"write_steps": 2}, {"write_learning_rate": 0.1}, {"tolerance": 0.1}):
        with pytest.raises(ValueError, match="takes no step"):
            model.write(input_ids=IDS, **option)
    with pytest.raises(ValueError, match="holds none"):
        get_gradmem_model(
            tiny_causal_lm("llama", torch.float32), GradMemConfig(writer="pooled", memory_form="key_values")
        )
