"""The pages of the documentation: what they show is run, their commands are parsed, and the site is built and its links
are followed.

Each page is one program, in the order in which it is read, in a directory of its own with the package's adapters: its
Python blocks, and of its commands those that take seconds. A file that a page shows, a block right after its name and a
colon, is written there. Pages with the pretrained model are slow, and have the demo's copy of it.
"""

import os
import re
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urlsplit

import pytest
import torch
from rich.console import Console
from typer.testing import CliRunner

from hf_gradmem import GradMemForCausalLM
from hf_gradmem.commands.packaged import HUB_NAME, RETRIEVAL_ADAPTER, find_demo_model
from hf_gradmem.serving.serve import make_server
from hf_gradmem.training.recipe import load_recipe
from hf_gradmem_cli import app
from tests.support.documents import (
    Block,
    blocks,
    check_commands,
    commands,
    commands_in_text,
    commands_of,
    links,
    run_block,
)
from tests.support.small_models import small_tokenizer
from tests.support.tiny_models import tiny_causal_lm

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"
PAGES = sorted(path for path in DOCS.rglob("*.md") if path != DOCS / "architecture.md")
SERVED = "127.0.0.1:8000"
CHEAP_COMMANDS = {"ask", "export", "inspect", "push", "write", "write-dataset"}
NOTES = "Gate 7 opens at 06:45."
_FILE = re.compile(r"`([\w./-]+\.\w+)`(?:(?!\n\n|```).)*?:\n\n```\w+\n(.*?)^```$", re.MULTILINE | re.DOTALL)


def named(page: Path) -> str:
    return page.relative_to(DOCS).as_posix()


def is_slow(page: Path) -> bool:
    """Whether it needs the pretrained model itself, and not any base in its place."""
    return any("find_demo_model" in block.code for block in blocks(page, "python"))


def files_shown(page: Path) -> dict[str, str]:
    """The files that a page shows, by name."""
    return dict(_FILE.findall(page.read_text(encoding="utf-8")))


RUN = [
    pytest.param(page, id=named(page), marks=[pytest.mark.slow] if is_slow(page) else [])
    for page in PAGES
    if blocks(page, "python") or files_shown(page)
]


