"""README.md and the model cards, run as they are written.

The Python blocks of a document run in order, as one program, offline, in a directory with a copy of model_cards/ alone.
Every command of a shell block, or in the text with its options, is read by the command line's own parser, and the cheap
ones of README's shell blocks are run. A block that cannot be run here says so before it: `<!-- not run: why -->`.

One thing is replaced: the Hub name of SmolLM2 by the copy of it that the demo unpacks.
"""

import contextlib
import io
import re
import shlex
import shutil
from dataclasses import dataclass
from itertools import zip_longest
from pathlib import Path

import pytest
import typer
from rich.console import Console
from typer.testing import CliRunner

from hf_gradmem.commands.demo import HUB_NAME, find_demo_model
from hf_gradmem_cli import app

ROOT = Path(__file__).parents[1]
DOCUMENTS = [ROOT / "README.md", *sorted(ROOT.glob("model_cards/*/README.md"))]
_FENCE = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
_NOT_RUN = re.compile(r"<!-- not run: \S.*-->\s*\Z")
_PRINTED = re.compile(r"^ *print\(.*\)(?:  |\n)# (.*)$", re.MULTILINE)
_PRINTS = re.compile(r"^ *print\(", re.MULTILINE)
_INLINE = re.compile(r"`(hf-gradmem [^`]+)`")
_LINK = re.compile(r"\]\(([^)\s#]+)(?:#[^)\s]*)?\)")
# Run in the directory of the Python blocks; the others train, upload, or take minutes and have tests of their own.
CHEAP_COMMANDS = {"write", "ask", "inspect", "export"}
NOTES = "The ferry leaves at 06:45 from gate 7."


@dataclass
class Block:
    """A fenced block of a document, with the text that it is said to print."""

    language: str
    code: str
    line: int
    expected: list[str]


def blocks(document: Path, *languages: str) -> list[Block]:
    """The blocks in these languages that are to be run. One without a language, right after one, is what it prints."""
    text = document.read_text(encoding="utf-8")
    fences = list(_FENCE.finditer(text))
    found = []
    for fence, following in zip_longest(fences, fences[1:]):
        language, code = fence.groups()
        if language not in languages or _NOT_RUN.search(text, endpos=fence.start()):
            continue
        expected = _PRINTED.findall(code)
        if following is not None and not following[1] and not text[fence.end() : following.start()].strip():
            expected = following[2].rstrip("\n").split("\n")
        found.append(Block(language, code, text.count("\n", 0, fence.start()) + 2, expected))
    return found


def commands(document: Path) -> list[list[str]]:
    """Each command of the shell blocks, as words: without comments, and the last one of a pipe."""
    lines = [line for block in blocks(document, "sh", "bash") for line in block.code.replace("\\\n", " ").splitlines()]
    found = []
    for line in lines:
        words = shlex.split(line.removeprefix("$ ").rpartition(" | ")[2], comments=True)
        while words and re.fullmatch(r"[A-Z_]+=.*", words[0]):
            words = words[1:]
        found += [words] if words else []
    return found


def named(document: Path) -> str:
    return document.relative_to(ROOT).as_posix()


def parametrized(*languages: str) -> list:
    """Each document with blocks in these languages; slow where they name the pretrained model."""
    given = []
    for document in DOCUMENTS:
        found = blocks(document, *languages)
        if found:
            marks = [pytest.mark.slow] if any(HUB_NAME in block.code for block in found) else []
            given.append(pytest.param(document, id=named(document), marks=marks))
    return given


@pytest.fixture
def smollm2() -> str:
    try:
        return find_demo_model(Console(quiet=True))
    except FileNotFoundError as error:
        pytest.skip(str(error))


@pytest.fixture
def empty_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where the blocks run: nothing but the model cards that a clone has, and the file that README's commands read."""
    shutil.copytree(ROOT / "model_cards", tmp_path / "model_cards")
    (tmp_path / "notes.txt").write_text(NOTES, encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.parametrize("document", parametrized("python"))
def test_python_blocks_run_in_order_and_print_what_they_say(
    document: Path, empty_directory: Path, request: pytest.FixtureRequest
) -> None:
    namespace: dict[str, object] = {"__name__": "__main__"}
    for block in blocks(document, "python"):
        code = block.code
        if HUB_NAME in code:
            code = code.replace(HUB_NAME, request.getfixturevalue("smollm2"))
        place = f"{named(document)}, line {block.line}"
        printed = io.StringIO()
        with contextlib.redirect_stdout(printed):
            exec(compile("\n" * (block.line - 1) + code, named(document), "exec"), namespace)
        if block.expected:
            assert printed.getvalue().strip().splitlines() == block.expected, place


@pytest.mark.parametrize("document", DOCUMENTS, ids=named)
def test_what_is_printed_stands_where_it_is_printed(document: Path) -> None:
    silent = [block.line for block in blocks(document, "python") if _PRINTS.search(block.code) and not block.expected]
    assert silent == [], "blocks that print, at these lines, and do not say what"


def commands_in_text(document: Path) -> list[list[str]]:
    """Each command that stands in the text with options, as words."""
    text = _FENCE.sub("", document.read_text(encoding="utf-8"))
    return [shlex.split(command) for command in _INLINE.findall(text) if " --" in command]


@pytest.mark.parametrize("document", DOCUMENTS, ids=named)
def test_commands_exist_with_their_options(document: Path) -> None:
    group = typer.main.get_command(app)
    targets = set(re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE))
    for program, *arguments in commands(document) + commands_in_text(document):
        if program == "make":
            assert {word for word in arguments if "=" not in word and not word.startswith("-")} <= targets, arguments
        elif program == "hf-gradmem":
            context = group.make_context("hf-gradmem", list(arguments))
            name, command, rest = group.resolve_command(context, [*context._protected_args, *context.args])
            command.make_context(name, rest, parent=context)  # raises what the user would be told


@pytest.mark.slow
def test_cheap_commands_of_readme_run(empty_directory: Path, smollm2: str) -> None:
    for program, *arguments in commands(ROOT / "README.md"):
        if program == "hf-gradmem" and arguments[0] in CHEAP_COMMANDS:
            result = CliRunner().invoke(app, [smollm2 if word == HUB_NAME else word for word in arguments])
            assert result.exit_code == 0, (arguments, result.output)


@pytest.mark.parametrize("document", DOCUMENTS, ids=named)
def test_links_to_files_lead_somewhere(document: Path) -> None:
    links = [link for link in _LINK.findall(document.read_text(encoding="utf-8")) if "://" not in link]
    assert [link for link in links if not (document.parent / link).exists()] == []
