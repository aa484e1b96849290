"""Which model a memory belongs to: a hash of the weights that read it, and the check before it is read."""

import hashlib
from collections.abc import Callable

import torch

from .written import GradMemMemory

Tensor = torch.Tensor


def hash_tensors(tensors: dict[str, Tensor]) -> str:
    """A short hash of named tensors, the same at any precision they are held in."""
    digest = hashlib.sha256()
    for name in sorted(tensors):
        digest.update(name.encode())
        digest.update(tensors[name].detach().to("cpu", torch.float32).contiguous().numpy().tobytes())
    return digest.hexdigest()[:12]


class CachedHash:
    """[`hash_tensors`] of the tensors that it is called with, computed again only when one of them has changed.

    Reading asks for the hash at every call; the weights rarely change between two of them. It keeps no tensor.
    """

    def __init__(self) -> None:
        self._last: tuple[list[tuple[str, int, int]], str] | None = None

    def __call__(self, tensors: dict[str, Tensor]) -> str:
        versions = [(name, tensor.data_ptr(), tensor._version) for name, tensor in tensors.items()]
        if self._last is None or self._last[0] != versions:
            self._last = versions, hash_tensors(tensors)
        return self._last[1]


def check_memory(memory: GradMemMemory, shape: tuple[int, ...], fingerprint: Callable[[], str]) -> None:
    """Refuse what is no memory, or one that a model would not read as it was written.

    Args:
        memory: to read, or to go on writing from.
        shape: of one memory of this model, `(num_memory_tokens, hidden_size)`.
        fingerprint: gives the model's; asked for only where the memory has one.

    Raises:
        TypeError: it is not a memory.
        ValueError: it has another shape, or was written for another model.
    """
    if not isinstance(memory, GradMemMemory):
        raise TypeError(f"memory must be a GradMemMemory, got {type(memory).__name__}.")
    given = tuple(memory.embeddings.shape[1:])
    if shape != given:
        raise ValueError(
            f"memory has {given[0]} vectors of width {given[1]}, but this model reads {shape[0]} of width "
            f"{shape[1]}. It was written by another model."
        )
    if memory.fingerprint is not None and memory.fingerprint != (own := fingerprint()):
        raise ValueError(
            f"memory was written for {memory.fingerprint}, but this model is {own}: another base, "
            "or other weights in READ. Read it with the model that wrote it, or write the context again."
        )
