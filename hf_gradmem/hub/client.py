"""Calls to the Hub: uploads as one commit, what a repository holds, and the commit that a base was loaded from."""

import functools
import os
import threading
from collections.abc import Collection, Iterable, Mapping, Sequence
from pathlib import Path

from huggingface_hub import (
    CommitInfo,
    CommitOperationAdd,
    CommitOperationDelete,
    HfApi,
    constants,
    get_session,
    resolve_revision,
    try_to_load_from_cache,
)
from huggingface_hub.errors import HFValidationError, RevisionResolutionError
from huggingface_hub.utils import filter_repo_objects
from transformers.utils import CHAT_TEMPLATE_DIR

from .errors import HubError, one_line_errors

CARD_FILE = constants.REPOCARD_NAME
FACTS_FILE = "memories.json"
"""What every store of memories has."""
MEMORY_FILE = "memory.safetensors"
"""What a single memory lies in."""
# Those of an earlier push or save would be preferred by a loader to newer ones of another name.
WEIGHTS = ("model.safetensors", "model-*-of-*.safetensors", "model.safetensors.index.json")
# Likewise, where a tokenizer is saved or pushed: one that was put there by itself stays beside a model without.
TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.jinja",
    f"{CHAT_TEMPLATE_DIR}/*",
)
# Trainer's checkpoints, whatever is pickled, what Trainer keeps at home as well, and memories, which decode to texts.
_NOT_PUSHED = ["checkpoint-*", "_*", "*.bin", "*.pt", "*.pth", ".*", "*/.*", MEMORY_FILE, f"*/{MEMORY_FILE}"]
_HUB_TIMEOUT = 3.0  # seconds


def folder_files(folder: Path) -> dict[str, Path]:
    """What a push takes from a directory, by its path in the repository.

    Memories within it stay at home, too, single ones and stores: they decode to the texts that they were written from.
    """
    stores = {path.parent for path in folder.rglob(FACTS_FILE)} - {folder}
    found = (path for path in sorted(folder.rglob("*")) if path.is_file() and stores.isdisjoint(path.parents))
    paths = {path.relative_to(folder).as_posix(): path for path in found}
    return {name: paths[name] for name in filter_repo_objects(paths, ignore_patterns=_NOT_PUSHED)}


def _patterns_of(files: Collection[str], kinds: Sequence[Sequence[str]]) -> list[str]:
    """The patterns of the kinds that these files have one of."""
    return [
        pattern
        for patterns in map(list, kinds)
        if any(True for _ in filter_repo_objects(files, allow_patterns=patterns))
        for pattern in patterns
    ]


def superseded(
    there: Iterable[str], files: Collection[str], kinds: Sequence[Sequence[str]] = (WEIGHTS, TOKENIZER_FILES)
) -> set[str]:
    """Older files that a loader would take beside new ones of their kind.

    Args:
        there: names of the files that are there.
        files: those of the new version.
        kinds: patterns of the files of each kind.
    """
    return set(filter_repo_objects(there, allow_patterns=_patterns_of(files, kinds))) - set(files)


def push_files(
    files: Mapping[str, Path | bytes],
    repo_id: str,
    *,
    commit_message: str,
    commit_description: str | None = None,
    token: str | bool | None = None,
    revision: str | None = None,
    create_pr: bool = False,
    repo_type: str = "model",
    replaced: Sequence[Sequence[str]] = (WEIGHTS, TOKENIZER_FILES),
) -> CommitInfo:
    """Upload files to a repository in one commit, so that nobody ever loads half of them.

    Files of an earlier push that these replace, as of [`superseded`], are deleted in the same commit.

    Args:
        files: path in the repository, and the local file or its content.
        repo_id, revision, repo_type: of a repository and a branch that exist; see [`prepare_repository`].
        commit_message, commit_description, token, create_pr: as in `huggingface_hub.HfApi.create_commit`.
        replaced: patterns of the files, by their kind, of which nothing older is to stay beside new ones.

    Raises:
        HubError: the Hub refused, or cannot be reached.
    """
    api = HfApi(token=token)
    with one_line_errors(repo_id, revision):
        operations: list[CommitOperationAdd | CommitOperationDelete] = [
            CommitOperationAdd(name, path) for name, path in files.items()
        ]
        if _patterns_of(files, replaced):
            there = api.list_repo_files(repo_id, revision=revision, repo_type=repo_type)
            operations += [CommitOperationDelete(name) for name in sorted(superseded(there, files, replaced))]
        return api.create_commit(
            repo_id,
            operations,
            commit_message=commit_message,
            commit_description=commit_description,
            repo_type=repo_type,
            revision=revision,
            create_pr=create_pr,
        )


