"""The memories that a server has: those of a store, which stays as it is, and those that clients write."""

import os
import re
import threading
import warnings
from contextlib import suppress
from pathlib import Path
from urllib.parse import quote, unquote

from safetensors import SafetensorError, safe_open
from transformers.utils import CONFIG_NAME

from ..hub.client import FACTS_FILE, MEMORY_FILE
from ..memory.store import MemoryStore
from ..memory.written import GradMemMemory

_ID = re.compile(r"[A-Za-z0-9][A-Za-z0-9 ._:/-]{0,99}")  # which quoting makes the name of a folder, and never ".."
_LONGEST_NAME = 240  # of a folder as it is quoted; systems take 255, of which a name for a trial has a few more


class Shelf:
    """Memories by id.

    Args:
        store: that is read from, *optional*.
        folder: where what clients write is kept, a folder for each; kept while the server runs when `None`. A file in
            it that is no memory of one context is left out, with a warning.
        max_memories: most that clients may write.

    Raises:
        OSError: the folder cannot be made.
        ValueError: a memory in the folder has the id of another one there or of one of the store's, or the folder is a
            store's or a model's.
    """

    def __init__(self, store: MemoryStore | None, folder: Path | None, max_memories: int) -> None:
        self._store, self._folder, self._max = store, folder, max_memories
        self._here: dict[str, GradMemMemory] = {}
        self._lock = threading.Lock()
        self._written: dict[str, Path | None] = {}  # and where each lies, which a folder put there by hand says itself
        if folder is not None:
            _refuse_taken(folder)
            folder.mkdir(parents=True, exist_ok=True)
            # A folder whose memory was not written to its end has no name that counts.
            found = filter(_holds_one_context, sorted(folder.glob(f"*/{MEMORY_FILE}")))
            for place in (path.parent for path in found):
                other = self._written.setdefault(unquote(place.name), place)
                if other != place:
                    raise ValueError(f"{other} and {place} hold memories of one id. Move one of these folders away.")
        self._refuse_two_of_one_id()

    def __len__(self) -> int:
        return len(self.ids())

    def ids(self) -> list[str]:
        """Of all memories: those of the store, then those that were written, sorted."""
        with self._lock:
            return [*(self._store.ids if self._store is not None else ()), *sorted(self._written)]

    def __getitem__(self, name: str) -> GradMemMemory:
        """One memory.

        Raises:
            KeyError: there is none of that id.
        """
        with self._lock:
            if name in self._here:
                return self._here[name]
            if (place := self._written.get(name)) is not None:
                return GradMemMemory.from_pretrained(place)
            if self._store is not None and name in self._store:
                return self._store[name]
        raise KeyError(name)

    def check_id(self, name: str) -> None:
        """Refuse what is no id.

        Raises:
            ValueError: it has another form, or is too long for the name of a folder.
        """
        if not _ID.fullmatch(name):
            raise ValueError(
                f"An id has 1 to 100 letters, digits, blanks and . _ : / -, and begins with a letter or digit, got "
                f"{name!r}."
            )
        if {".", ".."} & set(name.split("/")):  # which clients leave out of an address: it would be another's
            raise ValueError(f"An id has no part . or .. between its slashes, got {name!r}.")
        length = len(quote(name, safe=""))
        if self._folder is not None and length > _LONGEST_NAME:
            raise ValueError(
                f"The id {name!r} would name a folder with {length} characters, each blank, : and / as three of them; "
                f"{_LONGEST_NAME} fit. Give a shorter id."
            )

    def check_new(self, name: str) -> None:
        """Refuse an id before anything is written.

        Raises:
            ValueError: as [`check_id`]; it is taken, also by something else on disk, or there is no room.
        """
        with self._lock:
            self._check(name)

    def add(self, name: str, memory: GradMemMemory) -> None:
        """Keep what was written.

        Raises:
            OSError: it cannot be written to disk.
            ValueError: as [`check_new`].
        """
        with self._lock:
            self._check(name)  # anew: another one may have been as fast
            place = self._place(name)
            if place is None:
                self._here[name] = memory
            else:
                memory.save_pretrained(place)
            self._written[name] = place

    def delete(self, name: str) -> None:
        """Forget a memory that was written here. What else lies in its folder stays.

        Raises:
            KeyError: there is none of that id.
            OSError: it cannot be removed from disk.
            ValueError: it belongs to the store.
        """
        with self._lock:
            if name not in self._written:
                if self._store is not None and name in self._store:
                    raise ValueError(f"The memory {name!r} belongs to the store that is served, which stays as it is.")
                raise KeyError(name)
            if (place := self._written[name]) is not None:
                _remove(place)
            self._here.pop(name, None)
            del self._written[name]

    def _refuse_two_of_one_id(self) -> None:
        """The store may have got an id since a client took it: neither memory may stand for the other."""
        twice = [] if self._store is None else [name for name in sorted(self._written) if name in self._store]
        if twice:
            more = f", and {len(twice) - 1} more of its ids are taken" if len(twice) > 1 else ""
            raise ValueError(
                f"The store has a memory {twice[0]!r}, and {self._written[twice[0]]} holds another one of that id"
                f"{more}. Move that folder away or rename it, or keep what clients write in a folder of its own."
            )

    def _place(self, name: str) -> Path | None:
        """The folder of what is written under an id."""
        return None if self._folder is None else self._folder / quote(name, safe="")

    def _check(self, name: str) -> None:
        self.check_id(name)
        if name in self._written or (self._store is not None and name in self._store):
            raise ValueError(f"There is a memory {name!r} already. Delete it first, or take another id.")
        if (place := self._place(name)) is not None and not _is_free(place):
            raise ValueError(
                f"Where a memory {name!r} would be kept lies something else. Take another id, or have whoever runs the "
                "server move it away."
            )
        if len(self._written) >= self._max:
            raise ValueError(f"There is no room: {self._max} memories were written. Delete some.")


