"""The card of a repository or a directory: which one is ours to rewrite, and where it says to load from."""

import os
import re
from pathlib import Path

from huggingface_hub import ModelCard

from ..files import save_text
from .client import CARD_FILE

# While it stands in a card, the card is ours to rewrite; without it, the card is the user's and is left alone.
MARK = "<!-- Written by hf_gradmem at each save and push. To keep your own text, remove this line. -->"
# Stands for the namespace of the repository until there is one.
_NAMESPACE = "your-name"
# Of every model that this package saves.
TAGS = ("gradmem", "memory", "test-time-training", "arxiv:2603.13875")


def is_own_card(text: str) -> bool:
    """Whether a card is one that was written here, and not the user's."""
    return MARK in text


def gives_way(card: str, there: str | None) -> bool:
    """Whether a card that was written here is to leave the one that is in the repository, which is the user's."""
    return there is not None and is_own_card(card) and not is_own_card(there)


def local_id(directory: str | os.PathLike) -> str:
    """What stands in a card for the repository that a directory has not been pushed to."""
    return f"{_NAMESPACE}/{Path(directory).resolve().name}"


def address_card(text: str, repo_id: str, directory: str | os.PathLike) -> str:
    """The card of a directory as it is pushed: it says from which repository to load, and no longer [`local_id`].

    In the user's own card nothing else is changed; in one that was written here, wherever it was saved, the namespace
    stands before no other name.
    """
    name = re.escape(Path(directory).resolve().name) + r"(?![\w.-])"  # which may have blanks
    if is_own_card(text):
        name += r"|[\w.-]+"
    return re.sub(rf"{_NAMESPACE}/(?:{name})", repo_id, text)


def keeps_card(directory: str | os.PathLike) -> bool:
    """Whether the card in a directory is the user's own."""
    path = Path(directory) / CARD_FILE
    # The mark is ASCII: a card in another encoding is the user's, and no reason to fail.
    return path.exists() and not is_own_card(path.read_text(encoding="utf-8", errors="replace"))


def write_card(card: ModelCard, directory: str | os.PathLike) -> None:
    """Write a card into a directory, unless the user's own is there."""
    if not keeps_card(directory):
        save_text(str(card), Path(directory) / CARD_FILE)
