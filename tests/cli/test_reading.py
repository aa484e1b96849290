"""`hf-gradmem inspect` and `hf-gradmem ask`."""

import json
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from hf_gradmem import GradMemConfig, GradMemMemory, get_gradmem_model
from tests.support.command_line import TEXT, mistake, run

CHAT_TEMPLATE = "{% for message in messages %}<{{ message['content'] }}>{% endfor %}"


# ------------------------------------------------------------------------------------------------ inspect


def test_inspect_tells_the_facts_of_the_memory(base: str, memory: str) -> None:
    facts = json.loads(run("inspect", memory, "--json").stdout)
    loaded = GradMemMemory.from_pretrained(memory)
    assert facts["fingerprint"] == loaded.fingerprint
    assert (facts["num_memory_tokens"], facts["hidden_size"], facts["dtype"]) == (8, 32, "float32")
    assert facts["bytes"] == 8 * 32 * 4
    (context,) = facts["contexts"]
    assert (context["tokens"], context["segments"], context["steps"]) == (len(TEXT), 1, 3)
    assert context["first_loss"] == pytest.approx(float(loaded.write_losses[0, 0]))
    assert context["last_loss"] == pytest.approx(float(loaded.write_losses[0, 2]))
    assert context["final_loss"] == pytest.approx(float(loaded.final_write_loss[0]))

    table = run("inspect", memory).stdout
    for fact in (str(len(TEXT)), f"{context['first_loss']:.4f}", "8 vectors of width 32, float32", "1,024 bytes"):
        assert fact in table


def test_inspect_with_the_model_decodes_and_weighs_the_memory(base: str, memory: str) -> None:
    (context,) = json.loads(run("inspect", memory, "--model", base, "--json").stdout)["contexts"]
    torch.manual_seed(0)  # as the commands do: the start is part of what wrote the memory
    model = get_gradmem_model(AutoModelForCausalLM.from_pretrained(base), GradMemConfig(num_memory_tokens=8))
    tokens = model.reconstruct(GradMemMemory.from_pretrained(memory))
    assert context["decoded"] == model.tokenizer.decode(tokens[0])
    # keys and values, 2 layers, 2 heads of 8, float32
    assert context["kv_cache_bytes"] == len(TEXT) * 2 * 2 * 2 * 8 * 4


def test_inspect_lists_every_context_and_decodes_those_written_whole(base: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = get_gradmem_model(AutoModelForCausalLM.from_pretrained(base), GradMemConfig(num_memory_tokens=2))
    model.write([["one", "two"], ["three"]]).save_pretrained(tmp_path)
    first, second = json.loads(run("inspect", tmp_path, "--model", base, "--json").stdout)["contexts"]
    assert (first["tokens"], first["segments"], first["decoded"]) == (6, 2, None)
    assert (second["tokens"], second["segments"], len(second["decoded"].encode()) > 0) == (5, 1, True)
    assert "written in segments" in run("inspect", tmp_path, "--model", base).stdout


def test_a_page_is_not_written_over_the_text_that_it_is_about(base: str, memory: str, tmp_path: Path) -> None:
    text = tmp_path / "notes.txt"
    text.write_text(TEXT, encoding="utf-8")
    asked = ["inspect", memory, "--model", base, "--context-file", text, "--html", tmp_path / "." / "notes.txt"]
    assert "another file of this command" in mistake(run(*asked))
    assert text.read_text(encoding="utf-8") == TEXT


# ------------------------------------------------------------------------------------------------ ask


def test_ask_prints_the_greedy_continuation(base: str, memory: str) -> None:
    result = run("ask", "When?", "--memory", memory, "--model", base, "--max-new-tokens", 6)
    torch.manual_seed(0)  # as the commands do: the start is part of what wrote the memory
    model = get_gradmem_model(AutoModelForCausalLM.from_pretrained(base), GradMemConfig(num_memory_tokens=8))
    prompt = model.tokenizer("When?", return_tensors="pt").input_ids
    loaded = GradMemMemory.from_pretrained(memory)
    tokens = model.generate(input_ids=prompt, memory=loaded, max_new_tokens=6, do_sample=False)
    assert result.stdout == model.tokenizer.decode(tokens[0, prompt.shape[1] :]) + "\n"
    as_json = run("ask", "When?", "--memory", memory, "--model", base, "--max-new-tokens", 6, "--json")
    assert json.loads(as_json.stdout)["answer"] + "\n" == result.stdout


def test_memory_that_a_base_alone_wrote_with_another_seed_is_read_with_that_seed(base: str, tmp_path: Path) -> None:
    assert run("write", TEXT, "--model", base, "--output", tmp_path, "--seed", 5).exit_code == 0
    asked = ["ask", "When?", "--memory", tmp_path, "--model", base, "--max-new-tokens", 2]
    assert "another start" in mistake(run(*asked))
    assert run(*asked, "--seed", 5).exit_code == 0
    assert run("inspect", tmp_path, "--model", base, "--seed", 5).exit_code == 0


def test_ask_puts_the_question_into_the_chat_template(base: str, memory: str, tmp_path: Path) -> None:
    options = ["--memory", memory, "--model", base, "--max-new-tokens", 6]
    assert "has no chat template" in mistake(run("ask", "When?", *options, "--template", "chat"))
    template = Path(base) / "chat_template.jinja"
    template.write_text(CHAT_TEMPLATE, encoding="utf-8")
    try:
        asked = run("ask", "When?", *options, "--template", "chat").stdout
    finally:
        template.unlink()
    assert asked == run("ask", "<When?>", *options).stdout
    assert asked != run("ask", "When?", *options).stdout


def test_ask_wants_to_know_which_of_several_memories(base: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = get_gradmem_model(AutoModelForCausalLM.from_pretrained(base), GradMemConfig(num_memory_tokens=2))
    memories = model.write(["one", "another one"], write_steps=8)
    memories.save_pretrained(tmp_path / "both")
    memories[1].save_pretrained(tmp_path / "second")
    options = ["--model", base, "--max-new-tokens", 6]
    assert "--index" in mistake(run("ask", "?", "--memory", tmp_path / "both", *options))
    assert "0..1" in mistake(run("ask", "?", "--memory", tmp_path / "both", *options, "--index", 2))
    chosen = run("ask", "?", "--memory", tmp_path / "both", *options, "--index", 1)
    assert chosen.stdout == run("ask", "?", "--memory", tmp_path / "second", *options).stdout
