"""Opening what is served, and serving it until the process is asked to end."""

import ipaddress
import secrets
from pathlib import Path

import uvicorn

from ..memory.store import MemoryStore
from ..modeling_gradmem import GradMemForCausalLM
from .app import make_app
from .engine import Engine
from .shelf import Shelf

_LOOPBACK_NAMES = ["127.0.0.1", "localhost", "[::1]", "::1"]


def is_loopback(host: str) -> bool:
    """Whether a server on this host is reached from its own machine alone."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def token_for(host: str, token: str | None) -> str | None:
    """The token that requests need: the given one; a new one where others can reach the server."""
    return token or (None if is_loopback(host) else secrets.token_urlsafe(24))


def make_server(
    model: GradMemForCausalLM,
    *,
    model_name: str,
    memories: MemoryStore | None,
    keep: Path | None,
    host: str,
    port: int,
    token: str | None,
    batch_size: int,
    max_waiting: int,
    max_body: int,
    max_memories: int,
    timeout: float,
    max_new_tokens: int,
) -> uvicorn.Server:
    """A server that is ready to run.

    Args:
        model: that writes and reads.
        model_name: that requests name.
        memories: that are there from the beginning, *optional*.
        keep: folder for what clients write; kept while the server runs when `None`.
        host, port: where it listens.
        token: that requests carry, *optional*.
        batch_size: most requests at a time.
        max_waiting: most requests in the queue.
        max_body: most bytes of a request.
        max_memories: most that clients may write.
        timeout: seconds until a request is given up.
        max_new_tokens: of an answer, where a request does not say.

    Raises:
        OSError: `keep` cannot be made.
        ValueError: the memories are another model's, or one in `keep` has the id of one of theirs.
    """
    if memories is not None and memories.fingerprint != model.fingerprint():
        raise ValueError(
            f"These memories were written by {memories.fingerprint}, and the model to be served is "
            f"{model.fingerprint()}: it cannot read them."
        )
    shelf = Shelf(memories, keep, max_memories)
    engine = Engine(model, batch_size=batch_size, max_waiting=max_waiting)
    app = make_app(
        engine,
        shelf,
        model_name=model_name,
        token=token,
        hosts=[*_LOOPBACK_NAMES, host] if token is None and is_loopback(host) else ("*",),
        max_body=max_body,
        timeout=timeout,
        max_new_tokens=max_new_tokens,
    )
    return uvicorn.Server(uvicorn.Config(app, host=host, port=port, log_level="warning", access_log=False))
