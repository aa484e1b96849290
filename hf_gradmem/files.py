"""Files that appear whole or not at all."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from safetensors.torch import save_file


@contextmanager
def whole_file(path: str | os.PathLike) -> Iterator[Path]:
    """A name to write a file under, with the same ending; `path` itself appears when the block is done, or not at all.

    Raises:
        OSError: the file cannot be written there.
    """
    path = Path(path)
    check_writable(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_name(f".{os.getpid()}.{path.name}")
    try:
        yield unfinished
        unfinished.replace(path)
    finally:
        unfinished.unlink(missing_ok=True)


def save_tensors(tensors: dict[str, torch.Tensor], path: str | os.PathLike, metadata: dict[str, str]) -> None:
    """Write a whole safetensors file."""
    on_cpu = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    with whole_file(path) as unfinished:
        save_file(on_cpu, unfinished, metadata=metadata)


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
