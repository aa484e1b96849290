"""README.md and the model cards, run as they are written.

The Python blocks of README run in order, as one program, offline, in a directory with a copy of model_cards/ alone.
Those of a model card run in an empty one, as a visitor of the Hub finds them: model_cards/ is pushed to a server here,
and the card and all that it loads come from there.

Every command of a shell block, or in the text with its options, is read by the command line's own parser, and the cheap
ones of README's shell blocks are run. A block that cannot be run here says so before it: `<!-- not run: why -->`.

One thing is replaced: the Hub name of SmolLM2 by the copy of it that the demo unpacks.
"""

import json
import re
import shutil
from pathlib import Path

import pytest
from huggingface_hub import ModelCard
from rich.console import Console
from typer.testing import CliRunner

from benchmarks.cards import card_with_figures
from hf_gradmem.commands.packaged import HUB_NAME, find_demo_model
from hf_gradmem.commands.push import push
from hf_gradmem_cli import app
from tests.support.documents import LINK, blocks, check_commands, commands, commands_in_text, links, run_block

ROOT = Path(__file__).parents[1]
DOCUMENTS = [ROOT / "README.md", *sorted(ROOT.glob("model_cards/*/README.md"))]
# Run in the directory of the Python blocks; the others train, upload, or take minutes and have tests of their own.
CHEAP_COMMANDS = {"write-dataset", "ask"}
NOTES = "The lighthouse was built in 1871 by the engineer Tobias Dahl."


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
    """Where the blocks run: the model cards that a clone has, and the folder that README's commands read."""
    shutil.copytree(ROOT / "model_cards", tmp_path / "model_cards")
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes" / "lighthouse.txt").write_text(NOTES, encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def as_visited(document: Path, directory: Path, request: pytest.FixtureRequest) -> Path:
    """The document where its reader finds it: a card on the Hub, with nothing of ours in the directory."""
    if document.parent == ROOT:
        return document
    hub = request.getfixturevalue("hub")
    push(ROOT / "model_cards", "me")
    shutil.rmtree(directory / "model_cards")
    card = directory / "README.md"
    card.write_bytes(hub.repos[f"me/{document.parent.name}"].files["README.md"])
    return card


@pytest.mark.parametrize("document", parametrized("python"))
def test_python_blocks_run_in_order_and_print_what_they_say(
    document: Path, empty_directory: Path, request: pytest.FixtureRequest
) -> None:
    namespace: dict[str, object] = {"__name__": "__main__"}
    for block in blocks(as_visited(document, empty_directory, request), "python"):
        if HUB_NAME in block.code:
            block.code = block.code.replace(HUB_NAME, request.getfixturevalue("smollm2"))
        run_block(block, named(document), namespace)


@pytest.mark.parametrize("document", DOCUMENTS, ids=named)
def test_what_is_printed_stands_where_it_is_printed(document: Path) -> None:
    silent = [block.line for block in blocks(document, "python") if block.prints_unsaid]
    assert silent == [], "blocks that print, at these lines, and do not say what"


@pytest.mark.parametrize("document", DOCUMENTS, ids=named)
def test_commands_exist_with_their_options(document: Path) -> None:
    check_commands(commands(document) + commands_in_text(document))


@pytest.mark.slow
def test_cheap_commands_of_readme_run(empty_directory: Path, smollm2: str) -> None:
    for program, *arguments in commands(ROOT / "README.md"):
        if program == "hf-gradmem" and arguments[0] in CHEAP_COMMANDS:
            result = CliRunner().invoke(app, [smollm2 if word == HUB_NAME else word for word in arguments])
            assert result.exit_code == 0, (arguments, result.output)


@pytest.mark.parametrize("document", DOCUMENTS, ids=named)
def test_links_to_files_lead_somewhere(document: Path) -> None:
    assert [link for link in links(document) if not (document.parent / link).exists()] == []


CARDS = DOCUMENTS[1:]
_LOADED = re.compile(r'(?:from_pretrained\(|get_gradmem_model\(\w+, )"([^"]+)"')


@pytest.mark.parametrize("document", CARDS, ids=named)
def test_a_card_loads_by_the_name_of_its_repository_and_says_how_to_install(document: Path) -> None:
    code = "".join(block.code for block in blocks(document, "python"))
    assert _LOADED.findall(code) == [f"your-name/{document.parent.name}"]  # a push puts the namespace there
    text = document.read_text(encoding="utf-8")
    assert 0 < text.index("pip install .") < text.index("```python")


@pytest.mark.parametrize("document", CARDS, ids=named)
def test_a_card_has_the_figures_of_the_files_beside_it(document: Path) -> None:
    text = document.read_text(encoding="utf-8")
    assert text == card_with_figures(document.parent), "run `python -m benchmarks.cards`"
    results = json.loads((document.parent / "results.json").read_text(encoding="utf-8"))["results"]
    scores = {(score.metric_type, score.metric_value) for score in ModelCard(text).data.eval_results}
    assert {("exact_match", record["exact_match"]) for record in results} <= scores
    tables = text.split("## Results", 1)[1]
    for record in results:  # to three or four places, with or without the 0
        shown = [f"{record['exact_match']:.{places}f}" for places in (3, 4)]
        assert any(figure in tables or figure.removeprefix("0") in tables for figure in shown), record


def test_readme_says_how_to_install_before_anything_is_run() -> None:
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    assert text.index("pip install .") < text.index("```python")
    assert text.index("pip install .") < text.index("make demo")


_ROW = re.compile(r"^\| (.+) \| (.+) \| (.+) \|$", re.MULTILINE)


def test_each_measured_figure_of_readme_has_its_file_and_command() -> None:
    section = (ROOT / "README.md").read_text(encoding="utf-8").split("## What was measured")[1].split("\n## ")[0]
    rows = [row for row in _ROW.findall(section) if row[0] != "what"]
    assert len(rows) >= 8
    for row in rows:
        assert LINK.search(row[2]), row
        assert "`" in row[2] or "command" in row[2], row


def test_figures_that_stand_in_a_table_of_theirs_are_those() -> None:
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    rows = (ROOT / "benchmarks/results/transformers_tests.md").read_text(encoding="utf-8")
    passed = re.findall(r"^\| (?:Llama|GPT-2) \| (\d+) \| (\d+) \| 0 \|", rows, re.MULTILINE)
    assert f"{passed[0][0]} and {passed[1][0]} pass on two bases, none fails ({passed[0][1]} more" in text
    assert passed[0][1] == passed[1][1]
    table = (ROOT / "benchmarks/results/architectures.md").read_text(encoding="utf-8")
    found = re.search(r"(\d+) of the (\d+) causal", table)
    assert f"Of the {found[2]} causal language models of Transformers {found[1]} pass" in text
    curve = json.loads((ROOT / "model_cards/gradmem-kv-tiny/curve.json").read_text(encoding="utf-8"))
    name = "eval_n8_exact_match"
    first = min(point["step"] for point in curve if point.get(name, 0) >= 0.99)
    assert f"gradmem-kv-tiny | {first} |" in text
