"""Rows of your own, as JSON lines: one row on each line, a context and what is asked about it.

    {"context": "Gate 7 opens at noon.", "question": "When does gate 7 open?", "answer": "noon"}
    {"context": "...", "queries": ["Who?", "When?"], "answers": [["Selma", "Selma Quill"], ["at noon"]]}
    {"segments": ["!a:7!", "!b:Q!"], "queries": ["?!a:"], "targets": ["7!"], "document": "a"}

| field | what it holds |
|---|---|
| `context` or `segments` | the context: a text, or the list of its segments |
| `queries`, or `question` | what is asked: a list of texts, or one text |
| `targets` | for each query what is trained on, as it stands, so with the space that parts it from its query |
| `answers` | for each query a list of the answers that are accepted, or one; the first is trained on, behind a space |
| `answer` | in place of both, beside `question`: one text; `answers` beside it is a list of accepted texts |
| `quotes`, or `quote` | optional: the part of the context that tells each answer, as a list or beside one `question` |
| `add_end_token` | optional: `false` where the targets are running text, which goes on behind them |
| `document` | optional: rows of one document stay on one side of training and validation |

Where a row has both `targets` and `answers`, as the saved rows of another task do, the targets are trained on and the
answers are accepted. Other fields are passed over. Answers are scored as in SQuAD: exact match and F1 against the best
accepted answer.
"""

import json
import os
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from datasets import Dataset, Features

from ..texts.reading import check_unicode, read_text
from .rows import FEATURES_OF_TEXT, FEATURES_WITH_ANSWERS, SPLITS, check_split
from .sources import take_evenly, take_split
from .task import Task

Paths = str | os.PathLike | Sequence[str | os.PathLike]


def load(
    split: str = "train",
    *,
    path: Paths | Mapping[str, Paths] | None = None,
    document: str = "document",
    num_contexts: int | None = None,
    validation_share: float = 0.1,
) -> Dataset:
    """The rows of one or several files of JSON lines, in their order.

    Args:
        split: of files that are not said to be a split, `"train"` and `"validation"` share the documents between them,
            and `"test"` is all of them.
        path: a file, a list of files, or `{"train": ..., "validation": ..., "test": ...}`, each one or a list: then a
            split is all rows of its files.
        document: the field that says which document a context is of. Rows without it are of one document if they have
            the same context, so that no context is on both sides.
        num_contexts: how many of the split's rows to take, spread evenly over it; all of them when `None`.
        validation_share: share of the documents that are the validation part.

    Raises:
        OSError: a file cannot be read.
        ValueError: a line is no row: names the file, the line and the field; or an argument is out of range.
    """
    check_split(split)
    files, is_split = _files(path, split)
    found = [row for file in files for row in _read(file, document)]
    source = ", ".join(str(file) for file in files)
    if not found:
        raise ValueError(f"{source} holds no row.")
    if not is_split:
        documents: dict[str, None] = dict.fromkeys(of for of, _ in found)
        here = set(take_split(list(documents), split, validation_share))
        found = [(of, row) for of, row in found if of in here]
    rows = take_evenly([row for _, row in found], num_contexts, source)
    if any("add_end_token" in row for row in rows):
        completed = [{"add_end_token": True} | row for row in rows]
        return Dataset.from_list(completed, features=Features({**FEATURES_WITH_ANSWERS, **FEATURES_OF_TEXT}))
    return Dataset.from_list(list(rows), features=FEATURES_WITH_ANSWERS)


def _files(path: Any, split: str) -> tuple[list[str | os.PathLike], bool]:
    """The files to read, and whether they are those of the split alone."""
    is_split = isinstance(path, Mapping)
    if is_split:
        unknown = sorted(map(str, set(path) - set(SPLITS)))
        if unknown:
            raise ValueError(f"path names {', '.join(unknown)}, which is no split. The splits are {', '.join(SPLITS)}.")
        if split not in path:
            raise ValueError(f"path names files for {', '.join(path) or 'no split'}, and none for {split!r}.")
        path = path[split]
    files = [path] if isinstance(path, str | os.PathLike) else path
    if not isinstance(files, Sequence) or not files or not all(isinstance(file, str | os.PathLike) for file in files):
        raise ValueError(f"path must be a file, a list of files, or such for each split, got {path!r}.")
    return list(files), is_split


def _read(file: str | os.PathLike, document: str) -> Iterator[tuple[str, dict[str, Any]]]:
    """The rows of a file, each with what it is a document of."""
    for number, line in enumerate(read_text(file).split("\n"), start=1):
        if not line.strip():
            continue
        where = f"{os.fspath(file)}, line {number}"
        try:
            given = json.loads(line)
        except (json.JSONDecodeError, RecursionError) as error:
            raise ValueError(f"{where} is not JSON: {error}. Each line holds one row.") from error
        if not isinstance(given, dict):
            raise ValueError(f"{where} must be an object with context and queries, got {_shown(given)}.")
        row = _row({name: value for name, value in given.items() if value is not None}, where)
        named = given.get(document)
        yield json.dumps(["".join(row["context"])] if named is None else named, sort_keys=True), row


