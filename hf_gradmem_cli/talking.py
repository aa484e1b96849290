"""The command that answers line by line: chat."""

import sys
from typing import Annotated

import typer

from .app import command, manners
from .inputs import lines_of_stdin, short_name
from .options import Device, Revision, Seed, TrustRemoteCode
from .plain import plain


@command(
    "hf-gradmem chat ./adapter",
    "hf-gradmem chat ./adapter --memories memories/",
    "hf-gradmem chat ./adapter --memory ./memory < questions.txt",
)
def chat(
    model: Annotated[str, typer.Argument(help="Directory or Hub repository of an adapter, or of any decoder.")],
    memory: Annotated[str | None, typer.Option(help="A memory to begin with: directory, file or repository.")] = None,
    memories: Annotated[str | None, typer.Option(help="What write-dataset wrote, or a Hub data set of it.")] = None,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Stop an answer after so many tokens.")] = 64,
    revision: Revision = None,
    seed: Seed = 0,
    device: Device = "auto",
    trust_remote_code: TrustRemoteCode = False,
) -> None:
    """Write texts and ask about them, line by line, with the model loaded once.

    Lines come from the terminal, with completion and a history (the extra "chat"), or from stdin.
    """
    from hf_gradmem.commands.chat import Chat, typed_line
    from hf_gradmem.commands.opening import PLAIN_BASE_TOLERANCE, is_adapter, load_memory, load_reader, load_store
    from hf_gradmem.commands.packaged import user_cache

    tolerance = (
        None if is_adapter(model, revision=revision, trust_remote_code=trust_remote_code) else PLAIN_BASE_TOLERANCE
    )
    first = None if memory is None else load_memory(memory)
    store = None if memories is None else load_store(memories)
    reader = load_reader(model, first, revision=revision, seed=seed, device=device, trust_remote_code=trust_remote_code)
    if first is not None:
        reader.check_memory(first)
    talk = Chat(reader, lambda text: typer.echo(plain(text), nl=False), store, max_new_tokens, tolerance)
    if first is not None:
        for index in range(len(first)):
            talk.keep(short_name(str(memory)) + (f"-{index}" if len(first) > 1 else ""), first[index])
    if sys.stdin is None or not sys.stdin.isatty():
        for line in lines_of_stdin():
            talk.take(line)
            if talk.ended:
                break
        return
    if not manners.quiet:
        talk.help("")
    next_line = typed_line(talk, user_cache() / "chat_history")
    while True:
        try:
            while not talk.ended and (typed := next_line()) is not None:
                talk.take(typed)
            break
        except KeyboardInterrupt:  # ends an answer or drops a line, as in a shell, and not the conversation
            typer.echo()
    manners.interrupted = False  # nor is one left of which a library under the prompt kept the error to itself


__all__ = ["chat"]
