"""Contexts, queries and targets: the data sets that a memory is trained and measured on. Nothing here knows a model."""

import inspect
from collections.abc import Mapping
from typing import Any

from datasets import Dataset, IterableDataset

from . import babi, babi_stories, facts, jsonl, kv_retrieval, mixture, squad, text
from .rows import FEATURES, check_flags, check_row, columns_of
from .task import Task

TASKS: dict[str, Task] = {
    "kv_retrieval": kv_retrieval.TASK,
    "babi": babi.TASK,
    "babi_stories": babi_stories.TASK,
    "squad": squad.TASK,
    "facts": facts.TASK,
    "text": text.TASK,
    "jsonl": jsonl.TASK,
}
"""The tasks by name."""


def get_task(name: str) -> Task:
    """The task of this name.

    Raises:
        ValueError: there is none.
    """
    if name not in TASKS:
        raise ValueError(f"There is no task {name!r}. The tasks are {', '.join(TASKS)}.")
    return TASKS[name]


def load_task(
    name: str, split: str = "train", *, streaming: bool = False, **arguments: Any
) -> Dataset | IterableDataset:
    """Rows of a task.

    Args:
        name: one of [`TASKS`].
        split: `"train"`, `"validation"` or, where the task has one, `"test"`.
        streaming: generate the rows as they are read, for a task that generates them.
        arguments: the task's own.

    Raises:
        ValueError: an unknown task or argument, an argument out of range, or data that is not what the task needs.
        OSError: its file cannot be read.
    """
    task = get_task(name)
    load = task.stream if streaming else task.load
    if load is None:
        raise ValueError(f"The task {name!r} is read from a file and has no stream. Use streaming=False.")
    try:
        given = inspect.signature(load)
        given.bind(split, **arguments)
        flags = [name for name, own in given.parameters.items() if isinstance(own.default, bool)]
        check_flags({name: arguments[name] for name in flags if name in arguments})
        return load(split, **arguments)
    except TypeError as error:
        raise ValueError(f"The task {name!r} does not take these arguments, {arguments}: {error}") from error


def load_set(task: str, arguments: Mapping[str, Any]) -> Dataset | IterableDataset:
    """Rows of an evaluation set.

    Args:
        task: of the recipe.
        arguments: of the set, `split` among them; a `task` among them is the set's own.

    Raises:
        OSError, ValueError: as of [`load_task`].
    """
    given = dict(arguments)
    return load_task(given.pop("task", task), **given)


TASKS["mixture"] = mixture.task(load_task)


__all__ = ["FEATURES", "TASKS", "Task", "check_row", "columns_of", "get_task", "load_set", "load_task"]
