"""What commands are given: a context, one of several memories, a directory to write to."""

import os
import sys
from collections.abc import Iterator, Sequence
from io import TextIOWrapper
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from hf_gradmem import GradMemMemory
    from hf_gradmem.commands.text_folder import TextFolder


def read_context(text: str | None, file: Path | None) -> str:
    """The context from one of its three sources; the newlines that end a file or stdin are not part of it."""
    from hf_gradmem.texts.reading import check_unicode
    from hf_gradmem.texts.reading import read_context as read_file

    if text is not None and file is not None:
        raise ValueError("Give the context as an argument or as --file, and not both.")
    if text is None and file is None and (sys.stdin is None or sys.stdin.isatty()):  # None: it is closed
        raise ValueError("There is no context: give it as an argument, as --file, or on stdin.")
    if file is not None:
        return read_file(file)
    if text is None:
        text = "".join(lines_of_stdin()).rstrip("\n")
    elif text.strip() and _is_a_place(text):
        raise ValueError(f"{text} is a file or folder here. Give it as --file to write what it holds.")
    check_unicode(text, "The context")
    if not text.strip():
        raise ValueError("The context is blank: there is nothing in it to write.")
    return text


def lines_of_stdin() -> Iterator[str]:
    """The lines of stdin as UTF-8 text without its byte order mark, whatever the system takes it for.

    Raises:
        ValueError: it is closed, or no such text.
    """
    if sys.stdin is None:
        raise ValueError("stdin is closed: there is nothing to read.")
    if isinstance(sys.stdin, TextIOWrapper):
        sys.stdin.reconfigure(encoding="utf-8-sig", errors="strict")
    try:
        yield from sys.stdin
    except UnicodeDecodeError as error:
        raise ValueError(f"stdin is not UTF-8 text ({error}).") from error


def read_contexts(text: str | None, file: Path | None) -> "tuple[list[str], TextFolder | None]":
    """The context from one of its sources, or the texts of a folder that is given as the file."""
    if file is None or text is not None or not file.is_dir():
        return [read_context(text, file)], None
    from hf_gradmem.commands.text_folder import TextFolder

    folder = TextFolder(file)
    folder.warn_of_skipped()
    _, texts = folder.read(range(len(folder)))
    return [text for text in texts if isinstance(text, str)], folder


def _is_a_place(text: str) -> bool:
    try:
        return Path(os.path.expanduser(text)).exists()
    except (OSError, ValueError):  # too long for a name, or with a byte 0 in it
        return False


def last_name(name: str) -> str:
    """The name of a file or folder without the way to it; that of a repository as it is."""
    path = Path(os.path.expanduser(name))
    return path.resolve().name if path.exists() else name


def short_name(name: str) -> str:
    """The last part of a path or of a repository's name. A link keeps its own; `.` and `..` are the folder's."""
    last = Path(name).name
    return last_name(name) if last in ("", "..") else last


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
    from hf_gradmem.files import check_directory

    check_directory(directory)
    check_files(None if file is None else directory / file)


def check_no_model(directory: Path) -> None:
    """Refuse the directory of a model: a prompt for PEFT in there would be taken for a part of it."""
    if (directory / "config.json").is_file():
        raise ValueError(f"{directory} is the directory of a model, with a config.json. Give one of its own.")


def check_files(*files: Path | None, beside: Sequence[Path] = ()) -> None:
    """Refuse files that cannot be written, before minutes go into what they are to hold. None: not asked for.

    They are refused as well where two of them, or one and a file that the command reads or writes `beside` them, are
    one: the second would take the place of the first.
    """
    from hf_gradmem.files import check_writable

    taken = {path.resolve() for path in beside}
    for file in files:
        if file is None:
            continue
        if file.resolve() in taken:
            raise ValueError(f"{file} is another file of this command, which would be lost. Write to one of its own.")
        taken.add(file.resolve())
        check_writable(file)