def _refuse_taken(folder: Path) -> None:
    """The folders of memories would stand among a store's shards, or a model's weights."""
    folder = folder.resolve()
    taken = [(place, FACTS_FILE, "store") for place in (folder, *folder.parents)] + [(folder, CONFIG_NAME, "model")]
    for place, name, kind in taken:
        if os.path.isfile(place / name):
            raise ValueError(
                f"{folder} cannot keep what clients write: {place} is the folder of a {kind}, with a {name}. Give a "
                "folder of its own."
            )


def _holds_one_context(path: Path) -> bool:
    """Whether a file can be served; who put one there by hand that cannot is warned. Its header alone is read."""
    try:
        with safe_open(path, framework="pt") as file:
            count = next(iter(file.get_slice("embeddings").get_shape()), 0)
    except (OSError, SafetensorError) as error:
        warnings.warn(
            f"{path} is left out: it cannot be read as a memory ({error}). Was it copied whole?", stacklevel=2
        )
        return False
    if count != 1:
        warnings.warn(
            f"{path} is left out: it holds the memories of {count} contexts, and one is served under an id. Save each "
            "of them, memory[0] and so on, in a folder of its own.",
            stacklevel=2,
        )
    return count == 1


def _is_free(place: Path) -> bool:
    """Whether a memory may be kept there: nothing is, or no more than a write that was killed leaves."""
    if not os.path.lexists(place):
        return True
    if place.is_symlink() or not place.is_dir():
        return False
    return all(left.name.startswith(".") and left.name.endswith(f".{MEMORY_FILE}") for left in place.iterdir())


def _remove(place: Path) -> None:
    """Remove a memory, and nothing else: a link but not what it points to, and a folder if nothing is left in it."""
    if place.is_symlink():
        place.unlink()
        return
    (place / MEMORY_FILE).unlink(missing_ok=True)
    with suppress(OSError):  # something else lies there
        place.rmdir()
