"""What wrote a memory: the base and all that WRITE uses beside it, as a hash of their content, and the check of it."""

import os
import re
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import NamedTuple

import torch

from ..base.weights import Cached, hash_tensors, hash_weights
from .written import GradMemMemory

Tensor = torch.Tensor

# The tensors beside the base of up to this size are looked at whole at each read, which takes less than a millisecond.
_SMALL = 1 << 20


class Identity(NamedTuple):
    """What a memory carries of its writer.

    Attributes:
        fingerprint: a hash of the base's weights, `-`, and a hash of what WRITE uses beside them.
        base_name: the base's name for people to read; nothing depends on it.
    """

    fingerprint: str
    base_name: str | None

    def __str__(self) -> str:
        return self.fingerprint + (f" (on {self.base_name})" if self.base_name else "")


class WriterFingerprint:
    """The fingerprint of a model as it is when it is asked for; both hashes are kept until something changed."""

    def __init__(self) -> None:
        self._base = Cached(hash_weights)
        self._beside = Cached(hash_tensors, whole_up_to=_SMALL)

    def __call__(
        self,
        base: Mapping[str, Tensor],
        beside: Mapping[str, Tensor],
        settings: Iterable[object],
        *,
        thorough: bool = False,
    ) -> str:
        """A hash of the base's weights, `-`, and a hash of what WRITE uses beside them.

        Args:
            base: the base's own weights.
            beside: what WRITE uses beside them.
            settings: of the memory's form and of WRITE's LoRA, which no tensor tells.
            thorough: look at every element beside the base; otherwise an edit of a large tensor through `.data` is
                found by the elements that are looked at.
        """
        return f"{self._base(base)}-{self._beside(beside, tuple(settings), thorough=thorough)}"

    def of_base(self, base: Mapping[str, Tensor]) -> str:
        """The hash of the base alone, every element looked at."""
        return self._base(base, thorough=True)


def shown_name(name: str | os.PathLike | None) -> str | None:
    """A model's name as others may see it: a Hub repository as it is, of a directory the last part alone."""
    if name is None:
        return None
    name = os.fspath(name)
    is_repository = re.fullmatch(r"[\w-][\w.-]*(/[\w-][\w.-]*)?", name) and not os.path.isdir(name)
    return name if is_repository else re.split(r"[\\/]", str(Path(name).absolute()).rstrip("\\/"))[-1] or None


def check_memory(
    memory: GradMemMemory, shape: tuple[int, ...], identity: Callable[[], Identity], *, several: bool = False
) -> None:
    """Refuse what is no memory, or one that a model would not read as it was written.

    Args:
        memory: to read, or to go on writing from.
        shape: of one memory of this model, `(num_memory_tokens, hidden_size)`.
        identity: gives the model's; asked for only where the memory has one.
        several: whether it may be several memories side by side.

    Raises:
        TypeError: it is not a memory.
        ValueError: it has another shape, is several where one is needed, or was written by another model.
    """
    if not isinstance(memory, GradMemMemory):
        raise TypeError(f"memory must be a GradMemMemory, got {type(memory).__name__}.")
    given = tuple(memory.embeddings.shape[1:])
    side_by_side = shape[1] == given[1] and given[0] > shape[0] and given[0] % shape[0] == 0
    if side_by_side and not several and memory.fingerprint is not None and memory.fingerprint == identity().fingerprint:
        raise ValueError(
            f"memory is {given[0] // shape[0]} memories side by side, {given[0]} vectors in place of {shape[0]}, which "
            "only READ takes. Give one of them."
        )
    if shape != given and not (side_by_side and several):
        raise ValueError(
            f"memory has {given[0]} vectors of width {given[1]}, but this model reads {shape[0]} of width "
            f"{shape[1]}. It was written by another model."
        )
    if memory.fingerprint is not None and memory.fingerprint != (own := identity()).fingerprint:
        raise ValueError(
            f"memory was written by {Identity(memory.fingerprint, memory.base_name)}, but this model is {own}: "
            f"{_difference(memory.fingerprint, own.fingerprint)}. Read it with the model that wrote it, or write the "
            "context again. If you know that this model reads it, memory.relabelled(model.fingerprint()) says so."
        )


def _difference(of_memory: str, of_model: str) -> str:
    if not re.fullmatch(r"[0-9a-f]+-[0-9a-f]+", of_memory):
        return "the memory was saved by an earlier version, which named the base in place of hashing what wrote it"
    if of_memory.split("-")[0] != of_model.split("-")[0]:
        return "another base, or the same after its weights changed"
    return "the same base, but another start, projection, head, LoRA or control vectors in WRITE"
