"""Running text: write some sentences, then continue the text, or give the sentences back.

The header and footer that Project Gutenberg puts around a book are cut off, and its hard line breaks undone. Sentences
are segments; put together they are the text. A query is empty: its answer is read from the memory alone.
"""

import os
import re
from collections.abc import Iterator
from typing import Any, Literal

from datasets import Dataset

from ..texts.cutting import split_paragraphs
from ..texts.reading import read_text
from ..texts.sentences import sentences as sentences_of_paragraph
from .rows import FEATURES_OF_TEXT, check_split, checked
from .sources import load_hub, source_name, take_evenly, take_split
from .task import Task

_START = re.compile(r"^\*\*\* ?START OF (?:THE|THIS) PROJECT GUTENBERG.*$", re.MULTILINE | re.IGNORECASE)
_END = re.compile(
    r"^(?:\*\*\* ?END OF (?:THE|THIS) PROJECT GUTENBERG|End of (?:the )?Project Gutenberg).*$",
    re.MULTILINE | re.IGNORECASE,
)


def load(
    split: str = "train",
    *,
    path: str | os.PathLike | None = None,
    hub_name: str | None = None,
    hub_config: str | None = None,
    hub_split: str = "train",
    hub_revision: str | None = None,
    mode: Literal["continuation", "reconstruction"] = "continuation",
    context_sentences: int = 8,
    target_sentences: int = 4,
    num_contexts: int | None = None,
    validation_share: float = 0.1,
) -> Dataset:
    """Windows of sentences that follow each other without overlap.

    Args:
        split: `"train"` and `"validation"` share the windows between them; `"test"` is all of them.
        path: a plain-text file.
        hub_name: a data set with a column `text`, such as `Salesforce/wikitext`.
        hub_config, hub_split, hub_revision: which part of it, for instance `wikitext-103-raw-v1`.
        mode: the target is the text after the context, or the context itself.
        context_sentences: sentences to write.
        target_sentences: sentences of the continuation.
        num_contexts: how many windows to take, spread evenly over the split; all of them when `None`.
        validation_share: share of the windows that are the validation part.

    Raises:
        OSError: the file cannot be read.
        ValueError: the text is too short for a window, or an argument is out of range.
    """
    check_split(split)
    source = source_name(path, hub_name)
    if mode not in ("continuation", "reconstruction"):
        raise ValueError(f"mode must be 'continuation' or 'reconstruction', got {mode!r}.")
    for name, value in (("context_sentences", context_sentences), ("target_sentences", target_sentences)):
        if value < 1:
            raise ValueError(f"{name} must be at least 1, got {value}.")
    if path is not None:
        text = read_text(path)
    else:
        rows = load_hub(source, hub_config, hub_split, hub_revision)
        if "text" not in rows.column_names:
            raise ValueError(f"{source} has no column 'text', only {rows.column_names}.")
        text = "\n".join(rows["text"])
    continued = target_sentences if mode == "continuation" else 0
    windows = list(_windows(sentences(strip_gutenberg(text)), context_sentences, continued))
    if not windows:
        raise ValueError(f"{source} has fewer than the {context_sentences + continued} sentences of one window.")
    taken = take_evenly(take_split(windows, split, validation_share), num_contexts, source)
    return Dataset.from_list(list(checked(taken, source)), features=FEATURES_OF_TEXT)


def strip_gutenberg(text: str) -> str:
    """The book alone, without the header and footer of Project Gutenberg, if it has them."""
    start = _START.search(text)
    if start is not None:
        text = text[start.end() :]
    end = _END.search(text)
    return text if end is None else text[: end.start()]


def sentences(text: str) -> list[str]:
    """The sentences of a text in paragraphs, each with the white space before it: a space, or an empty line."""
    found: list[str] = []
    for paragraph in split_paragraphs(text):
        joined = " ".join(paragraph.split())
        if joined:
            parts = sentences_of_paragraph(joined)
            found += [f"\n\n{parts[0]}" if found else parts[0], *parts[1:]]
    return found


def _windows(found: list[str], context_sentences: int, target_sentences: int) -> Iterator[dict[str, Any]]:
    size = context_sentences + target_sentences
    for start in range(0, len(found) - size + 1, size):
        window = found[start : start + size]
        context = [window[0].lstrip(), *window[1:context_sentences]]
        target = "".join(window[context_sentences:]) if target_sentences else "".join(context)
        # Running text goes on after a target: nothing is to be learned from an end token there.
        yield {"context": context, "queries": [""], "targets": [target], "add_end_token": False}


# It is not answered but continued: its losses say how well.
TASK = Task(load, metric=None)