def prepare_repository(
    repo_id: str,
    *,
    revision: str | None,
    private: bool | None = None,
    token: str | bool | None = None,
    repo_type: str = "model",
) -> str:
    """Make a repository and a branch unless they are there; returns the repository's name with its namespace.

    Raises:
        HubError: the Hub refused, or cannot be reached.
    """
    api = HfApi(token=token)
    with one_line_errors(repo_id, revision):
        repo_id = api.create_repo(repo_id, repo_type=repo_type, private=private, exist_ok=True).repo_id
        if revision is not None and not revision.startswith("refs/pr/"):
            api.create_branch(repo_id, branch=revision, repo_type=repo_type, exist_ok=True)
    return repo_id


def remote_card(
    repo_id: str, *, revision: str | None, token: str | bool | None = None, repo_type: str = "model"
) -> str | None:
    """The text of a repository's README.md, or `None` where it has none."""
    api = HfApi(token=token)
    with one_line_errors(repo_id, revision):
        if not api.file_exists(repo_id, CARD_FILE, revision=revision, repo_type=repo_type):
            return None
        path = api.hf_hub_download(repo_id, CARD_FILE, revision=revision, repo_type=repo_type)
        return Path(path).read_text(encoding="utf-8", errors="replace")  # which one is ours is all that is asked


def loaded_commit(name: str | None, revision: str | None = None) -> str | None:
    """The commit that a revision of a repository last resolved to when it was loaded here.

    A model does not say which commit it came from; the cache that it was loaded through does, without a call.

    Returns:
        A commit sha, or `revision` as given for a directory or what was never loaded.
    """
    if name is None or os.path.exists(name):
        return revision
    try:
        return resolve_revision(name, revision=revision, local_files_only=True).resolved
    except (RevisionResolutionError, HFValidationError):
        return revision


def is_cached(name: str, commit: str, file: str) -> bool:
    """Whether the local cache holds a file of a repository at a commit."""
    return isinstance(try_to_load_from_cache(name, file, revision=commit), str)


def check_hub() -> None:
    """Refuse at once what needs the Hub while it is out of reach.

    Raises:
        HubError: it is.
    """
    if not hub_is_reachable():
        state = "is switched off by HF_HUB_OFFLINE" if constants.HF_HUB_OFFLINE else "cannot be reached"
        raise HubError(f"The Hub ({constants.ENDPOINT}) {state}.")


def hub_is_reachable() -> bool:
    """Whether the Hub answers within a few seconds; it is not asked where offline mode is set."""
    return not constants.HF_HUB_OFFLINE and _answers(constants.ENDPOINT)


@functools.cache
def _answers(endpoint: str) -> bool:
    answered = threading.Event()

    def ask() -> None:
        try:
            get_session().head(endpoint, timeout=_HUB_TIMEOUT)
        except Exception:  # whatever the network does, the answer is no
            return
        answered.set()

    # In a thread, since no time-out covers a name server that does not answer.
    thread = threading.Thread(target=ask, daemon=True)
    thread.start()
    thread.join(_HUB_TIMEOUT)
    return answered.is_set()
