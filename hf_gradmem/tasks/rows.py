"""The form of a row that every task yields, and its checks.

A row is `{"context": [segments], "queries": [...], "targets": [...]}`, with `"answers": [[...], ...]` where a query has
several reference answers, `"quotes": [...]` where it is known which part of the context tells the answer (empty for one
that none does), and `"add_end_token": False` where targets are running text, which goes on behind them. The segments of
a context, put together, are its text. Query and target, put together, are what the model is trained to continue, so a
target brings the space that parts it from its query.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
from datasets import Dataset, Features, IterableDataset, List, Value

FEATURES = Features(
    {"context": List(Value("string")), "queries": List(Value("string")), "targets": List(Value("string"))}
)
FEATURES_WITH_QUOTES = Features({**FEATURES, "quotes": List(Value("string"))})
FEATURES_WITH_ANSWERS = Features({**FEATURES_WITH_QUOTES, "answers": List(List(Value("string")))})
FEATURES_OF_TEXT = Features({**FEATURES, "add_end_token": Value("bool")})


def columns_of(*tables: Dataset | IterableDataset) -> Features:
    """The columns that a reader is trained on, of rows from all these tables.

    Quotes only if each table has them. Whether its answers end each row says for itself, with `None` in a table that
    does not say.
    """
    own = [set(table.column_names or ()) for table in tables]
    quotes = FEATURES_WITH_QUOTES if all("quotes" in names for names in own) else FEATURES
    ends = FEATURES_OF_TEXT if any("add_end_token" in names for names in own) else FEATURES
    return Features({**quotes, **ends})


SPLITS = ("train", "validation", "test")


def check_split(split: str, splits: tuple[str, ...] = SPLITS) -> None:
    """Raise a `ValueError` unless `split` is one of `splits`."""
    if split not in splits:
        raise ValueError(f"split must be one of {', '.join(splits)}, got {split!r}.")


def check_flags(flags: Mapping[str, Any]) -> None:
    """Raise a `ValueError` unless these are true or false: a text is true, whatever it says."""
    for name, value in flags.items():
        if not isinstance(value, bool):
            raise ValueError(f"{name} must be true or false, without quotes, got {value!r}.")


def context_text(context: str | Sequence[str]) -> str:
    """The text of a context, which is one or comes in segments."""
    return context if isinstance(context, str) else "".join(context)


def context_numbers(rows: Iterable[Mapping[str, Any]], known: dict[str, int] | None = None) -> list[int]:
    """The number of each row's context: rows on one text, in whatever segments, have one.

    Args:
        rows: of a task.
        known: numbers of texts, to which those of these rows are added.
    """
    known = {} if known is None else known
    return [known.setdefault(context_text(row["context"]), len(known)) for row in rows]


def ends_of(row: Mapping[str, Any]) -> bool | None:
    """Whether the targets of a row end, as it says itself; `None` where it does not.

    Tables that are put together fill the column with `None` for those of them that had none.
    """
    own = row.get("add_end_token")
    return None if own is None else bool(own)


def check_row(row: Mapping[str, Any], name: str = "the row", *, asked: bool = True) -> None:
    """Refuse a row that could not be written or read.

    Args:
        row: with `context`, `queries` and `targets`.
        name: how to call the row in a message.
        asked: whether its queries are; otherwise its context is all that is looked at.

    Raises:
        ValueError: a column is missing, the context holds no text, a target is empty, there are not as many targets,
            quotes or answers as queries, or the answers of one are not a list of texts, or one of them is no text.
    """
    for column in FEATURES if asked else ("context",):
        if column not in row:
            raise ValueError(
                f"{name} has no column {column!r}, only {sorted(row)}. Trainer drops columns that forward does not "
                "name: set remove_unused_columns=False."
            )
    context = row["context"]
    if not isinstance(context, str | None):
        _check_texts(context, "context", name)
    if context is None or not context_text(context):
        raise ValueError(f"The context of {name} is empty: {context!r}.")
    if asked:
        _check_queries(row, name)


def _check_queries(row: Mapping[str, Any], name: str) -> None:
    queries, targets = row["queries"], row["targets"]
    if isinstance(queries, str) or isinstance(targets, str):
        raise ValueError(f"queries and targets of {name} must be lists of texts, got {queries!r} and {targets!r}.")
    _check_texts(queries, "queries", name)
    _check_texts(targets, "targets", name)
    if len(queries) != len(targets) or not queries:
        raise ValueError(
            f"{name} has {len(queries)} queries and {len(targets)} targets; it needs as many, and one at least."
        )
    quotes, answers = row.get("quotes"), row.get("answers") or None
    for what, given in (("quotes", quotes), ("answers", answers)):
        if given is not None and len(given) != len(queries):
            raise ValueError(
                f"{name} has {len(queries)} queries and {len(given)} {what}; it needs as many, or no {what}."
            )
    for accepted in answers or ():
        if not isinstance(accepted, list | tuple) or not all(isinstance(text, str) for text in accepted):
            raise ValueError(
                f"answers of {name} must hold a list of accepted texts for each query, got {accepted!r} for one. Put a "
                "single answer into a list of its own."
            )
    for query, target in zip(queries, targets, strict=True):
        if not target:
            raise ValueError(f"The target of query {query!r} in {name} is empty.")


def _check_texts(texts: Sequence[Any], what: str, name: str) -> None:
    for text in texts:
        if not isinstance(text, str):
            raise ValueError(f"The {what} of {name} must be texts, got {text!r} among them.")


def with_lists(row: Mapping[str, Any]) -> dict[str, Any]:
    """The row with lists where it has arrays, as pandas reads columns of lists."""
    return {name: _as_list(value) for name, value in row.items()}


def _as_list(value: Any) -> Any:
    listed = value.tolist() if isinstance(value, np.ndarray) else value
    return [_as_list(each) for each in listed] if isinstance(listed, list) else listed


def checked(rows: Iterable[dict[str, Any]], source: str) -> Iterator[dict[str, Any]]:
    """The rows themselves, each checked; `source` names them in a message."""
    for index, row in enumerate(rows):
        check_row(row, f"row {index} of {source}")
        yield row
