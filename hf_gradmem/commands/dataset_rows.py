"""The rows that `hf-gradmem write-dataset` writes: read from a file or the Hub, each with an id and a context."""

import hashlib
import json
from collections.abc import Iterator
from pathlib import Path

from datasets import Dataset, load_dataset
from datasets.exceptions import DatasetGenerationError

from ..memory.silence import silent_errors

_BUILDERS = {".jsonl": "json", ".json": "json", ".csv": "csv", ".parquet": "parquet"}
_ROWS_AT_A_TIME = 1000  # that are checked


def load_source(name: str, split: str = "train") -> Dataset:
    """The rows of a JSON-lines, CSV or Parquet file, by its extension, or of a data set on the Hub.

    Args:
        name: the file, or the Hub repository.
        split: which part of a Hub data set.

    Raises:
        OSError: there is no such file or data set.
        ValueError: the file cannot be read as what its extension says, or there is no such split.
    """
    path = Path(name).expanduser()
    if path.suffix in _BUILDERS:
        if not path.is_file():
            raise FileNotFoundError(f"There is no file {name!r}.")
        try:
            with silent_errors():
                return load_dataset(_BUILDERS[path.suffix], data_files=str(path), split="train")
        except (DatasetGenerationError, ValueError) as error:
            raise ValueError(
                f"{name} cannot be read as {_BUILDERS[path.suffix]}: {error.__cause__ or error}"
            ) from error
    if path.exists():
        raise ValueError(f"{name} is none of {', '.join(_BUILDERS)}, nor a data set on the Hub.")
    return load_dataset(name, split=split)


class DatasetRows:
    """Ids and contexts of a data set, read from disk as they are asked for.

    Args:
        dataset: a row for each context.
        context_column: where the contexts are: texts, or lists of texts.
        id_column: where the ids are; `"id"` where there is such a column, else a row's number is its id.

    Raises:
        ValueError: a column is missing, or there are no rows.
    """

    def __init__(self, dataset: Dataset, context_column: str, id_column: str | None) -> None:
        for column in (context_column, id_column):
            if column is not None and column not in dataset.column_names:
                raise ValueError(f"There is no column {column!r}. The columns are {', '.join(dataset.column_names)}.")
        if not len(dataset):
            raise ValueError("There is nothing to write: the source has no rows.")
        if id_column is None and "id" in dataset.column_names:
            id_column = "id"
        self.context_column, self.id_column = context_column, id_column
        columns = [context_column] if id_column is None else list(dict.fromkeys([context_column, id_column]))
        self._dataset = dataset.with_format(None).select_columns(columns)

    def __len__(self) -> int:
        return len(self._dataset)

    def read(self, numbers: range) -> tuple[list[str], list[str | list[str]]]:
        """Ids and contexts of some rows.

        Raises:
            ValueError: a row has no id, or its context is not a text or a list of texts.
        """
        part = self._dataset[numbers.start : numbers.stop]
        contexts = part[self.context_column]
        ids = list(numbers) if self.id_column is None else part[self.id_column]
        for number, name, context in zip(numbers, ids, contexts, strict=True):
            if name is None:
                raise ValueError(f"Row {number} has no id: column {self.id_column!r} is empty there.")
            segments = [context] if isinstance(context, str) else context
            if not isinstance(segments, list) or not all(isinstance(segment, str) for segment in segments):
                raise ValueError(
                    f"Row {number} (id {str(name)!r}) has no context: column {self.context_column!r} holds "
                    f"{context!r}, which is neither a text nor a list of texts."
                )
        return list(map(str, ids)), contexts

    def slices(self) -> Iterator[range]:
        """The numbers of all rows, so many at a time as are read at once."""
        for start in range(0, len(self), _ROWS_AT_A_TIME):
            yield range(start, min(start + _ROWS_AT_A_TIME, len(self)))

    def check_ids(self) -> str:
        """A hash of all rows, having checked them and that each id comes once.

        Raises:
            ValueError: an id comes twice.
        """
        digest = hashlib.sha256()
        seen: dict[str, int] = {}
        for numbers in self.slices():
            ids, contexts = self.read(numbers)
            for number, name, context in zip(numbers, ids, contexts, strict=True):
                if name in seen:
                    raise ValueError(
                        f"Rows {seen[name]} and {number} have the same id {name!r}. Ids must be unique: choose another "
                        "--id-column."
                    )
                seen[name] = number
                digest.update(json.dumps([name, context]).encode())
        return digest.hexdigest()
