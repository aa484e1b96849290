"""The text files of a folder as contexts, each under its path: notes, documentation, books."""

import os
from collections.abc import Iterator
from pathlib import Path

from ..texts.reading import SUFFIXES, read_context, read_text
from .rows import Rows

_NAMED_AT_ONCE = 3


class TextFolder(Rows):
    """The `.txt` and `.md` files below a folder, in the order of their paths, which are their ids.

    Paths are relative to the folder, with `/` on every system. Hidden files and folders, whose names begin with a dot,
    are left out. Each file is read once to find out whether it can be, and again when it is written: a folder may hold
    more than the working memory.

    Args:
        path: the folder.

    Attributes:
        ids: of the files that can be read.
        skipped: why each of the others cannot: it is no text in UTF-8, or the system refuses it; and links to folders,
            which are not followed.

    Raises:
        OSError: there is no such folder.
        ValueError: a file is blank, or there is none that can be read.
    """

    at_a_time = 32

    def __init__(self, path: str | os.PathLike) -> None:
        self.path = Path(os.path.expanduser(path)).absolute()  # below which a name may begin with ~
        if not self.path.is_dir():
            raise NotADirectoryError(f"There is no folder {str(path)!r}.")
        self.skipped: dict[str, str] = {}
        self.ids: list[str] = []
        blank = []
        for name in sorted(self._names()):
            try:
                name.encode()
                text = read_text(self._file(name))
            except (OSError, ValueError) as error:
                self.skipped[_printable(name)] = _reason(error)
                continue
            self.ids.append(name)
            if not text.strip():
                blank.append(name)
        if blank:
            more = f" and {len(blank) - _NAMED_AT_ONCE} more" if len(blank) > _NAMED_AT_ONCE else ""
            raise ValueError(
                f"In {path}, {', '.join(blank[:_NAMED_AT_ONCE])}{more} {'is' if len(blank) == 1 else 'are'} blank: "
                "there is nothing in there to write. Fill or remove such files."
            )
        if not self.ids:
            kinds = " or ".join(SUFFIXES)
            told = "".join(f" {name}: {why}." for name, why in self.skipped.items())
            raise ValueError(f"There is nothing to write: {path} holds no {kinds} file that can be read.{told}")

    def __len__(self) -> int:
        return len(self.ids)

    def read(self, numbers: range) -> tuple[list[str], list[str | list[str]]]:
        """Ids and texts of some files.

        Raises:
            OSError: one of them is no longer there.
            ValueError: one is no longer text.
        """
        names = self.ids[numbers.start : numbers.stop]
        return names, [read_context(self.path / name) for name in names]

    def _names(self) -> Iterator[str]:
        for folder, below, files in os.walk(self.path, onerror=self._skip):
            below[:] = [name for name in below if not name.startswith(".")]
            for name in below:
                if os.path.islink(os.path.join(folder, name)):  # which is not followed: it may lead back to itself
                    self.skipped[_printable(self._below(folder, name))] = "a link to a folder"
            for name in files:
                if not name.startswith(".") and Path(name).suffix.lower() in SUFFIXES:
                    yield self._below(folder, name)

    def _below(self, folder: str, name: str) -> str:
        return (Path(folder) / name).relative_to(self.path).as_posix()

    def _skip(self, error: OSError) -> None:
        """A folder in the folder that cannot be looked into."""
        self.skipped[_printable(Path(error.filename).relative_to(self.path).as_posix())] = _reason(error)

    def _file(self, name: str) -> Path:
        path = self.path / name
        if path.exists() and not path.is_file():
            raise OSError(f"{path} is no file")  # a pipe would be waited for
        return path


def _printable(name: str) -> str:
    """A name of the system as text, whatever bytes it is."""
    return name.encode(errors="surrogateescape").decode(errors="replace")


def _reason(error: Exception) -> str:
    if isinstance(error, UnicodeEncodeError):
        return "its name is not UTF-8"
    if isinstance(error, OSError):
        return error.strerror or "not a file"
    return "not text in UTF-8"
