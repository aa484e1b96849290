"""A tiny model that writes five contexts of unequal length."""

import torch

from hf_gradmem import GradMemConfig, GradMemForCausalLM, get_gradmem_model
from hf_gradmem.writing.contexts import Contexts
from tests.support.tiny_models import tiny_causal_lm, tiny_tokens

MEMORY_TOKENS = 3
LENGTHS = torch.tensor([3, 9, 5, 8, 4])
MASK = (torch.arange(9) < LENGTHS[:, None]).long()


def build(model_type: str = "llama", dtype: torch.dtype = torch.float64, **settings) -> GradMemForCausalLM:
    torch.manual_seed(0)
    defaults = {"num_memory_tokens": MEMORY_TOKENS, "write_steps": 2, "write_learning_rate": 0.3}
    return get_gradmem_model(tiny_causal_lm(model_type, dtype), GradMemConfig(**defaults | settings))


def objective_of(model: GradMemForCausalLM, segment_ids: torch.Tensor | None = None):
    return model.writer.objective(rows_of(model, segment_ids))


def rows_of(model: GradMemForCausalLM, segment_ids: torch.Tensor | None = None):
    return model.writer.rows(Contexts(tiny_tokens(5, 9), MASK.bool(), segment_ids))
