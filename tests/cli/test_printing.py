"""What others put into files and models reaches no terminal as a command of it, and is not read as markup."""

import json
from pathlib import Path

import pytest
import torch
from transformers import PreTrainedTokenizerFast

from hf_gradmem import GradMemMemory
from hf_gradmem.evaluation.tokens import TokenLosses
from hf_gradmem_cli.plain import PlainConsole
from hf_gradmem_cli.printing import print_facts, print_results, print_tokens
from tests.support.command_line import mistake, run

HOSTILE = "a\x1b]0;title\x07\x1b[2Jb\x9b31mc\x7fd\re"
SHOWN = "a␛]0;title␇␛[2Jb�31mc␡d␍e"
COMMANDS = {chr(code) for code in [*range(0x20), *range(0x7F, 0xA0)]} - {"\n", "\t"}


@pytest.fixture
def hostile_memory(memory: str, tmp_path: Path) -> Path:
    loaded = GradMemMemory.from_pretrained(memory)
    loaded.fingerprint = HOSTILE
    loaded.save_pretrained(tmp_path / "hostile")
    return tmp_path / "hostile"


def test_a_fingerprint_moves_no_cursor(base: str, hostile_memory: Path) -> None:
    shown = run("inspect", hostile_memory).stdout
    assert not COMMANDS & set(shown)
    assert "␛]0;title" in shown
    refused = mistake(run("ask", "?", "--memory", hostile_memory, "--model", base))
    assert not COMMANDS & set(refused)
    assert "␛]0;title" in refused
    assert not COMMANDS & set(run("--verbose", "ask", "?", "--memory", hostile_memory, "--model", base).stderr)


def test_json_gives_back_every_character_and_prints_no_command(hostile_memory: Path) -> None:
    printed = run("inspect", hostile_memory, "--json").stdout
    assert not COMMANDS & set(printed)
    assert json.loads(printed)["fingerprint"] == HOSTILE


def test_an_answer_of_control_characters_is_shown_and_not_obeyed(
    base: str, memory: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(PreTrainedTokenizerFast, "decode", lambda *_, **__: HOSTILE + "\nmore")
    shown = run("ask", "?", "--memory", memory, "--model", base, "--max-new-tokens", 2).stdout
    assert shown == f"{SHOWN}\nmore\n"


def test_names_of_results_are_no_markup(capsys: pytest.CaptureFixture) -> None:
    record = {"model": "m", "set": "[red]n4[/] [/bold]", "context": HOSTILE, "write_steps": 1, "exact_match": 1.0}
    print_results([record])
    shown = capsys.readouterr().out
    assert "[red]n4[/] [/bold]" in shown
    assert not COMMANDS & set(shown)


MODELS = ["runs/a-rather-long-name-of-a-run/gradmem-kv-first", "hf_gradmem/pretrained/gradmem-kv-tiny"]
MEASURES = ["exact_match", "f1", "teacher_forced_exact_match", "answer_loss", "num_answers"]
MEASURES += ["write_loss", "start_loss", "base_loss", "bits_over_start", "bits_over_base"]


@pytest.mark.parametrize("names", [["n4"], ["n4 num_pairs=16", "validation key_length=2 value_length=2 seed=11"]])
@pytest.mark.parametrize("models", [MODELS[:1], MODELS], ids=["one model", "two models"])
def test_every_result_is_shown_at_eighty_columns(
    models: list[str], names: list[str], capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    records, figures = [], []
    for model in models:
        for name in names:
            record = {"model": model, "set": name, "context": "memory", "write_steps": 2}
            for measure in MEASURES:
                figures.append(1000.0 + len(figures) * 1.0101 if "bits" in measure else 0.1 + len(figures) * 0.0011)
                record[measure] = figures[-1]
            records.append(record)
    print_results(records)
    shown = capsys.readouterr().out
    assert max(map(len, shown.splitlines())) <= 80
    assert "…" not in shown
    words = shown.split()
    assert [figure for figure in figures if f"{figure:.4f}" not in words] == []
    for word in " ".join(names).split():
        assert word in words
    if len(models) > 1:
        places = [shown.index(model) for model in models]
        assert places == sorted(places)


def test_names_and_values_of_facts_are_no_markup(capsys: pytest.CaptureFixture) -> None:
    print_facts([("[red]name[/]", "[/bold]" + HOSTILE)])
    shown = capsys.readouterr().out
    assert "[red]name[/]" in shown
    assert "[/bold]" in shown
    assert not COMMANDS & set(shown)


def test_tokens_of_a_context_are_shown_and_keep_their_colours(capsys: pytest.CaptureFixture) -> None:
    losses = torch.tensor([0.0, 8.0])
    print_tokens(TokenLosses(["\x1b[2J", "[/red]"], losses, losses, losses))
    shown = capsys.readouterr().out
    assert not COMMANDS & set(shown)
    assert "␛[2J[/red]" in shown
    console = PlainConsole(force_terminal=True, color_system="truecolor")
    with console.capture() as captured:
        console.print("\x1b[2J", style="red")
    assert captured.get() == "\x1b[31m␛[2J\x1b[0m\n"
