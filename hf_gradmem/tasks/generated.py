"""Rows of the tasks that draw their contexts: a table of the first ones, and a stream of them."""

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import fields
from typing import Any, Protocol

from datasets import Dataset, Features, IterableDataset

from .rows import FEATURES, check_flags


class Distribution(Protocol):
    """What contexts are drawn from."""

    def row(self, index: int) -> dict[str, Any]:
        """The context of this index, a pure function of it."""


def check_flags_of(task: Any) -> None:
    """Raise a `ValueError` unless those fields of a dataclass are true or false that are so by default."""
    check_flags({own.name: getattr(task, own.name) for own in fields(task) if isinstance(own.default, bool)})


def table(task: Distribution, num_contexts: int, features: Features = FEATURES) -> Dataset:
    """The first `num_contexts` contexts, with these columns.

    Raises:
        ValueError: that is none.
    """
    _check_count(num_contexts)
    return Dataset.from_list([task.row(index) for index in range(num_contexts)], features=features)


def stream(
    task: Distribution,
    num_contexts: int | None,
    num_shards: int = 1,
    first: int = 0,
    features: Features = FEATURES,
) -> IterableDataset:
    """The contexts from the index `first` on, generated as they are needed; without end for `num_contexts` of `None`.

    Shard s holds the contexts `first` + s, `first` + s + `num_shards`, ….

    Raises:
        ValueError: that is no context, no shard or no index.
    """
    if num_contexts is not None:
        _check_count(num_contexts)
    if num_shards < 1:
        raise ValueError(f"num_shards must be at least 1, got {num_shards}.")
    if first < 0:
        raise ValueError(f"first is the index of a context and must be at least 0, got {first}.")
    end = None if num_contexts is None else first + num_contexts
    shards = [(first + shard, end, num_shards) for shard in range(num_shards)]
    return IterableDataset.from_generator(_generate, features=features, gen_kwargs={"task": task, "shards": shards})


def _generate(task: Distribution, shards: list[tuple[int, int | None, int]]) -> Iterator[dict[str, Any]]:
    for start, end, step in shards:
        for index in itertools.count(start, step) if end is None else range(start, end, step):
            yield task.row(index)


def _check_count(num_contexts: int) -> None:
    if num_contexts < 1:
        raise ValueError(f"num_contexts must be at least 1, got {num_contexts}.")


def number_range(name: str, value: int | Sequence[int]) -> tuple[int, int]:
    """The smallest and the largest number that a context draws one from.

    Raises:
        ValueError: it is neither a number of at least 1 nor such a smallest and largest one.
    """
    if isinstance(value, int):
        fewest = most = value
    elif len(value) == 2:
        fewest, most = value
    else:
        raise ValueError(f"{name} must be a number or [smallest, largest], got {value}.")
    if not 1 <= fewest <= most:
        raise ValueError(f"{name} must be at least 1, or such a [smallest, largest], got {value}.")
    return fewest, most
