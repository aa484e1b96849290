"""A file of JSON, on lines or in one list, as a table whose values are what the file says."""

import json
from array import array
from decimal import Decimal
from pathlib import Path
from typing import Any


class JsonLines:
    """The objects on the lines of a file, of which a line may have other fields, and of other kinds, than the next.

    `datasets` would make one kind of each column, by which the id "007" beside the id 8 became "7". The file is gone
    through once, to find its lines and what cannot be read; rows are then read as they are asked for, by slices.
    Numbers with a fraction are `Decimal`, which keeps their digits. Blank lines are passed over.

    Args:
        path: the file.

    Attributes:
        column_names: the fields of all lines.

    Raises:
        OSError: the file cannot be read.
        ValueError: a line is not an object in JSON, or there is none.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._starts = array("Q")  # where the lines begin, and on which line of the file that is
        self._numbers = array("Q")
        names: dict[str, None] = {}
        start = 0
        with path.open("rb") as file:
            for number, line in enumerate(file, 1):
                if line.strip(b"\xef\xbb\xbf \t\r\n"):
                    self._starts.append(start)
                    self._numbers.append(number)
                    names |= dict.fromkeys(self._row(line, number))
                start += len(line)
        if not self._starts:
            raise ValueError(f"{path} has no rows: there is nothing to write.")
        self.column_names = list(names)

    def __len__(self) -> int:
        return len(self._starts)

    def __getitem__(self, part: slice) -> dict[str, list[Any]]:
        """The columns of some rows that follow each other; `None` where a row has no such field."""
        rows = []
        with self._path.open("rb") as file:
            for place in range(len(self))[part]:
                file.seek(self._starts[place])
                rows.append(self._row(file.readline(), self._numbers[place]))
        return {name: [row.get(name) for row in rows] for name in self.column_names}

    def _row(self, line: bytes, number: int) -> dict[str, Any]:
        where = f"line {number} of {self._path}"
        row = _parsed(line, where, "Each line holds one object.")
        if not isinstance(row, dict):
            raise ValueError(f"{where} must be an object with a context, got {line.strip()[:60]!r}.")
        return row


class JsonArray:
    """The objects of a file that holds a list of them; otherwise as [`JsonLines`], which takes larger files."""

    def __init__(self, path: Path) -> None:
        self._rows = _parsed(path.read_bytes(), str(path), "It holds a list of objects, or one on each line.")
        if not isinstance(self._rows, list) or not all(isinstance(row, dict) for row in self._rows):
            raise ValueError(f"{path} must hold a list of objects, each with a context.")
        if not self._rows:
            raise ValueError(f"{path} has no rows: there is nothing to write.")
        self.column_names = list(dict.fromkeys(name for row in self._rows for name in row))

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, part: slice) -> dict[str, list[Any]]:
        return {name: [row.get(name) for row in self._rows[part]] for name in self.column_names}


def open_json(path: Path) -> JsonLines | JsonArray:
    """The rows of a file of either kind, by what it begins with."""
    with path.open("rb") as file:
        begins = file.read(1024).lstrip(b"\xef\xbb\xbf \t\r\n")
    return JsonArray(path) if begins.startswith(b"[") else JsonLines(path)


def _parsed(text: bytes, where: str, expected: str) -> Any:
    try:
        found = json.loads(text.decode("utf-8-sig"), parse_float=Decimal)
        if b"\\u" in text:  # half of a surrogate pair could not be saved
            json.dumps(found, ensure_ascii=False, default=str).encode()
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{where} is not JSON in UTF-8 ({error}). {expected}") from error
    return found
