"""What is written into a store of memories, wherever it comes from: ids, and a context for each."""

import hashlib
import json
import warnings
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from types import MappingProxyType


class Rows(ABC):
    """Ids and contexts, read as they are asked for, so that a source may be larger than the working memory.

    Attributes:
        context_column, id_column: where they are, if they are in columns.
        skipped: what else was to be written and cannot be: why, by its id.
        at_a_time: how many are checked at once.
    """

    context_column: str | None = None
    id_column: str | None = None
    skipped: Mapping[str, str] = MappingProxyType({})
    at_a_time = 1000

    @abstractmethod
    def __len__(self) -> int: ...

    @abstractmethod
    def read(self, numbers: range) -> tuple[list[str], list[str | list[str]]]:
        """Ids and contexts of some rows."""

    def warn_of_skipped(self) -> None:
        """Name what is skipped, and count it."""
        if self.skipped:
            told = "; ".join(f"{name} ({why})" for name, why in self.skipped.items())
            warnings.warn(f"Skipped {len(self.skipped)} of {len(self) + len(self.skipped)} files: {told}", stacklevel=1)

    def slices(self) -> Iterator[range]:
        """The numbers of all rows, so many at a time as are read at once."""
        for start in range(0, len(self), self.at_a_time):
            yield range(start, min(start + self.at_a_time, len(self)))

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
