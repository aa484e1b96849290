"""Text files as texts."""

import os
from pathlib import Path

SUFFIXES = (".txt", ".md")
"""What the name of a text file ends in, in lower case, where files are looked for in a folder."""


def read_text(path: str | os.PathLike) -> str:
    """A UTF-8 file without its byte order mark, with plain newlines.

    Raises:
        OSError: it cannot be read.
        ValueError: it is not text in UTF-8.
    """
    try:
        text = Path(os.path.expanduser(path)).read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not UTF-8 text ({error}).") from error
    if "\0" in text:
        raise ValueError(f"{path} is not text: it holds the byte 0, as binary files do.")
    return text


def read_context(path: str | os.PathLike) -> str:
    """What a text file gives to write: its text without the newlines that end it.

    Raises:
        OSError: it cannot be read.
        ValueError: it is not text in UTF-8, or holds nothing but white space.
    """
    if os.path.isdir(os.path.expanduser(path)):
        raise IsADirectoryError(
            f"{path} is a folder, and a context is one text file. A folder of them is written by `hf-gradmem write "
            "--file` or, to be looked up by name, by `hf-gradmem write-dataset`."
        )
    text = read_text(path).rstrip("\n")
    if not text.strip():
        raise ValueError(f"{path} is blank: there is nothing in it to write.")
    return text


def check_unicode(text: str, name: str) -> None:
    """Refuse a text that no tokenizer takes: with half of a surrogate pair, which bytes of another encoding become too.

    Args:
        text: to look at.
        name: how to call it in a message.

    Raises:
        ValueError: names the place.
    """
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise ValueError(
            f"{name} is not Unicode text: at character {error.start} stands half of a surrogate pair, or a byte that "
            "is not UTF-8. Give it in UTF-8."
        ) from error
