"""The rows that `hf-gradmem write-dataset` writes: read from files or the Hub, each with an id and a context."""

import csv
import os
from decimal import Decimal
from pathlib import Path
from typing import Any

from datasets import Dataset, Features, Value, load_dataset
from datasets.exceptions import DatasetGenerationError

from ..files import literal_paths
from ..memory.silence import silent_errors
from .json_lines import JsonArray, JsonLines, open_json
from .rows import Rows
from .text_folder import TextFolder

_BUILDERS = {".jsonl": "json", ".json": "json", ".csv": "csv", ".parquet": "parquet"}
CONTEXT_COLUMN = "context"
"""The column that contexts are in unless another is named; in rows without one there, `"segments"`."""
_CONTEXTS = (CONTEXT_COLUMN, "segments")


def load_source(name: str, split: str = "train") -> Dataset | JsonLines | JsonArray | TextFolder:
    """What a JSON-lines, CSV or Parquet file, a folder of text files, or a data set on the Hub gives to write.

    Args:
        name: the file, by its extension; the folder, of `.txt` and `.md` files; or the Hub repository.
        split: which part of a Hub data set.

    Raises:
        OSError: there is no such file, folder or data set.
        ValueError: the file cannot be read as what its extension says or has no rows, the folder holds no text, or
            there is no such split.
    """
    path = Path(os.path.expanduser(name))
    if path.is_dir():
        return TextFolder(path)
    suffix = path.suffix.lower()
    if suffix in _BUILDERS:
        if not path.is_file():
            raise FileNotFoundError(f"There is no file {name!r}.")
        if suffix == ".jsonl":
            return JsonLines(path)
        if suffix == ".json":
            return open_json(path)
        try:
            with silent_errors():
                files = literal_paths([path])
                return load_dataset(_BUILDERS[suffix], data_files=files, split="train", **_as_text(path))
        except (DatasetGenerationError, ValueError, StopIteration, csv.Error) as error:
            if isinstance(error, StopIteration) or "corresponds to no data" in str(error):  # which tell nobody more
                raise ValueError(f"{name} has no rows: there is nothing to write.") from error
            raise ValueError(f"{name} cannot be read as {_BUILDERS[suffix]}: {error.__cause__ or error}") from error
    if path.exists():
        raise ValueError(
            f"{name} is none of {', '.join(_BUILDERS)}, nor a folder of text files or a data set on the Hub. A single "
            "text is written by `hf-gradmem write --file`."
        )
    return load_dataset(name, split=split)


def _as_text(path: Path) -> dict[str, Any]:
    """What has a CSV file read as it stands: 007 is no number, and NA is a text.

    Raises:
        ValueError: a row has more fields than the header, of which the reader would make other columns.
    """
    if path.suffix.lower() != ".csv":
        return {}
    longest = csv.field_size_limit(2**31 - 1)  # a context may be a book
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            lines = csv.reader(file)
            header = next(fields for fields in lines if fields)
            if twice := sorted({name for name in header if header.count(name) > 1}):
                raise ValueError(f"the header names {', '.join(map(repr, twice))} more than once.")
            for fields in lines:
                if len(fields) > len(header):
                    raise ValueError(
                        f"line {lines.line_num} has {len(fields)} fields, and the header {len(header)}. Put a text "
                        "with a comma in it into double quotes."
                    )
    finally:
        csv.field_size_limit(longest)
    columns = [name or f"Unnamed: {place}" for place, name in enumerate(header)]  # as the reader names them
    return {"features": Features({name: Value("string") for name in columns}), "keep_default_na": False}


class DatasetRows(Rows):
    """Ids and contexts of a data set, read from disk as they are asked for.

    Args:
        dataset: a row for each context.
        context_column: where the contexts are: texts, or lists of texts. By default `"context"`, and `"segments"` in
            rows that have none there.
        id_column: where the ids are; `"id"` where there is such a column, else a row's number is its id.

    Raises:
        ValueError: a column is missing, or there are no rows.
    """

    def __init__(self, dataset: Dataset | JsonLines | JsonArray, context_column: str, id_column: str | None) -> None:
        given = _CONTEXTS if context_column == CONTEXT_COLUMN else (context_column,)
        self._contexts = [column for column in given if column in dataset.column_names]
        missing = [] if self._contexts else [context_column]
        missing += [] if id_column is None or id_column in dataset.column_names else [id_column]
        if missing:
            raise ValueError(f"There is no column {missing[0]!r}. The columns are {', '.join(dataset.column_names)}.")
        if not len(dataset):
            raise ValueError("There is nothing to write: the source has no rows.")
        if id_column is None and "id" in dataset.column_names:
            id_column = "id"
        self.context_column, self.id_column = context_column, id_column
        self._rows = self._columns(dataset) if isinstance(dataset, Dataset) else dataset

    def _columns(self, dataset: Dataset) -> Dataset:
        """What is read of a data set, whose ids must not have been taken for dates."""
        id_column = self.id_column
        kind = None if id_column is None else getattr(dataset.features[id_column], "dtype", None)
        if kind is not None and kind.startswith(("timestamp", "date", "time")):
            raise ValueError(
                f"The ids in the column {id_column!r} were read as dates ({kind}): as texts they would not be what the "
                "file says. Give ids of another form, such as with a letter before."
            )
        columns = [*self._contexts, *([] if id_column is None else [id_column])]
        return dataset.with_format(None).select_columns(list(dict.fromkeys(columns)))

    def __len__(self) -> int:
        return len(self._rows)

    def read(self, numbers: range) -> tuple[list[str], list[str | list[str]]]:
        """Ids and contexts of some rows.

        Raises:
            ValueError: a row has no id, or one that is neither text nor number, or its context is not a text or a list
                of texts, each of which says something.
        """
        part = self._rows[numbers.start : numbers.stop]
        columns = zip(*(part[column] for column in self._contexts), strict=True)
        contexts: list[Any] = [next((held for held in row if held is not None), None) for row in columns]
        ids = list(numbers) if self.id_column is None else part[self.id_column]
        for number, name, context in zip(numbers, ids, contexts, strict=True):
            if name is None or name == "":
                raise ValueError(f"Row {number} has no id: column {self.id_column!r} is empty there.")
            if isinstance(name, bool) or not isinstance(name, str | int | float | Decimal) or name != name:  # NaN
                raise ValueError(f"The id of row {number} must be a text or a number, got {name!r}.")
            segments = [context] if isinstance(context, str) else context
            if not isinstance(segments, list) or not all(isinstance(segment, str) for segment in segments):
                where = " or ".join(map(repr, self._contexts))
                raise ValueError(
                    f"Row {number} (id {str(name)!r}) has no context: column {where} holds {context!r}, which is "
                    "neither a text nor a list of texts."
                )
            if not segments or not all(segment.strip() for segment in segments):
                raise ValueError(
                    f"Row {number} (id {str(name)!r}) has a context that is blank, or a blank segment in it: "
                    f"{context!r}. There is nothing to write. Leave it out."
                )
        return list(map(str, ids)), contexts
