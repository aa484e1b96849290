"""A conversation with memories: texts are written, kept and asked about, line by line."""

import math
import os
import time
from collections.abc import Callable
from itertools import count
from pathlib import Path
from typing import Any

import torch
from transformers import TextStreamer

from ..base.modes import plain_generation
from ..memory.store import MemoryStore
from ..memory.written import GradMemMemory
from ..modeling_gradmem import GradMemForCausalLM
from ..reading.generation import ending_tokens
from ..reading.reciting import tokenize_asked
from ..template import Template, get_template
from ..texts.reading import SUFFIXES, read_context
from ..writing.fitting import fit_contexts

HELP = """\
A line is a question, which is answered from the memory in use.
  /write FILE or TEXT   write a text into a memory, and use it
  /memories             the memories there are; * is the one in use
  /use ID               ask another one
  /save DIRECTORY       keep the memory in use, for `hf-gradmem ask --memory DIRECTORY`
  /forget               drop the memory in use
  /help                 this
  /quit                 end (as does Ctrl-D)"""
COMMANDS = ("/write", "/memories", "/use", "/save", "/forget", "/help", "/quit")


class _Teller(TextStreamer):
    """Hands an answer on as it is generated, without what the words around the question have the model quote first."""

    def __init__(self, tokenizer: Any, tell: Callable[[str], None], words: Template) -> None:
        super().__init__(tokenizer, skip_prompt=True, skip_special_tokens=True)
        self.tell, self.words = tell, words
        self.generated, self.told = "", 0

    def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
        """Called with each piece."""
        self.generated += text
        _, answer = self.words.split(self.generated, stream_end)
        if len(answer) > self.told:
            self.tell(answer[self.told :])
            self.told = len(answer)


