"""Files that appear whole or not at all, and places that are looked at before anything is written to them."""

import glob
import os
import re
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import torch
from safetensors.torch import save_file

try:
    import fcntl
except ImportError:  # Windows, where directories have no locks
    fcntl = None  # type: ignore[assignment]

# How libraries that are written in Rust end a message of the system's.
_SYSTEM_ERROR = re.compile(r"\(os error (\d+)\)")


@contextmanager
def whole_file(path: str | os.PathLike) -> Iterator[Path]:
    """A name to write a file under, with the same ending; `path` itself appears when the block is done, or not at all.

    Others may read it as they may any new file, or the one that it replaces: safetensors' own files are for their
    owner alone. A link is replaced, and not what it points to, which may be a file of the Hub's cache.

    Raises:
        OSError: the file cannot be written there, or not to its end.
    """
    path = Path(path)
    check_writable(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = _beside(path)
    try:
        unfinished.touch()
        mode = (path if path.exists() else unfinished).stat().st_mode
        with system_errors(path):
            yield unfinished
        unfinished.chmod(mode)
        unfinished.replace(path)
    finally:
        unfinished.unlink(missing_ok=True)


def save_text(text: str, path: str | os.PathLike) -> None:
    """Write a whole text file."""
    with whole_file(path) as unfinished:
        unfinished.write_text(text, encoding="utf-8")


def save_tensors(tensors: dict[str, torch.Tensor], path: str | os.PathLike, metadata: dict[str, str]) -> None:
    """Write a whole safetensors file."""
    on_cpu = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    with whole_file(path) as unfinished:
        save_file(on_cpu, unfinished, metadata=metadata)


def literal_paths(paths: Iterable[str | os.PathLike]) -> list[str]:
    """Paths for a library that takes them for patterns: brackets and stars in a name are themselves."""
    return [glob.escape(os.fspath(path)) for path in paths]


@contextmanager
def system_errors(path: str | os.PathLike) -> Iterator[None]:
    """Raise an `OSError` where a library has an error of its own for what the system refused, such as a full disk."""
    try:
        yield
    except OSError:
        raise
    except Exception as error:
        number = _SYSTEM_ERROR.search(str(error))
        if number is None:
            raise
        raise OSError(int(number[1]), os.strerror(int(number[1])), os.fspath(path)) from error


@contextmanager
def only_writer(directory: str | os.PathLike, *, wait: bool) -> Iterator[None]:
    """Be the only process that writes to a directory, which exists, for a span. Nothing is left behind, even if killed.

    Args:
        directory: the place.
        wait: until another process is done, or else refuse.

    Raises:
        BlockingIOError: another process is writing there.
    """
    if fcntl is None:
        yield
        return
    handle = os.open(directory, os.O_RDONLY)
    try:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        except BlockingIOError as error:
            raise BlockingIOError(
                f"{os.fspath(directory)} is being written to by another process. Wait until it is done, or give "
                "another directory."
            ) from error
        except OSError:  # a file system without locks
            pass
        yield
    finally:
        os.close(handle)


def check_writable(path: str | os.PathLike) -> None:
    """Refuse a path that no file can be written to, before minutes go into what it is to hold.

    Raises:
        IsADirectoryError: it is a directory.
        NotADirectoryError: it would lie below a file.
        OSError: it is a device or a stream, or the system refuses a file there.
    """
    path = Path(path)
    if path.is_dir():
        raise IsADirectoryError(f"{path} is a directory. Give the name of a file in it.")
    if (path.exists() and not path.is_file()) or _is_stream(path):
        raise OSError(f"{path} is not a file that can be written anew. Give the name of another.")
    _try_to_write(path)


def _is_stream(path: Path) -> bool:
    """Whether it is a link to what a process has open, such as /dev/stdout, which may be a file for now."""
    for _ in range(40):  # as many links as Linux follows
        path = path.parent.resolve() / path.name
        if path.parts[1:2] == ("proc",):
            return True
        if not path.is_symlink():
            return False
        path = path.parent / path.readlink()
    return False


def check_directory(path: str | os.PathLike) -> None:
    """Refuse a directory that cannot be made, or in which no file can be written.

    Raises:
        NotADirectoryError: it is a file, or would lie below one.
        OSError: the system refuses a file there.
    """
    path = Path(path)
    if os.path.lexists(path) and not path.is_dir():
        raise NotADirectoryError(f"{path} is a file, not a directory.")
    _try_to_write(path, within=True)


def _try_to_write(path: Path, *, within: bool = False) -> None:
    """Write an empty file, and take it away, where `path`, or a file within it, would be, or as near as there are."""
    missing = path / "file" if within else path
    while not os.path.lexists(missing.parent):
        missing = missing.parent
    if not missing.parent.is_dir():
        raise NotADirectoryError(f"{path} cannot be written: {missing.parent} is a file.")
    trial = _beside(missing)
    try:
        trial.touch()
    except OSError as error:
        raise OSError(error.errno, f"{path} cannot be written ({error.strerror})") from error
    finally:
        with suppress(OSError):
            trial.unlink()


def _beside(path: Path) -> Path:
    return path.with_name(f".{os.getpid()}.{path.name}")
