"""Commands that answer until they are ended: serve."""

import errno
import socket
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from .app import command, manners
from .inputs import short_name
from .options import Device, Revision, Seed, TrustRemoteCode, output_option
from .printing import print_text, report_done

if TYPE_CHECKING:
    from uvicorn import Server


@command(
    "hf-gradmem serve ./adapter",
    "hf-gradmem serve ./adapter --memories memories/ --keep written/ --port 8001",
)
def serve(
    model: Annotated[str, typer.Argument(help="Directory or Hub repository of an adapter, or of any decoder.")],
    memories: Annotated[str | None, typer.Option(help="What write-dataset wrote, or a Hub data set of it.")] = None,
    keep: Annotated[Path | None, output_option("Folder for what clients write; RAM when absent.", "--keep")] = None,
    name: Annotated[str | None, typer.Option(help="What requests call the model; its own name when absent.")] = None,
    host: Annotated[str, typer.Option(help="Address; beyond this machine, requests need a token.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help="Port to listen at.")] = 8000,
    token: Annotated[
        str | None,
        typer.Option(
            envvar="HF_GRADMEM_TOKEN",
            help="What requests must carry as a bearer token; made up and shown where others can reach the server.",
        ),
    ] = None,
    batch_size: Annotated[int, typer.Option(min=1, help="Requests at a time.")] = 16,
    queue: Annotated[int, typer.Option(min=1, help="Requests that may wait; more are told to come again.")] = 64,
    max_body: Annotated[int, typer.Option(min=1, help="Most bytes of a request.")] = 1 << 20,
    max_memories: Annotated[int, typer.Option(min=1, help="Most memories that clients may write.")] = 1000,
    timeout: Annotated[float, typer.Option(min=0.1, help="Seconds until a request is given up.")] = 300.0,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Tokens of an answer, where a request says none.")] = 64,
    revision: Revision = None,
    seed: Seed = 0,
    device: Device = "auto",
    trust_remote_code: TrustRemoteCode = False,
) -> None:
    """Serve memories over HTTP, for OpenAI's clients: write contexts, and ask with the id of a memory.

    Needs the extra "serve": pip install "hf-gradmem\\[serve]".
    """
    try:
        from hf_gradmem.serving.serve import make_server, token_for
    except ModuleNotFoundError as error:
        raise ImportError(f'serve needs {error.name}: pip install "hf-gradmem[serve]"') from error
    from hf_gradmem.commands.opening import load_model, load_store

    bound = _bind(host, port)
    port = bound[0].getsockname()[1]  # the system's choice for 0
    reader = load_model(model, revision=revision, seed=seed, device=device, trust_remote_code=trust_remote_code)
    needed, served = token_for(host, token), name or short_name(model)
    server = make_server(
        reader,
        model_name=served,
        memories=None if memories is None else load_store(memories),
        keep=keep,
        host=host,
        port=port,
        token=needed,
        batch_size=batch_size,
        max_waiting=queue,
        max_body=max_body,
        max_memories=max_memories,
        timeout=timeout,
        max_new_tokens=max_new_tokens,
    )
    report_done(f"Serving {served} at http://{f'[{host}]' if ':' in host else host}:{port}/v1 until interrupted.")
    if needed is not None and needed != token:
        print_text(f"Requests need this token: {needed}")  # to a quiet one, too: nobody else can tell it
    _run(server, bound)


def _run(server: "Server", bound: list[socket.socket]) -> None:
    """Serve until the process is asked to end."""
    try:
        with ExitStack() as sockets:
            server.run(sockets=[sockets.enter_context(each) for each in bound])
    except KeyboardInterrupt:  # the way to end it; what was under way has ended by now
        manners.interrupted = False


def _bind(host: str, port: int) -> list[socket.socket]:
    """The addresses of a host, taken before a model is loaded; who calls meanwhile waits for it.

    Raises:
        OSError: there is no such host, or the port is taken.
    """
    bound: list[socket.socket] = []
    missing = None
    try:
        for family, *_, address in socket.getaddrinfo(host, port, type=socket.SOCK_STREAM):
            try:
                bound.append(socket.create_server((address[0], port, *address[2:]), family=family))
            except OSError as error:
                if error.errno not in (errno.EADDRNOTAVAIL, errno.EAFNOSUPPORT):
                    raise
                missing = error  # of the two that localhost has, a machine may have one
            else:
                port = bound[-1].getsockname()[1]  # the system's choice for 0, at every address
        if missing is not None and not bound:
            raise missing
    except OSError as error:
        for each in bound:
            each.close()
        raise OSError(
            f"{host}:{port} cannot be listened at: {error.strerror}. Give another --port or --host."
        ) from error
    return bound


__all__ = ["serve"]
