"""`hf-gradmem write`."""

import json
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM

from hf_gradmem import GradMemConfig, GradMemMemory, get_gradmem_model
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


def test_text_file_and_stdin_give_the_same_memory(base: str, memory: str, tmp_path: Path) -> None:
    (tmp_path / "context.txt").write_text(TEXT + "\n", encoding="utf-8")
    options = ["--model", base, "--steps", 3]
    assert run("write", "--file", tmp_path / "context.txt", *options, "--output", tmp_path / "file").exit_code == 0
    assert run("write", *options, "--output", tmp_path / "stdin", stdin=TEXT + "\n").exit_code == 0
    expected = GradMemMemory.from_pretrained(memory).embeddings
    for source in ("file", "stdin"):
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