@pytest.fixture
def directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where a page is run: with the adapters of the package, and a text."""
    (tmp_path / "hf_gradmem").mkdir()
    (tmp_path / "hf_gradmem" / "pretrained").symlink_to(RETRIEVAL_ADAPTER.parent)
    (tmp_path / "notes.txt").write_text(NOTES, encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def any_base(tmp_path: Path) -> str:
    """A decoder that has a name and a tokenizer, in the place of a pretrained one."""
    directory = tmp_path / "any-base"
    tiny_causal_lm("llama", torch.float32).save_pretrained(directory)
    small_tokenizer().save_pretrained(directory)
    return str(directory)


@pytest.fixture
def address() -> Iterator[str]:
    """Where the tiny adapter is served."""
    server = make_server(
        GradMemForCausalLM.from_pretrained(RETRIEVAL_ADAPTER),
        model_name=RETRIEVAL_ADAPTER.name,
        memories=None,
        keep=None,
        host="127.0.0.1",
        port=0,
        token=None,
        batch_size=4,
        max_waiting=8,
        max_body=1 << 16,
        max_memories=10,
        timeout=60.0,
        max_new_tokens=8,
    )
    thread = threading.Thread(target=server.run)
    thread.start()
    while not server.started:
        assert thread.is_alive()
        time.sleep(0.01)
    yield f"127.0.0.1:{server.servers[0].sockets[0].getsockname()[1]}"
    server.should_exit = True
    thread.join(20)


def run_shell(block: Block, page: str, replaced: dict[str, str]) -> None:
    """Run the commands of a block that take seconds, and hold what they print against what the page has."""
    printed = []
    for program, *arguments in commands_of(block):
        words = [replaced.get(word, word) for word in arguments]
        typed = None
        if "<" in words:
            typed, words = Path(words[-1]).read_text(encoding="utf-8"), words[: words.index("<")]
        if program == "hf-gradmem" and (words[0] in CHEAP_COMMANDS or typed is not None):
            result = CliRunner().invoke(app, words, input=typed)
            assert result.exit_code == 0, (page, block.line, words, result.output)
            printed = result.stdout.splitlines()
        elif program == "curl" and shutil.which("curl"):
            url = next(word for word in words if SERVED in word)
            words[words.index(url)] = url.replace(SERVED, replaced[SERVED])
            result = subprocess.run(["curl", "--fail", *words], capture_output=True, text=True, check=False)
            assert result.returncode == 0, (page, block.line, words, result.stdout, result.stderr)
    if block.expected:
        assert printed[-len(block.expected) :] == block.expected, f"{page}, line {block.line}"


@pytest.mark.parametrize("page", RUN)
def test_a_page_runs_in_its_order_and_prints_what_it_says(
    page: Path, directory: Path, request: pytest.FixtureRequest
) -> None:
    for name, text in files_shown(page).items():
        (directory / name).parent.mkdir(exist_ok=True)
        (directory / name).write_text(text, encoding="utf-8")
    found = blocks(page, "python", "sh")
    replaced = {}
    if any(HUB_NAME in block.code for block in found):
        replaced[HUB_NAME] = request.getfixturevalue("any_base")
    if any(SERVED in block.code for block in found):
        replaced[SERVED] = request.getfixturevalue("address")
    if any("push" in block.code for block in found):
        request.getfixturevalue("hub")
    if is_slow(page):
        try:
            find_demo_model(Console(quiet=True))
        except FileNotFoundError as error:
            pytest.skip(str(error))
    namespace: dict[str, object] = {"__name__": "__main__"}
    for block in found:
        if block.language == "python":
            for name, stand_in in replaced.items():
                block.code = block.code.replace(name, stand_in)
            run_block(block, named(page), namespace)
        elif not is_slow(page):  # whose commands take the base from the Hub
            run_shell(block, named(page), replaced)


@pytest.mark.parametrize("page", PAGES, ids=named)
def test_what_is_printed_stands_where_it_is_printed(page: Path) -> None:
    silent = [block.line for block in blocks(page, "python") if block.prints_unsaid]
    assert silent == [], "blocks that print, at these lines, and do not say what"


@pytest.mark.parametrize("page", PAGES, ids=named)
def test_commands_exist_with_their_options(page: Path) -> None:
    check_commands(commands(page) + commands_in_text(page))


def options_named(text: str) -> list[str]:
    """The options that stand in code within a text, as `--token`."""
    return re.findall(r"`(--[\w-]+)[^`]*`", text)


def test_options_named_alone_are_options_of_some_command() -> None:
    help_texts = (DOCS / "howto", DOCS)
    group = CliRunner().invoke(app, ["--help"]).output
    names = set(re.findall(r"^[│ ]+([a-z][a-z-]+) ", group, re.MULTILINE))
    known = set()
    for name in names:
        known |= set(re.findall(r"--[\w-]+", CliRunner().invoke(app, [name, "--help"]).output))
    assert {"--memories", "--token", "--format"} <= known
    unknown = {
        option
        for page in {path for place in help_texts for path in place.glob("*.md")}
        for option in options_named(page.read_text(encoding="utf-8"))
        if option not in known
    }
    assert unknown == set()


@pytest.mark.parametrize(
    ("page", "name"), [(page, name) for page in PAGES for name in files_shown(page) if name.endswith(".yaml")]
)
def test_recipes_that_are_shown_can_be_trained(page: Path, name: str, directory: Path) -> None:
    (directory / name).write_text(files_shown(page)[name], encoding="utf-8")
    assert load_recipe(directory / name).arguments.curriculum


@pytest.mark.parametrize("page", PAGES, ids=named)
def test_links_to_files_lead_somewhere(page: Path) -> None:
    made = {"cli.md"}  # from the command line's own help
    assert [link for link in links(page) if link not in made and not (page.parent / link).exists()] == []


_FIGURE = re.compile(r"\d*\.\d+")


def test_figures_of_when_it_pays_stand_in_the_files_that_it_names() -> None:
    page = DOCS / "when.md"
    text = page.read_text(encoding="utf-8")
    before, table = text.split("| layers |")[0], text.split("| layers |")[1].split("\n\n")[0]
    (name,) = [link for link in re.findall(r"\]\(([^)]+\.md)\)", before) if "performance" in link]
    measured = (page.parent / name).read_text(encoding="utf-8").split("## READ")[1].splitlines()
    rows = table.splitlines()[2:]
    assert len(rows) == 8
    shapes = {"8": "smollm2-8-layers", "30": "smollm2"}
    for row in rows:
        layers, context, at_once, *figures = [cell.strip() for cell in row.strip("| ").split("|")]
        start = f"| {shapes[layers]} | {context.replace(',', '')} | {at_once} |"
        (there,) = [line for line in measured if line.startswith(start)]
        assert [figure for figure in figures if f" {figure} |" not in there] == [], row

    answers = text.split("| what | exact match | file |")[1].split("\n\n")[0].splitlines()[2:]
    assert len(answers) == 21
    linked = ""
    for _, figures, file in (row.strip("| ").split(" | ") for row in answers):
        found = re.search(r"\]\(([^)]+)\)", file)
        linked = linked if found is None else (page.parent / found[1]).read_text(encoding="utf-8")
        assert [figure for figure in _FIGURE.findall(figures) if figure.removeprefix("0") not in linked] == [], figures


# ------------------------------------------------------------------------------------------------ the built site


class References(HTMLParser):
    """What a page refers to, and the places in it that others can refer to."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.referred: list[str] = []
        self.places: set[str] = {""}
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        """Called for each element."""
        for name, value in attrs:
            if value is not None and name in ("href", "src"):
                self.referred.append(value)
            elif value is not None and name in ("id", "name"):
                self.places.add(value)


