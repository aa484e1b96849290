"""A base, an adapter and a memory on the server of the tests."""

from pathlib import Path

import torch
from huggingface_hub import HfApi, constants

from hf_gradmem import GradMemForCausalLM
from tests.support.small_models import PLAIN, with_memory
from tests.support.tiny_models import tiny_causal_lm, tiny_tokens

CONTEXT, QUERY = tiny_tokens(2, 9, seed=1), tiny_tokens(2, 5, seed=2)
BASE, ADAPTER, MEMORY = "me/base", "me/adapter", "me/memory"
ADAPTER_FILES = {"config.json", "model.safetensors", "README.md", "modeling_gradmem_hub.py"}


def push_base(seed: int) -> str:
    tiny_causal_lm("llama", torch.float32, seed).push_to_hub(BASE, commit_message=f"seed {seed}")
    return HfApi().model_info(BASE).sha


def pushed_adapter(base, **options) -> GradMemForCausalLM:
    model = with_memory(base, **options or PLAIN)
    model.push_to_hub(ADAPTER)
    return model


def logits(model) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=QUERY, memory=model.write(input_ids=CONTEXT)).logits


def files(hub, repo_id: str) -> set[str]:
    return set(hub.repos[repo_id].files)


def forget(home: Path, monkeypatch) -> None:
    """Go on with an empty cache, as on another machine."""
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(home))
