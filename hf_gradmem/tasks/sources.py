"""Where the rows of a task come from: a file or the Hub, and a validation part of its own."""

import os
from collections.abc import Sequence
from typing import Any, TypeVar

from datasets import Dataset, load_dataset

Item = TypeVar("Item")


def source_name(path: str | os.PathLike | None, hub_name: str | None) -> str:
    """The file or the Hub data set by its name, whichever of the two was given.

    Raises:
        ValueError: neither or both were given.
    """
    name = hub_name if path is None else str(path)
    if name is None or (path is not None and hub_name is not None):
        raise ValueError(f"Give either path or hub_name, and not both: got path={path!r}, hub_name={hub_name!r}.")
    return name


def load_hub(hub_name: str, config: str | None, split: str, revision: str | None = None) -> Dataset:
    """A split of a data set on the Hub."""
    options: dict[str, Any] = {} if revision is None else {"revision": revision}
    return load_dataset(hub_name, config, split=split, **options)


def take_split(items: Sequence[Item], split: str, validation_share: float) -> Sequence[Item]:
    """The part of `items` that belongs to a split: `"test"` is all of them, the other two share them.

    The validation part is spread evenly, every tenth item for a share of 0.1, so it is the same at every call.

    Raises:
        ValueError: the share is out of range, or leaves one of the two without an item.
    """
    if split == "test":
        return items
    if not 0 < validation_share < 1:
        raise ValueError(f"validation_share must lie between 0 and 1, got {validation_share}.")
    validates = [int((index + 1) * validation_share) > int(index * validation_share) for index in range(len(items))]
    taken = [item for item, here in zip(items, validates, strict=True) if here == (split == "validation")]
    if not taken:
        raise ValueError(f"{len(items)} items and validation_share={validation_share} leave none for {split!r}.")
    return taken


def take_evenly(items: Sequence[Item], count: int | None, source: str) -> Sequence[Item]:
    """So many of the items, spread evenly over them; all of them when `None`. `source` names them in a message.

    Raises:
        ValueError: there are not so many.
    """
    if count is None:
        return items
    if not 1 <= count <= len(items):
        raise ValueError(f"num_contexts must lie in 1..{len(items)}, the contexts of {source}, got {count}.")
    return [items[index * len(items) // count] for index in range(count)]
