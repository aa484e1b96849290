"""The Hub: uploads as one commit, its errors in one line each, and the commit that a base was loaded from."""

import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from huggingface_hub import (
    CommitInfo,
    CommitOperationAdd,
    CommitOperationDelete,
    HfApi,
    constants,
    get_token,
    resolve_revision,
    try_to_load_from_cache,
)
from huggingface_hub.errors import (
    EntryNotFoundError,
    GatedRepoError,
    HfHubHTTPError,
    HFValidationError,
    HTTPError,  # the transport's own, of which connection errors are
    LocalEntryNotFoundError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
    RevisionNotFoundError,
    RevisionResolutionError,
)
from huggingface_hub.utils import filter_repo_objects

CARD_FILE = constants.REPOCARD_NAME
# Weights of an earlier push, which a loader would prefer to those of this one.
_WEIGHTS = ("model.safetensors", "model-*-of-*.safetensors", "model.safetensors.index.json")
# Trainer's checkpoints and whatever is pickled stay at home.
_NOT_PUSHED = ["checkpoint-*", "*.bin", "*.pt", "*.pth", ".*", "*/.*"]


class HubError(OSError):
    """The Hub or its client refused. The message is one line: what is wrong, and what to do."""


def folder_files(folder: Path) -> dict[str, Path]:
    """What a push takes from a directory, by its path in the repository."""
    paths = {path.relative_to(folder).as_posix(): path for path in sorted(folder.rglob("*")) if path.is_file()}
    return {name: paths[name] for name in filter_repo_objects(paths, ignore_patterns=_NOT_PUSHED)}


def push_files(
    files: Mapping[str, Path | bytes],
    repo_id: str,
    *,
    commit_message: str,
    commit_description: str | None = None,
    private: bool | None = None,
    token: str | bool | None = None,
    revision: str | None = None,
    create_pr: bool = False,
) -> CommitInfo:
    """Upload files to a model repository in one commit, so that nobody ever loads half of them.

    Weights of an earlier push that these replace are deleted in the same commit.

    Args:
        files: path in the repository, and the local file or its content.
        repo_id, revision: of a repository and a branch that exist; see [`prepare_repository`].

    Raises:
        HubError: the Hub refused, or cannot be reached.
    """
    api = HfApi(token=token)
    with one_line_errors(repo_id, revision):
        operations = [CommitOperationAdd(name, path) for name, path in files.items()]
        if any(True for _ in filter_repo_objects(files, allow_patterns=list(_WEIGHTS))):
            there = api.list_repo_files(repo_id, revision=revision)
            stale = set(filter_repo_objects(there, allow_patterns=list(_WEIGHTS))) - files.keys()
            operations += [CommitOperationDelete(name) for name in sorted(stale)]
        return api.create_commit(
            repo_id,
            operations,
            commit_message=commit_message,
            commit_description=commit_description,
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


def remote_card(repo_id: str, *, revision: str | None, token: str | bool | None = None) -> str | None:
    """The text of a repository's README.md, or `None` where it has none."""
    api = HfApi(token=token)
    with one_line_errors(repo_id, revision):
        if not api.file_exists(repo_id, CARD_FILE, revision=revision):
            return None
        return Path(api.hf_hub_download(repo_id, CARD_FILE, revision=revision)).read_text(encoding="utf-8")


def loaded_commit(name: str | None, revision: str | None = None, cache_dir: str | None = None) -> str | None:
    """The commit that a revision of a repository last resolved to when it was loaded here.

    A model does not say which commit it came from; the cache that it was loaded through does, without a call.

    Returns:
        A commit sha, or `revision` as given for a directory or what was never loaded.
    """
    if name is None or os.path.exists(name):
        return revision
    try:
        return resolve_revision(name, revision=revision, local_files_only=True, cache_dir=cache_dir).resolved
    except (RevisionResolutionError, HFValidationError):
        return revision


def is_cached(name: str, commit: str, file: str) -> bool:
    """Whether the local cache holds a file of a repository at a commit."""
    return isinstance(try_to_load_from_cache(name, file, revision=commit), str)


@contextmanager
def one_line_errors(repo_id: str | os.PathLike, revision: str | None = None) -> Iterator[None]:
    """Raise what the Hub and its client answer in a span as a [`HubError`]."""
    try:
        yield
    except HubError:
        raise
    except Exception as error:
        message = explain(error, os.fspath(repo_id), revision)
        if message is None:
            raise
        raise HubError(message) from error


def explain(error: BaseException, repo_id: str, revision: str | None = None) -> str | None:
    """One line on an error of the Hub or of its client; `None` for any other error.

    Transformers words the client's errors anew and keeps them as the cause, so the causes are looked at as well.
    """
    chain = list(causes(error))
    for cause in chain:
        if isinstance(cause, HfHubHTTPError):
            return _explain_answer(cause, repo_id, revision)
    for cause in chain:
        if isinstance(cause, OfflineModeIsEnabled | LocalEntryNotFoundError | RevisionResolutionError | HTTPError):
            return _unreachable(repo_id, chain)
        if isinstance(cause, EntryNotFoundError):
            return f"{repo_id} is not complete: {cause}"
    return None


def causes(error: BaseException | None) -> Iterator[BaseException]:
    """An error, what it came from, and so on."""
    while error is not None:
        yield error
        error = error.__cause__ or (None if error.__suppress_context__ else error.__context__)


def _explain_answer(error: HfHubHTTPError, repo_id: str, revision: str | None) -> str:
    status, repo_id = error.response.status_code, getattr(error, "repo_id", None) or repo_id
    said = " ".join((error.server_message or "").split())
    page = f"{constants.ENDPOINT}/{repo_id}"
    log_in = "log in with `hf auth login`, or set HF_TOKEN"
    if isinstance(error, GatedRepoError):
        return f"{repo_id} is gated: ask for access on {page}, then {log_in}."
    if isinstance(error, RepositoryNotFoundError):
        who = "this token may not see it" if get_token() else f"you are not logged in: {log_in}"
        return f"There is no repository {repo_id!r} on the Hub, or it is private and {who}."
    if isinstance(error, RevisionNotFoundError):
        return f"{repo_id} has no revision {revision or 'main'!r}: see {page}/tree/main for those it has."
    if isinstance(error, EntryNotFoundError):
        file = str(error.response.url).rsplit("/", 1)[-1]
        return f"{repo_id} is not complete: {file} is missing. Was its upload interrupted? Push it again."
    if status == 401 and not get_token():
        return f"You are not logged in: {log_in}."
    if status == 401:
        return f"The Hub does not accept the token ({said}): {log_in}."
    if status == 403:
        return f"This token may not write to {repo_id} ({said}). Take one with write permission, or another name."
    if status == 412:
        return f"{repo_id} was changed while this was pushed, and nothing was uploaded. Push again."
    return f"The Hub answered {status} for {repo_id}: {said or error}"


def _unreachable(repo_id: str, chain: list[BaseException]) -> str:
    hub = f"The Hub ({constants.ENDPOINT})"
    if any(isinstance(cause, LocalEntryNotFoundError | RevisionResolutionError) for cause in chain):
        hub = f"{repo_id} is not whole in the local Hub cache, and the Hub ({constants.ENDPOINT})"
    if constants.HF_HUB_OFFLINE:
        state = "is switched off by HF_HUB_OFFLINE"
    elif any(isinstance(cause, HTTPError) for cause in chain):
        state = "cannot be reached"
    else:
        state = "was not asked: local_files_only=True"
    return f"{hub} {state}."
