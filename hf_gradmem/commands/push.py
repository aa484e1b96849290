"""What `hf-gradmem push` uploads: an adapter, a memory, many memories, or every adapter that has a folder under
`model_cards/`."""

import os
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from huggingface_hub import CommitInfo
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR
from transformers.utils import CONFIG_NAME, SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME

from ..checkpoint.adapter import Adapter
from ..checkpoint.model_card import model_card
from ..checkpoint.run_facts import OWN_RECIPE_FILE, RECIPE_FILE, facts_of_directory, published_recipe
from ..hub.cards import address_card, gives_way
from ..hub.client import (
    CARD_FILE,
    FACTS_FILE,
    MEMORY_FILE,
    folder_files,
    prepare_repository,
    push_files,
    remote_card,
)
from ..memory.written import GradMemMemory
from ..texts.reading import read_text
from .opening import load_store
from .packaged import PRETRAINED

_WEIGHTS = (SAFE_WEIGHTS_NAME, SAFE_WEIGHTS_INDEX_NAME)


@dataclass
class Pushed:
    """What went to the Hub.

    Attributes:
        source: the directory or file.
        repo_id: the repository, with its namespace.
        commit: its commit.
    """

    source: str
    repo_id: str
    commit: CommitInfo


def push(
    source: str | os.PathLike,
    repo_id: str,
    *,
    private: bool | None = None,
    revision: str | None = None,
    commit_message: str | None = None,
) -> list[Pushed]:
    """Upload a directory's adapter, memory or memories to a repository, or a directory of adapters to a namespace.

    An adapter goes with its card, or one that is written for it, and with `recipe.yaml` and `results.json` if they lie
    beside it. Of a directory of adapters, such as `model_cards/`, each folder that has weights goes to
    `repo_id/<its name>`; the weights may lie in the package, unless it is the folder of a training run. Many memories,
    of `write-dataset`, become a data set.

    Args:
        source: directory of an adapter, of a memory, of many memories or of adapters, or a memory's file.
        repo_id: the repository; the namespace for a directory of adapters.
        private: whether repositories that are made are private.
        revision: branch to push to, made if it is missing.
        commit_message: `"Upload GradMem adapter"`, or memory, or memories, by default.

    Raises:
        OSError: there is no such directory, or the Hub refused or is out of reach.
        ValueError: it holds nothing that is whole, or something else.
    """
    source = Path(source)
    options: dict[str, Any] = {"private": private, "revision": revision}
    if commit_message is not None:
        options["commit_message"] = commit_message
    if not source.exists():
        raise FileNotFoundError(f"There is no directory or file {str(source)!r}.")
    if (source / FACTS_FILE).is_file() and (source / MEMORY_FILE).is_file():
        raise ValueError(
            f"{source} holds a store of memories and a single memory ({MEMORY_FILE}). Move the memory to a directory "
            "of its own, or give its file."
        )
    if source.is_file() or ((source / MEMORY_FILE).is_file() and not (source / CONFIG_NAME).is_file()):
        commit = GradMemMemory.from_pretrained(source).push_to_hub(repo_id, **options)
        return [Pushed(str(source), commit.repo_url.repo_id, commit)]
    if (source / FACTS_FILE).is_file():
        commit = load_store(str(source)).push_to_hub(repo_id, **options)
        return [Pushed(str(source), commit.repo_url.repo_id, commit)]
    if (source / CONFIG_NAME).is_file():
        return [_push_adapter(source, source, repo_id, **options)]
    found = list(_adapters_under(source))
    if not found:
        raise ValueError(
            f"{source} holds neither an adapter ({CONFIG_NAME} and {SAFE_WEIGHTS_NAME}) nor a memory ({MEMORY_FILE}), "
            "and no folder in it does."
        )
    if "/" in repo_id:
        raise ValueError(f"{source} is a directory of adapters: give the namespace to push them to, not {repo_id!r}.")
    return [_push_adapter(weights, folder, f"{repo_id}/{folder.name}", **options) for weights, folder in found]


def _adapters_under(directory: Path) -> Iterator[tuple[Path, Path]]:
    """Where the weights lie, and the card, of each folder that has weights. A run's checkpoints are no adapters yet."""
    for folder in sorted(path for path in directory.iterdir() if path.is_dir()):
        if folder.name.startswith(PREFIX_CHECKPOINT_DIR):
            continue
        # The cards of the adapters that come with the package lie under model_cards/ without their weights.
        for weights in [folder] if _is_run(folder) else [folder, PRETRAINED / folder.name]:
            if (weights / CONFIG_NAME).is_file() and _has_weights(weights):
                yield weights, folder
                break


def _is_run(folder: Path) -> bool:
    """Whether a folder is one that was trained into: the weights of the package are not what it is to have."""
    left = (folder / name for name in (OWN_RECIPE_FILE, TRAINER_STATE_NAME))
    return any(path.is_file() for path in left) or any(folder.glob(f"{PREFIX_CHECKPOINT_DIR}-*"))


def _has_weights(directory: Path) -> bool:
    return any((directory / name).is_file() for name in _WEIGHTS)


def _push_adapter(
    weights: Path,
    folder: Path,
    repo_id: str,
    *,
    private: bool | None,
    revision: str | None,
    commit_message: str = "Upload GradMem adapter",
) -> Pushed:
    config = Adapter.open(weights).config
    if not _has_weights(weights):
        raise ValueError(f"{weights} has a {CONFIG_NAME} but no {SAFE_WEIGHTS_NAME}: the adapter was not saved whole.")
    base = config.base_model_name_or_path
    if base is not None and os.path.isabs(base) and not config.includes_base:
        warnings.warn(
            f"The base of {weights} is the directory {base}: nobody else will find it. Push the base first, and make "
            "the adapter with its name on the Hub.",
            stacklevel=2,
        )
    files: dict[str, Path | bytes] = {**folder_files(weights), **folder_files(folder)}
    if isinstance(recipe := files.get(RECIPE_FILE), Path):
        files[RECIPE_FILE] = f"{published_recipe(recipe.read_text(encoding='utf-8').rstrip())}\n".encode()
    own_card = read_text(path) if isinstance(path := files.get(CARD_FILE), Path) else None
    repo_id = prepare_repository(repo_id, revision=revision, private=private)
    if own_card is not None:
        card = address_card(own_card, repo_id, folder)
    else:
        card = str(model_card(config, repo_id, facts_of_directory(folder)))
    files[CARD_FILE] = card.encode()
    if gives_way(card, remote_card(repo_id, revision=revision)):
        del files[CARD_FILE]
    commit = push_files(files, repo_id, commit_message=commit_message, revision=revision)
    return Pushed(str(folder), repo_id, commit)
