"""Files of results that appear whole or not at all."""

import os
from collections.abc import Callable
from pathlib import Path


def write_whole(path: str | os.PathLike, write: Callable[[Path], object]) -> None:
    """Have `write` fill a file of another name with the same ending, then give it its own; its directory is made.

    Raises:
        OSError: the file cannot be written there.
    """
    path = Path(path)
    check_writable(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_name(f".{os.getpid()}.{path.name}")
    try:
        write(unfinished)
        unfinished.replace(path)
    finally:
        unfinished.unlink(missing_ok=True)


def check_writable(path: str | os.PathLike) -> None:
    """Refuse a path that no file can be written to, before minutes go into what it is to hold.

    Raises:
        IsADirectoryError: it is a directory.
        NotADirectoryError: it would lie below a file.
    """
    path = Path(path)
    if path.is_dir():
        raise IsADirectoryError(f"{path} is a directory. Give the name of a file in it.")
    for parent in path.parents:
        if parent.exists():
            if not parent.is_dir():
                raise NotADirectoryError(f"{path} cannot be written: {parent} is a file.")
            return
