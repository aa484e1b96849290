"""What documents say and show: their blocks of code, commands and links, read so that tests can hold them to it."""

import contextlib
import io
import re
import shlex
import textwrap
from collections.abc import Iterable
from dataclasses import dataclass
from itertools import zip_longest
from pathlib import Path

import typer

from hf_gradmem_cli import app

ROOT = Path(__file__).parents[2]
_FENCE = re.compile(r"^( *)```(\w*)\n(.*?)^\1```$", re.MULTILINE | re.DOTALL)
_NOT_RUN = re.compile(r"<!-- not run: \S.*-->\s*\Z")
_PRINTED = re.compile(r"^ *print\(.*\)(?:  |\n)# (.*)$", re.MULTILINE)
_PRINTS = re.compile(r"^ *print\(", re.MULTILINE)
_INLINE = re.compile(r"`(hf-gradmem [^`]+)`")
LINK = re.compile(r"\]\(([^)\s#]+)(?:#[^)\s]*)?\)")


@dataclass
class Block:
    """A fenced block of a document, with the text that it is said to print.

    Attributes:
        language: that stands behind its fence.
        code: what is in it, without the indent that a list or a tab gives it.
        line: of the document, that its first line is.
        expected: the lines that it prints, as the document has them.
    """

    language: str
    code: str
    line: int
    expected: list[str]

    @property
    def prints_unsaid(self) -> bool:
        """Whether it prints, and the document does not have what."""
        return bool(_PRINTS.search(self.code)) and not self.expected


def blocks(document: Path, *languages: str) -> list[Block]:
    """The blocks in these languages that are to be run. One without a language, right after one, is what it prints."""
    text = document.read_text(encoding="utf-8")
    fences = list(_FENCE.finditer(text))
    found = []
    for fence, following in zip_longest(fences, fences[1:]):
        _, language, code = fence.groups()
        if language not in languages or _NOT_RUN.search(text, endpos=fence.start()):
            continue
        expected = _PRINTED.findall(code)
        if following is not None and not following[2] and not text[fence.end() : following.start()].strip():
            expected = textwrap.dedent(following[3]).rstrip("\n").split("\n")
        found.append(Block(language, textwrap.dedent(code), text.count("\n", 0, fence.start()) + 2, expected))
    return found


def run_block(block: Block, document: str, namespace: dict[str, object]) -> None:
    """Run a block, and hold what it prints against what the document has.

    Args:
        block: of Python.
        document: its name, which an error and its line are told with.
        namespace: that blocks of one document share.
    """
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        # As many lines before it as in the document, so that an error names the line there.
        exec(compile("\n" * (block.line - 1) + block.code, document, "exec"), namespace)
    if block.expected:
        assert printed.getvalue().strip().splitlines() == block.expected, f"{document}, line {block.line}"


def commands(document: Path) -> list[list[str]]:
    """Each command of the shell blocks, as words: without comments, and the last one of a pipe."""
    return [words for block in blocks(document, "sh", "bash") for words in commands_of(block)]


def commands_of(block: Block) -> list[list[str]]:
    """Each command of a shell block, as words; `<` is one, before the file that stdin is."""
    found = []
    for line in block.code.replace("\\\n", " ").splitlines():
        words = shlex.split(line.removeprefix("$ ").rpartition(" | ")[2], comments=True)
        while words and re.fullmatch(r"[A-Z_]+=.*", words[0]):
            words = words[1:]
        found += [words] if words else []
    return found


def commands_in_text(document: Path) -> list[list[str]]:
    """Each command that stands in the text with options, as words."""
    text = _FENCE.sub("", document.read_text(encoding="utf-8"))
    return [shlex.split(command) for command in _INLINE.findall(text) if " --" in command]


def links(document: Path) -> list[str]:
    """The files that the text links to, as they are written."""
    text = _FENCE.sub("", document.read_text(encoding="utf-8"))
    return [link for link in LINK.findall(text) if "://" not in link]


def check_commands(given: Iterable[list[str]]) -> None:
    """Have the command line's own parser read commands, and look up the targets of `make`.

    Raises:
        AssertionError: there is no such target.
        typer.BadParameter: there is no such command or option; what the user would be told.
    """
    group = typer.main.get_command(app)
    targets = set(re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE))
    for program, *arguments in given:
        if program == "make":
            assert {word for word in arguments if "=" not in word and not word.startswith("-")} <= targets, arguments
        elif program == "hf-gradmem":
            arguments = arguments[: arguments.index("<")] if "<" in arguments else arguments
            context = group.make_context("hf-gradmem", list(arguments))
            name, command, rest = group.resolve_command(context, [*context._protected_args, *context.args])
            command.make_context(name, rest, parent=context)
