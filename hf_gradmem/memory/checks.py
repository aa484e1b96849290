"""What holds of every memory, looked at where one is saved and wherever one is read from a file."""

from collections.abc import Iterable, Mapping
from typing import Any

import torch

Tensor = torch.Tensor

DTYPES = {"float64": torch.float64, "float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
"""Precisions of a memory's numbers, by their names in files."""

# Positions are counted in 32 bits at most in every base: no context is longer.
MOST_TOKENS = 2**31 - 1

_SHAPES = {
    "embeddings": ("batch", "num_memory_tokens", "hidden_size"),
    "write_losses": ("batch", "steps"),
    "segment_lengths": ("batch", "segments"),
    "final_write_loss": ("batch",),
}
_NEVER_EMPTY = ("num_memory_tokens", "hidden_size", "segments")
_REMEDY = "Copy it again from where it was written, or write the context again."


def broken(where: Any, what: str, expected: str, remedy: str = _REMEDY) -> ValueError:
    """The error for a file that says what it cannot mean.

    Args:
        where: the file, or a place in it.
        what: what it holds, with the value.
        expected: what belongs there.
        remedy: what to do.
    """
    return ValueError(f"{where} is broken: {what}, where {expected} belongs. {remedy}")


def check_tensors(tensors: Mapping[str, Tensor], where: Any) -> None:
    """Refuse tensors that WRITE cannot have left.

    Args:
        tensors: those of a memory, by the names of its fields.
        where: the file, or the place in it, for the message.

    Raises:
        ValueError: names the tensor, the value, what was expected and what to do. A tensor has another rank, precision
            or number of rows, a size is 0, a number of tokens is out of range, a memory holds no token, or a number
            is not finite. Losses may be NaN: those of steps that a sample did not take.
    """
    rows = len(tensors["embeddings"]) if tensors["embeddings"].dim() else 0
    for name, tensor in tensors.items():
        sizes = dict(zip(_SHAPES[name], tensor.shape, strict=False))
        if tensor.dim() != len(_SHAPES[name]) or any(sizes.get(size) == 0 for size in _NEVER_EMPTY):
            shape = f"({', '.join(_SHAPES[name])}{',' * (len(_SHAPES[name]) == 1)})"
            raise broken(where, f"{name} has the shape {tuple(tensor.shape)}", shape)
        if len(tensor) != rows:
            raise broken(where, f"{name} has {len(tensor)} rows", f"one for each of the {rows} memories")
        dtypes = {"int64": torch.int64} if name == "segment_lengths" else DTYPES
        if tensor.dtype not in dtypes.values():
            dtype = str(tensor.dtype).removeprefix("torch.")
            raise broken(where, f"{name} is of {dtype}", " or ".join(dtypes))
    _check_lengths(tensors["segment_lengths"], where)
    _check_numbers(tensors, where)


def _check_lengths(lengths: Tensor, where: Any) -> None:
    out_of_range = lengths[(lengths < 0) | (lengths > MOST_TOKENS)]
    if len(out_of_range):
        raise broken(
            where, f"segment_lengths holds {int(out_of_range[0])}", f"a number of tokens, 0 to {MOST_TOKENS:,}"
        )
    for row, tokens in enumerate(lengths.double().sum(1).tolist()):  # in int64 it might come round
        if not 1 <= tokens <= MOST_TOKENS:
            found = f"the segment_lengths of memory {row} come to {tokens:.0f}"
            raise broken(where, found, f"a number of tokens, 1 to {MOST_TOKENS:,},")


def _check_numbers(tensors: Mapping[str, Tensor], where: Any) -> None:
    for name in ("embeddings", "write_losses", "final_write_loss"):
        if name not in tensors:
            continue
        fine = tensors[name].isfinite()
        if name == "write_losses":
            fine = fine | tensors[name].isnan()
        if not fine.all():
            place = (~fine).nonzero()[0].tolist()
            value = float(tensors[name][tuple(place)])
            raise broken(where, f"{name} is {value} at {place}", "a finite number")


def asked_ids(name: Any) -> list[str]:
    """The ids that a store is asked for: one, or several.

    Raises:
        KeyError: it is none.
        TypeError: they are no ids, but numbers or a slice, which a memory is indexed by.
    """
    names = [name] if isinstance(name, str) or not isinstance(name, Iterable) else list(name)
    if not all(isinstance(each, str) for each in names):
        raise TypeError(f"A store is asked by id, one or a list of them (store.ids names them), got {name!r}.")
    if not names:
        raise KeyError("No id was given.")
    return names