class Chat:
    """What a conversation knows: a model, memories by id, and which of them is asked.

    Args:
        model: that writes and reads.
        tell: is given all text, as it comes.
        store: memories that are there from the beginning, *optional*.
        max_new_tokens: most tokens of an answer.
        tolerance: loss at which a write stops, in nats per token, *optional*.
    """

    def __init__(
        self,
        model: GradMemForCausalLM,
        tell: Callable[[str], None],
        store: MemoryStore | None = None,
        max_new_tokens: int = 64,
        tolerance: float | None = None,
    ) -> None:
        self.model, self.tell, self.store = model, tell, store
        self.max_new_tokens, self.tolerance = max_new_tokens, tolerance
        self.written: dict[str, GradMemMemory] = {}
        self.in_use: str | None = None
        self.ended = False

    def ids(self) -> list[str]:
        """Of all memories, those of the store first."""
        return [*(self.store.ids if self.store is not None else ()), *self.written]

    def keep(self, name: str, memory: GradMemMemory) -> str:
        """Put a memory beside the others, and use it; under its name, with a number where that is taken."""
        taken = set(self.ids())
        name = next(free for number in count(1) if (free := name if number == 1 else f"{name}-{number}") not in taken)
        self.written[name], self.in_use = memory, name
        return name

    def take(self, line: str) -> None:
        """Do what a line says. What cannot be done is told, and the conversation goes on."""
        line = line.strip()
        if not line:
            return
        name, _, given = line.partition(" ")
        try:
            if not name.startswith("/"):
                self._ask(line)
            elif name not in COMMANDS:
                raise ValueError(f"There is no command {name}. /help lists them.")
            else:
                getattr(self, name.removeprefix("/"))(given.strip())
        except (ValueError, OSError, FloatingPointError, torch.OutOfMemoryError) as error:
            self.tell(f"{error}\n")

    def write(self, given: str) -> None:
        """Write a file or a text."""
        if not given:
            raise ValueError("Say what to write: /write notes.txt, or /write and a text.")
        path = Path(os.path.expanduser(given))
        name, text = self._new_id(), given
        if os.path.isfile(path):  # which a text too long for a name is not, where `Path` would raise
            name, text = path.name, read_context(path)
        elif os.path.isdir(path) or (" " not in given and ("/" in given or given.lower().endswith(SUFFIXES))):
            raise ValueError(f"There is no file {given}.")
        begin = time.perf_counter()
        fitting = fit_contexts(self.model.writer, self.model.tokenizer, [text])
        memory = self.model.write(fitting, tolerance=self.tolerance)
        losses = [loss for loss in memory.write_losses[0].tolist() if not math.isnan(loss)]
        name = self.keep(name, memory)
        took = f"{int(memory.num_context_tokens[0])} tokens, {len(losses)} steps, {time.perf_counter() - begin:.0f} s"
        fell = f"; the loss fell from {losses[0]:.2f} to {losses[-1]:.2f} nats a token" if losses else ""
        self.tell(f"Written as {name}: {took}{fell}.\n")

    def memories(self, _: str) -> None:
        """List the memories."""
        if not self.ids():
            raise ValueError("There is no memory yet: /write FILE or TEXT makes one.")
        for name in self.ids():
            self.tell(f"{'*' if name == self.in_use else ' '} {name}\n")

    def use(self, given: str) -> None:
        """Choose the memory that is asked."""
        if given not in self.ids():
            raise ValueError(f"There is no memory {given!r}. /memories lists them.")
        self.in_use = given

    def save(self, given: str) -> None:
        """Keep the memory in use."""
        if not given:
            raise ValueError("Say where to: /save DIRECTORY.")
        self._memory().save_pretrained(Path(os.path.expanduser(given)))
        self.tell(f"Saved {self.in_use} to {given}.\n")

    def forget(self, _: str) -> None:
        """Drop the memory in use."""
        self._memory()
        if self.in_use not in self.written:
            raise ValueError(f"{self.in_use} belongs to the store, which stays as it is.")
        del self.written[self.in_use]
        self.in_use = next(reversed(self.written), None)

    def help(self, _: str) -> None:
        """Say what lines can be."""
        self.tell(HELP + "\n")

    def quit(self, _: str) -> None:
        """End."""
        self.ended = True

    def _ask(self, question: str) -> None:
        memory, template = self._memory(), self.model.config.template
        input_ids, mask = tokenize_asked(self.model, memory, [question], [0], template)
        words = get_template(template, self.model.tokenizer)
        with plain_generation():
            self.model.generate(
                input_ids,
                attention_mask=mask,
                memory=memory,
                max_new_tokens=self.max_new_tokens,
                streamer=_Teller(self.model.tokenizer, self.tell, words),
                **ending_tokens(self.model.tokenizer, self.model.generation_config),
            )
        self.tell("\n")

    def _memory(self) -> GradMemMemory:
        if self.in_use is None:
            raise ValueError(
                "No memory is in use: /use ID chooses one."
                if self.ids()
                else "There is no memory yet: /write makes one."
            )
        return self.written[self.in_use] if self.in_use in self.written else self._from_store(self.in_use)

    def _from_store(self, name: str) -> GradMemMemory:
        assert self.store is not None
        return self.store[name]

    def _new_id(self) -> str:
        taken = set(self.ids())
        return next(name for number in count(1) if (name := f"text-{number}") not in taken)


def typed_line(chat: Chat, history: Path) -> Callable[[], str | None]:
    """A function that gives the next line typed at a terminal, or `None` at the end.

    Commands, ids and files are completed, and what was typed before comes back with the arrow keys.

    Args:
        chat: whose ids are completed.
        history: file of what was typed before.

    Raises:
        ImportError: the extra `chat` is not installed.
    """
    try:
        from prompt_toolkit import PromptSession
        from prompt_toolkit.completion import NestedCompleter, PathCompleter, WordCompleter
        from prompt_toolkit.history import FileHistory
    except ModuleNotFoundError as error:
        raise ImportError('chat needs prompt_toolkit: pip install "hf-gradmem[chat]"') from error
    history.parent.mkdir(parents=True, exist_ok=True)
    paths = PathCompleter(expanduser=True)
    completer = NestedCompleter(
        dict.fromkeys(COMMANDS) | {"/write": paths, "/save": paths, "/use": WordCompleter(chat.ids, sentence=True)}
    )
    session: PromptSession[str] = PromptSession(history=FileHistory(str(history)), completer=completer)

    def next_line() -> str | None:
        try:
            return session.prompt("> ")
        except EOFError:
            return None

    return next_line
