"""Rows of several tasks together, for an adapter that is to answer all of them."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from datasets import Dataset, Features

from .rows import FEATURES_OF_TEXT, FEATURES_WITH_ANSWERS, check_split
from .task import Task


def task(load_part: Callable[..., Dataset]) -> Task:
    """The task that puts others together.

    Args:
        load_part: [`~hf_gradmem.tasks.load_task`], which knows them by name.
    """

    def load(split: str = "train", *, parts: Sequence[Mapping[str, Any]] = ()) -> Dataset:
        """The rows of the parts, one part after the other.

        Args:
            split: of each part that does not name its own.
            parts: `{"task": name, ...}` each, with the arguments of that task. Answers are compared with all
                references of a question, which are its target alone where a task has no more, and by SQuAD's metric:
                case, punctuation and articles aside. Where these count, as in `kv_retrieval`, give another metric.

        Raises:
            ValueError: there are no parts, or one of them names no task.
        """
        check_split(split)
        if not parts:
            raise ValueError("A mixture needs parts: a list of at least one task with its arguments.")
        rows: list[dict[str, Any]] = []
        for part in parts:
            if not isinstance(part, Mapping) or "task" not in part:
                raise ValueError(f"A part of a mixture is a task with its arguments, {{'task': ...}}, got {part!r}.")
            given = {"split": split} | {name: value for name, value in part.items() if name != "task"}
            rows += map(_completed, load_part(part["task"], **given))
        return Dataset.from_list(rows, features=Features({**FEATURES_WITH_ANSWERS, **FEATURES_OF_TEXT}))

    return Task(load, metric="squad")


def _completed(row: Mapping[str, Any]) -> dict[str, Any]:
    answers = row.get("answers") or [[target.strip()] for target in row["targets"]]
    quotes = row.get("quotes") or [""] * len(row["queries"])
    own = {"answers": answers, "quotes": quotes, "add_end_token": row.get("add_end_token", True)}
    return {name: row[name] for name in ("context", "queries", "targets")} | own
