"""`hf-gradmem write`."""

import json
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from hf_gradmem import GradMemConfig, GradMemMemory, cut_text, get_gradmem_model
from hf_gradmem.commands.opening import load_model
from tests.support.command_line import TEXT, mistake, run


def test_write_saves_what_the_library_would_write(base: str, tmp_path: Path) -> None:
    options = ["--steps", 5, "--learning-rate", 0.1, "--optimizer", "momentum", "--memory-tokens", 3, "--seed", 11]
    result = run("write", TEXT, "--model", base, "--output", tmp_path / "new" / "memory", *options)
    assert result.exit_code == 0, result.output

    torch.manual_seed(11)
    config = GradMemConfig(num_memory_tokens=3, write_steps=5, write_learning_rate=0.1, write_optimizer="momentum")
    model = get_gradmem_model(AutoModelForCausalLM.from_pretrained(base), config)
    expected = model.write(TEXT, measure_final_loss=True)
    saved = GradMemMemory.from_pretrained(tmp_path / "new" / "memory")
    torch.testing.assert_close(saved.embeddings, expected.embeddings, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(saved.write_losses, expected.write_losses, rtol=1e-5, atol=1e-6)
    assert saved.fingerprint == expected.fingerprint


def test_paths_below_the_home_folder_are_found_and_written_there(
    base: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A shell leaves ~ as it is within quotes."""
    for name in ("HOME", "USERPROFILE"):
        monkeypatch.setenv(name, str(tmp_path / "home"))
    monkeypatch.chdir(tmp_path)
    written = run("write", TEXT, "--model", base, "--output", "~/memory", "--steps", 1)
    assert written.exit_code == 0, written.output
    page = ["--context-file", "~/notes/text.txt", "--html", "~/tokens.html"]
    (tmp_path / "home" / "notes").mkdir()
    (tmp_path / "home" / "notes" / "text.txt").write_text(TEXT, encoding="utf-8")
    shown = run("inspect", tmp_path / "home" / "memory", "--model", base, *page)
    assert shown.exit_code == 0, shown.output
    of_folder = run("write", "--file", "~/notes", "--model", base, "--output", "~/of folder", "--steps", 1)
    assert of_folder.exit_code == 0, of_folder.output
    assert {path.name for path in (tmp_path / "home").iterdir()} == {"memory", "tokens.html", "notes", "of folder"}
    assert "is a file or folder here" in mistake(run("write", "~/notes", "--model", base, "--output", tmp_path / "no"))
    assert not (tmp_path / "~").exists()


def test_text_file_and_stdin_give_the_same_memory(base: str, memory: str, tmp_path: Path) -> None:
    (tmp_path / "context.txt").write_text(TEXT + "\n", encoding="utf-8")
    options = ["--model", base, "--steps", 3]
    assert run("write", "--file", tmp_path / "context.txt", *options, "--output", tmp_path / "file").exit_code == 0
    assert run("write", *options, "--output", tmp_path / "stdin", stdin=TEXT + "\n").exit_code == 0
    marked = (TEXT + "\r\n").encode("utf-8-sig")
    assert run("write", *options, "--output", tmp_path / "marked", stdin=marked).exit_code == 0
    expected = GradMemMemory.from_pretrained(memory).embeddings
    for source in ("file", "stdin", "marked"):
        assert torch.equal(GradMemMemory.from_pretrained(tmp_path / source).embeddings, expected)


def test_write_stops_at_the_tolerance_and_says_so(base: str, tmp_path: Path) -> None:
    options = ["--model", base, "--output", tmp_path, "--steps", 20, "--json"]
    facts = json.loads(run("write", TEXT, *options, "--tolerance", 100).stdout)
    assert facts["contexts"][0]["steps"] == 1
    facts = json.loads(run("write", TEXT, *options, "--tolerance", 0).stdout)
    assert facts["contexts"][0]["steps"] == 20


def test_an_adapter_writes_by_its_own_configuration(base: str, tmp_path: Path) -> None:
    torch.manual_seed(3)
    config = GradMemConfig(num_memory_tokens=2, write_steps=4, memory_projection=True)
    adapter = get_gradmem_model(AutoModelForCausalLM.from_pretrained(base), config)
    with torch.no_grad():
        adapter.memory_projection.weight.add_(0.1)
    adapter.save_pretrained(tmp_path / "adapter")
    options = ["--model", tmp_path / "adapter", "--output", tmp_path / "memory"]

    assert run("write", TEXT, *options).exit_code == 0
    saved = GradMemMemory.from_pretrained(tmp_path / "memory")
    torch.testing.assert_close(saved.embeddings, adapter.write(TEXT).embeddings, rtol=1e-5, atol=1e-6)
    assert "--memory-tokens" in mistake(run("write", TEXT, *options, "--memory-tokens", 3))


def test_a_text_longer_than_the_window_is_cut_and_the_report_says_into_how_many(base: str, tmp_path: Path) -> None:
    long = "\n\n".join(f"Gate {gate} opens at noon. Its ferry leaves later." for gate in range(12))
    (tmp_path / "long.txt").write_text(long, encoding="utf-8")
    options = ["--file", tmp_path / "long.txt", "--model", base, "--output", tmp_path / "memory", "--steps", 1]
    result = run("write", *options)
    assert result.exit_code == 0, result.output
    model = load_model(base)
    segments = cut_text(long, model.tokenizer, model.writer.longest_segment)
    assert f"in {len(segments)} segments" in result.stdout
    saved = GradMemMemory.from_pretrained(tmp_path / "memory")
    assert saved.segment_lengths.tolist() == [[len(segment) for segment in segments]]
    context = ["--model", base, "--context-file", tmp_path / "long.txt", "--json"]
    inspected = run("inspect", tmp_path / "memory", *context)
    assert "".join(json.loads(inspected.stdout)["token_losses"]["tokens"]) == long

    facts = json.loads(run("write", *options, "--segment-length", 30, "--json").stdout)
    assert facts["contexts"][0]["segments"] == len(cut_text(long, model.tokenizer, 30))


def test_a_folder_gives_a_memory_for_each_text_in_the_order_of_their_paths(base: str, tmp_path: Path) -> None:
    folder = tmp_path / "notes"
    for name, text in (("b.md", "second"), ("a/z.txt", "first"), ("c.rst", "not a text file here")):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text + "\n", encoding="utf-8")
    (folder / "binary.txt").write_bytes(b"\xff\xd8\xff")
    options = ["--file", folder, "--model", base, "--steps", 2]
    result = run("write", *options, "--output", tmp_path / "memory", "--json")
    assert result.exit_code == 0, result.output
    facts = json.loads(result.stdout)
    assert [(each["file"], each["tokens"]) for each in facts["contexts"]] == [("a/z.txt", 5), ("b.md", 6)]
    assert facts["skipped"] == {"binary.txt": "not text in UTF-8"}
    (line,) = result.stderr.splitlines()
    assert "Skipped 1 of 3 files: binary.txt (not text in UTF-8)" in line
    saved = GradMemMemory.from_pretrained(tmp_path / "memory")
    expected = load_model(base).write(["first", "second"], write_steps=2)
    torch.testing.assert_close(saved.embeddings, expected.embeddings, rtol=1e-5, atol=1e-6)

    strict = run("write", *options, "--output", tmp_path / "strict", "--strict")
    assert strict.exit_code == 1
    assert "1: b.md" in strict.stdout
    assert len(GradMemMemory.from_pretrained(tmp_path / "strict")) == 2
