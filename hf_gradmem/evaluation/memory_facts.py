"""What a memory is, holds and replaces, in figures."""

from typing import Any

import torch

from ..memory.written import GradMemMemory
from ..modeling_gradmem import GradMemForCausalLM
from ..reading.reciting import recite

MOST_DECODED = 4096
"""Tokens of the longest context that is decoded to be shown: each takes a forward pass over those before it."""


def memory_facts(memory: GradMemMemory) -> dict[str, Any]:
    """The facts that a memory carries itself, ready for JSON.

    `contexts` lists, for each context, its tokens, segments, steps and losses in nats per token.
    """
    _, num_memory_tokens, hidden_size = memory.embeddings.shape
    return {
        "num_memory_tokens": num_memory_tokens,
        "hidden_size": hidden_size,
        "dtype": str(memory.embeddings.dtype).removeprefix("torch."),
        "bytes": tensor_bytes(memory.embeddings),
        "fingerprint": memory.fingerprint,
        "base_name": memory.base_name,
        "contexts": [_context_facts(memory[index]) for index in range(len(memory))],
    }


def _context_facts(memory: GradMemMemory) -> dict[str, Any]:
    losses = write_losses(memory)
    return {
        "tokens": int(memory.num_context_tokens),
        "segments": int((memory.segment_lengths > 0).sum()),
        "bytes": tensor_bytes(memory.embeddings),
        "steps": len(losses),
        "first_loss": losses[0] if losses else None,
        "last_loss": losses[-1] if losses else None,
        "final_loss": None if memory.final_write_loss is None else float(memory.final_write_loss),
    }


def write_losses(memory: GradMemMemory) -> list[float]:
    """Losses before the steps that were taken for one context, in nats per token."""
    losses = memory.write_losses[0]
    return losses[~losses.isnan()].tolist()


def decode_memory(model: GradMemForCausalLM, memory: GradMemMemory) -> list[str | None]:
    """The text that each memory decodes to.

    `None` where it was written in segments, which need the one before, or from more than 4,096 tokens.
    """
    texts: list[str | None] = [None] * len(memory)
    whole = (~memory.is_segmented & (memory.num_context_tokens <= MOST_DECODED)).nonzero().flatten().tolist()
    if whole:
        for index, text in zip(whole, recite(model, memory[whole]), strict=True):
            texts[index] = text
    return texts


def tensor_bytes(tensor: torch.Tensor) -> int:
    return tensor.numel() * tensor.element_size()


def describe_size(memory_bytes: int, cache_bytes: int | None) -> str:
    """The size of a memory beside that of the cache it replaces, in one line."""
    size = f"Memory: {memory_bytes:,} bytes. KV cache of the same text: "
    return size + (
        "not known."
        if cache_bytes is None
        else f"{cache_bytes:,} bytes, {cache_bytes / memory_bytes:.3g} times as many."
    )
