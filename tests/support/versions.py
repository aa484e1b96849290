"""Versions of a checkpoint, to be saved over each other and told apart.

A version has its number in its configuration, its weights and its tokenizer.
"""

from pathlib import Path

import torch

from hf_gradmem import GradMemConfig, GradMemForCausalLM, get_gradmem_model
from tests.support.small_models import named_base, nameless_base, small_tokenizer


def save_version(directory: Path, version: int, *, full: bool = False) -> None:
    """Save the adapter, or the full checkpoint, of a version into `directory / "model"`."""
    base = nameless_base() if full else named_base(directory / "base")
    tokenizer = small_tokenizer()
    tokenizer.add_tokens([f"<version{version}>"])
    model = get_gradmem_model(base, GradMemConfig(num_memory_tokens=1 + version), tokenizer=tokenizer)
    with torch.no_grad():
        model.memory_init.fill_(version)
    model.save_pretrained(directory / "model", max_shard_size=("50GB", "20KB")[version % 2])


def versions(directory: Path) -> set[int]:
    """The versions that parts of what loads belong to: one, if it was saved whole."""
    model = GradMemForCausalLM.from_pretrained(directory / "model")
    (added,) = [token for token in model.tokenizer.get_vocab() if token.startswith("<version")]
    values = set(model.memory_init.detach().flatten().int().tolist())
    return values | {model.config.num_memory_tokens - 1, int(added.removeprefix("<version").removesuffix(">"))}