def broken_references(site: Path) -> list[str]:
    """References of the site's pages, relative ones, that lead to no file or to no place in a page."""
    pages = {path: References(path.read_text(encoding="utf-8")) for path in site.rglob("*.html")}
    broken = []
    for path, page in pages.items():
        for reference in page.referred:
            parts = urlsplit(reference)
            if parts.scheme or parts.netloc or path.name == "404.html":  # which is shown in any folder
                continue
            target = Path(os.path.normpath(path.parent / unquote(parts.path))) if parts.path else path
            target = target / "index.html" if target.is_dir() else target
            if not target.is_file():
                broken.append(f"{path.relative_to(site)}: {reference}")
            elif target in pages and unquote(parts.fragment) not in pages[target].places:
                broken.append(f"{path.relative_to(site)}: {reference} (no such place)")
    return broken


def fetched_from_elsewhere(site: Path) -> list[str]:
    """Scripts, styles and pictures that a page would load over the network."""
    elsewhere = re.compile(r"<(?:script|link|img|iframe)\b[^>]*?(?:src|href)=[\"']?((?:https?:)?//[^\"'\s>]+)")
    return [
        f"{path.relative_to(site)}: {url}"
        for path in site.rglob("*.html")
        for url in elsewhere.findall(path.read_text(encoding="utf-8"))
    ]


@pytest.mark.slow
def test_the_site_is_built_in_silence_and_every_reference_in_it_leads_somewhere(tmp_path: Path) -> None:
    environment = os.environ | {"NO_MKDOCS_2_WARNING": "1"}  # as the Makefile has it
    command = [sys.executable, "-m", "mkdocs", "build", "--quiet", "--site-dir", str(tmp_path)]
    result = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert (result.returncode, result.stdout, result.stderr) == (0, "", "")
    for notebook in (ROOT / "notebooks").glob("*.ipynb"):
        shown = (tmp_path / "notebooks" / f"{notebook.stem}.html").read_text(encoding="utf-8")
        assert "jp-OutputArea-output" in shown, notebook.name  # what is kept in it, as nothing is run
    assert broken_references(tmp_path) == []
    assert fetched_from_elsewhere(tmp_path) == []


def test_broken_references_are_found(tmp_path: Path) -> None:
    (tmp_path / "other.html").write_text('<h1 id="here"></h1>')
    (tmp_path / "page.html").write_text(
        '<a href="other.html#here"></a><a href="other.html#there"></a><img src="gone.png"><a href="https://a.b/c"></a>'
        '<script src="https://a.b/c.js"></script>'
    )
    assert broken_references(tmp_path) == ["page.html: other.html#there (no such place)", "page.html: gone.png"]
    assert fetched_from_elsewhere(tmp_path) == ["page.html: https://a.b/c.js"]
