"""A file of JSON lines as a table whose values are what the file says."""

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
        try:
            row = json.loads(line.decode("utf-8-sig"), parse_float=Decimal)
            if b"\\u" in line:  # half of a surrogate pair could not be saved
                json.dumps(row, ensure_ascii=False, default=str).encode()
        except (ValueError, RecursionError) as error:
            raise ValueError(f"{where} is not JSON in UTF-8 ({error}). Each line holds one object.") from error
        if not isinstance(row, dict):
            raise ValueError(f"{where} must be an object with a context, got {line.strip()[:60]!r}.")
        return row