def _row(given: dict[str, Any], where: str) -> dict[str, Any]:
    queries, targets, answers = _asked(given, where)
    asked = {"queries": queries, "targets": targets, "answers": answers, "quotes": _quotes(given, len(queries), where)}
    row = {"context": _context(given, where), **asked}
    if "add_end_token" in given:
        row["add_end_token"] = ends = given["add_end_token"]
        if not isinstance(ends, bool):
            raise ValueError(f"{where}, field 'add_end_token' must be true or false, got {_shown(ends)}.")
    return row


def _context(given: dict[str, Any], where: str) -> list[str]:
    name = _one_of(given, ("context", "segments"), where)
    value = given[name]
    segments = [value] if isinstance(value, str) and name == "context" else value
    _check_texts(segments, f"{where}, field {name!r}", "a text or a list of texts" if name == "context" else None)
    if not "".join(segments).strip():
        raise ValueError(f"{where}, field {name!r} is empty: there is nothing to write.")
    return segments


def _asked(given: dict[str, Any], where: str) -> tuple[list[str], list[str], list[list[str]]]:
    """Queries, and for each its target and its accepted answers."""
    name = _one_of(given, ("queries", "question"), where)
    queries = given[name]
    if name == "question":
        if not isinstance(queries, str):
            raise ValueError(f"{where}, field 'question' must be a text, got {_shown(queries)}. A list is 'queries'.")
        queries = [queries]
        given = _as_lists(given, where)
    _check_texts(queries, f"{where}, field 'queries'")
    if not queries:
        raise ValueError(f"{where}, field 'queries' is empty: a row needs one at least.")
    given_targets, given_answers = given.get("targets"), given.get("answers")
    if given_targets is None and given_answers is None:
        raise ValueError(f"{where} has no field 'answers' or 'targets', only {', '.join(given)}.")
    answers = [] if given_answers is None else _accepted(given_answers, len(queries), where)
    if given_targets is None:
        return queries, [_behind_a_space(accepted[0]) for accepted in answers], answers
    _check_texts(given_targets, f"{where}, field 'targets'")
    _check_count("targets", given_targets, len(queries), where)
    for number, target in enumerate(given_targets):
        if not target.strip():
            raise ValueError(f"{where}, field 'targets' is empty at {number}.")
    return queries, given_targets, answers or [[target.strip()] for target in given_targets]


def _quotes(given: dict[str, Any], count: int, where: str) -> list[str]:
    """What to quote for each query."""
    quotes = given.get("quotes", [""] * count)
    if "quote" in given:
        if "question" not in given or "quotes" in given:
            raise ValueError(f"{where}, field 'quote' goes with 'question', and without 'quotes'.")
        quotes = [given["quote"]]
    _check_texts(quotes, f"{where}, field 'quotes'")
    _check_count("quotes", quotes, count, where)
    return [quote.strip() for quote in quotes]


def _as_lists(given: dict[str, Any], where: str) -> dict[str, Any]:
    """What stands beside a single question, as it would stand beside a list of one."""
    if "targets" in given:
        raise ValueError(f"{where}, field 'targets' goes with 'queries'. Beside 'question' give 'answer' or 'answers'.")
    name = _one_of(given, ("answer", "answers"), where)
    value = given[name]
    if name == "answer" and not isinstance(value, str):
        raise ValueError(f"{where}, field 'answer' must be a text, got {_shown(value)}. A list is 'answers'.")
    return {**given, "answers": [value]}


def _accepted(given: Any, count: int, where: str) -> list[list[str]]:
    place = f"{where}, field 'answers'"
    if not isinstance(given, list):
        raise ValueError(f"{place} must be a list with the accepted answers of each query, got {_shown(given)}.")
    _check_count("answers", given, count, where)
    answers = [[of_one] if isinstance(of_one, str) else of_one for of_one in given]
    for number, accepted in enumerate(answers):
        _check_texts(accepted, f"{place} at {number}", "a text or a list of texts")
        if not accepted or not all(text.strip() for text in accepted):
            raise ValueError(f"{place} at {number} has no answer or an empty one: {accepted!r}.")
    return answers


def _behind_a_space(answer: str) -> str:
    return answer if answer[0].isspace() else f" {answer}"


def _one_of(given: dict[str, Any], names: tuple[str, str], where: str) -> str:
    """Which of two fields a row has."""
    found = [name for name in names if name in given]
    if len(found) != 1:
        fields = " and ".join(map(repr, names)) if found else " or ".join(map(repr, names))
        had = f"both fields {fields}, of which it needs one" if found else f"no field {fields}, only {', '.join(given)}"
        raise ValueError(f"{where} has {had}.")
    return found[0]


def _check_texts(value: Any, place: str, expected: str | None = None) -> None:
    if not isinstance(value, list) or not all(isinstance(text, str) for text in value):
        raise ValueError(f"{place} must be {expected or 'a list of texts'}, got {_shown(value)}.")
    for text in value:
        check_unicode(text, place)


def _check_count(name: str, values: list[Any], count: int, where: str) -> None:
    if len(values) != count:
        raise ValueError(f"{where}, field {name!r} has {len(values)} entries for {count} queries: each needs its own.")


def _shown(value: Any) -> str:
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 60 else f"{text[:60]}…"


TASK = Task(load, metric="squad")
