"""`hf-gradmem push`, and the other commands beside the Hub."""

import json
import shutil

import torch
from huggingface_hub import HfApi, constants
from transformers import AutoModel
from typer.testing import CliRunner

from hf_gradmem import GradMemConfig, GradMemMemory, get_gradmem_model
from hf_gradmem_cli import app
from tests.support.hub_server import READER_TOKEN, log_in
from tests.support.on_the_hub import (
    ADAPTER,
    ADAPTER_FILES,
    CONTEXT,
    MEMORY,
    files,
    forget,
    logits,
    pushed_adapter,
)
from tests.support.small_models import PLAIN, named_base, small_tokenizer, with_memory


def cli(*arguments: object):
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


def mistake(result) -> str:
    assert result.exit_code == 2, result.output
    assert len(result.stderr.splitlines()) == 1
    return result.stderr


def test_push_command_uploads_an_adapter_directory_and_a_memory(hub, hub_base, tmp_path):
    model = with_memory(hub_base, **PLAIN)
    model.save_pretrained(tmp_path / "adapter")
    (tmp_path / "adapter" / "training_args.bin").write_bytes(b"pickled")
    model.write(input_ids=CONTEXT).save_pretrained(tmp_path / "memory")
    result = cli("push", tmp_path / "adapter", ADAPTER, "--private", "--message", "first", "--json")
    assert result.exit_code == 0, result.output
    (pushed,) = json.loads(result.stdout)["pushed"]
    assert pushed["repo_id"] == ADAPTER
    assert pushed["commit"] == HfApi().model_info(ADAPTER).sha
    assert hub.repos[ADAPTER].private
    assert files(hub, ADAPTER) == ADAPTER_FILES
    assert f'from_pretrained("{ADAPTER}")' in hub.repos[ADAPTER].files["README.md"].decode()
    result = cli("push", tmp_path / "memory" / "memory.safetensors", MEMORY, "--revision", "may")
    assert result.stdout.startswith("Pushed: ")
    assert len(GradMemMemory.from_pretrained(MEMORY, revision="may")) == 2
    assert torch.equal(logits(AutoModel.from_pretrained(ADAPTER)), logits(model))


def test_push_command_takes_every_folder_with_weights(hub, hub_base, tmp_path):
    cards = tmp_path / "model_cards"
    with_memory(hub_base, **PLAIN).save_pretrained(cards / "one")
    own = "---\ntags:\n- mine\n---\n# My own words\n\nyour-name/gradmem-kv-tiny reads more than your-name/gradmem-kv.\n"
    for name in ("gradmem-kv-tiny", "not-trained-yet"):  # the weights of the first come with the package
        (cards / name).mkdir()
        (cards / name / "README.md").write_text(own)
    result = cli("push", cards, "me", "--json")
    assert result.exit_code == 0, result.output
    assert [one["repo_id"] for one in json.loads(result.stdout)["pushed"]] == ["me/gradmem-kv-tiny", "me/one"]
    assert hub.repos["me/gradmem-kv-tiny"].files["README.md"].decode() == own.replace(
        "your-name/gradmem-kv-tiny", "me/gradmem-kv-tiny"
    )
    assert "model.safetensors" in files(hub, "me/gradmem-kv-tiny")


def test_a_single_memory_in_the_folder_of_a_store_is_not_pushed_in_its_place(hub, hub_base, tmp_path):
    (tmp_path / "memories.json").write_text("{}", encoding="utf-8")
    (tmp_path / "memory.safetensors").touch()
    assert "holds a store of memories and a single memory" in cli("push", tmp_path, MEMORY).stderr


def test_runs_that_are_not_done_are_not_pushed(hub, hub_base, tmp_path):
    """Neither as the adapter of the package that has their name, nor by their checkpoints."""
    runs, files_of_runs = tmp_path / "runs", ("_recipe.yaml", "trainer_state.json", "checkpoint-2/config.json")
    for left in files_of_runs:
        (runs / "gradmem-kv-tiny" / left).parent.mkdir(parents=True)
        (runs / "gradmem-kv-tiny" / left).write_text("{}")
        assert "holds neither an adapter" in mistake(cli("push", runs, "me"))
        shutil.rmtree(runs)
    with_memory(hub_base, **PLAIN).save_pretrained(runs / "mine" / "checkpoint-2")
    assert "holds neither an adapter" in mistake(cli("push", runs / "mine", "me"))


def test_mistakes_of_the_push_command_are_one_line(hub, hub_base, monkeypatch, tmp_path):
    model = with_memory(hub_base, **PLAIN)
    model.save_pretrained(tmp_path / "adapter")
    assert "There is no directory or file" in mistake(cli("push", tmp_path / "nothing", ADAPTER))
    (tmp_path / "empty").mkdir()
    assert "holds neither an adapter" in mistake(cli("push", tmp_path / "empty", ADAPTER))
    assert "give the namespace" in mistake(cli("push", tmp_path, ADAPTER))
    log_in(monkeypatch, None)
    assert "You are not logged in" in mistake(cli("push", tmp_path / "adapter", ADAPTER))
    (tmp_path / "adapter" / "model.safetensors").unlink()
    assert "was not saved whole" in mistake(cli("push", tmp_path / "adapter", ADAPTER))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert "switched off by HF_HUB_OFFLINE" in mistake(cli("push", tmp_path / "adapter", ADAPTER))
    assert ADAPTER not in hub.repos


def test_an_adapter_with_a_base_that_nobody_else_has_is_pushed_with_a_warning(hub, tmp_path):
    with_memory(named_base(tmp_path / "base"), **PLAIN).save_pretrained(tmp_path / "adapter")
    result = cli("push", tmp_path / "adapter", ADAPTER)
    assert result.exit_code == 0
    assert "nobody else will find it" in result.stderr


def test_other_commands_name_what_the_hub_refuses(hub, hub_base, monkeypatch, tmp_path):
    pushed_adapter(hub_base)
    hub.repos[ADAPTER].gated = True
    forget(tmp_path / "elsewhere", monkeypatch)
    log_in(monkeypatch, READER_TOKEN)
    write = ("write", "abc", "--output", tmp_path / "memory", "--model")
    assert "me/adapter is gated" in mistake(cli(*write, ADAPTER))
    assert "no repository 'me/nothing' on the Hub" in mistake(cli(*write, "me/nothing"))


def test_commands_ask_the_hub_for_what_is_not_cached_alone(hub, hub_base, monkeypatch, tmp_path):
    get_gradmem_model(hub_base, GradMemConfig(**PLAIN), tokenizer=small_tokenizer()).push_to_hub(ADAPTER)
    forget(tmp_path / "elsewhere", monkeypatch)
    hub.requests.clear()
    write = ("write", "abc", "--model", ADAPTER, "--output", tmp_path / "memory")
    assert cli(*write).exit_code == 0
    assert any("model.safetensors" in request for request in hub.requests)
    hub.requests.clear()
    assert cli(*write).exit_code == 0
    assert hub.requests == []

    larger = GradMemConfig(num_memory_tokens=5, write_steps=1)
    revision = get_gradmem_model(hub_base, larger, tokenizer=small_tokenizer()).push_to_hub(ADAPTER).oid
    for options, num_memory_tokens in (((), PLAIN["num_memory_tokens"]), (("--revision", revision), 5)):
        assert cli(*write, *options).exit_code == 0
        assert GradMemMemory.from_pretrained(tmp_path / "memory").embeddings.shape[1] == num_memory_tokens
    assert "no revision 'never'" in mistake(cli(*write, "--revision", "never"))
