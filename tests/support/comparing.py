"""Models compared: what they compute, and what they hold."""

from pathlib import Path

import torch

from hf_gradmem import GradMemForCausalLM
from hf_gradmem.checkpoint.adapter import base_keys
from tests.support.tiny_models import tiny_tokens

CONTEXT, QUERY = tiny_tokens(2, 9, seed=1), tiny_tokens(2, 5, seed=2)

ADAPTER_FILES = {"config.json", "model.safetensors", "README.md", "modeling_gradmem_hub.py"}


def results(model: GradMemForCausalLM) -> tuple[torch.Tensor, torch.Tensor]:
    memory = model.write(input_ids=CONTEXT)
    with torch.no_grad():
        return memory.embeddings, model(input_ids=QUERY, memory=memory).logits


def assert_same_results(model: GradMemForCausalLM, other: GradMemForCausalLM) -> None:
    for ours, theirs in zip(results(model), results(other), strict=True):
        assert torch.equal(ours, theirs)


def beside_base(model: GradMemForCausalLM) -> dict[str, torch.Tensor]:
    base = base_keys(model)
    return {key: value.clone() for key, value in model.state_dict().items() if key not in base}


def base_state(model: GradMemForCausalLM) -> dict[str, torch.Tensor]:
    base = base_keys(model)
    return {key: value.clone() for key, value in model.state_dict().items() if key in base}


def assert_equal_states(state: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> None:
    assert state.keys() == other.keys()
    assert [key for key in state if not torch.equal(state[key], other[key])] == []


def all_paths(directory: Path) -> set[str]:
    return {path.name for path in directory.iterdir()}
