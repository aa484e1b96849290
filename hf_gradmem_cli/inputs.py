"""What commands are given: a context, one of several memories, a directory to write to."""

import sys
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from hf_gradmem import GradMemMemory


def read_context(text: str | None, file: Path | None) -> str:
    """The context from one of its three sources; the newlines that end a file or stdin are not part of it."""
    if text is not None and file is not None:
        raise ValueError("Give the context as an argument or as --file, and not both.")
    if text is None and file is None and sys.stdin.isatty():
        raise ValueError("There is no context: give it as an argument, as --file, or on stdin.")
    try:
        if file is not None:
            text = file.read_text(encoding="utf-8").rstrip("\n")
        elif text is None:
            text = sys.stdin.read().rstrip("\n")
    except UnicodeDecodeError as error:
        raise ValueError(f"{file or 'stdin'} is not UTF-8 text ({error}).") from error
    if not text:
        raise ValueError("The context is empty.")
    return text


def choose(memory: "GradMemMemory", index: int | None) -> "GradMemMemory":
    """One of the memories that were saved together."""
    if index is None and len(memory) > 1:
        raise ValueError(
            f"There are {len(memory)} memories here. Say with --index which to read: 0..{len(memory) - 1}."
        )
    if index is not None and not 0 <= index < len(memory):
        raise ValueError(f"--index must lie in 0..{len(memory) - 1}, got {index}.")
    return memory[index or 0]


def check_output(directory: Path, file: str | None = None) -> None:
    """Refuse an `--output` that cannot be written, or a file in it, before minutes go into what it is to hold."""
    from hf_gradmem.files import check_directory, check_writable

    check_directory(directory)
    if file is not None:
        check_writable(directory / file)
