"""What the Hub and its client refuse, in one line: what is wrong, and what to do."""

import os
from collections.abc import Iterator
from contextlib import contextmanager

from huggingface_hub import constants, get_token
from huggingface_hub.errors import (
    EntryNotFoundError,
    GatedRepoError,
    HfHubHTTPError,
    HTTPError,  # the transport's own, of which connection errors are
    LocalEntryNotFoundError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
    RevisionNotFoundError,
    RevisionResolutionError,
)


class HubError(OSError):
    """The Hub or its client refused. The message is one line: what is wrong, and what to do."""


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

    Transformers words the client's errors in its own way and keeps them as the cause, so the causes are looked at too.
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
    kind = constants.REPO_TYPES_URL_PREFIXES.get(getattr(error, "repo_type", None) or "", "")
    page = f"{constants.ENDPOINT}/{kind}{repo_id}"
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
