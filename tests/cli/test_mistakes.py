"""Mistakes: one line, exit code 2, nothing written."""

import contextlib
import json
import os
import shutil
import socket
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from hf_gradmem.commands.packaged import RETRIEVAL_ADAPTER
from tests.support.command_line import TEXT, mistake, run, run_process, save_base


def test_write_without_a_context_is_a_mistake(base: str, tmp_path: Path) -> None:
    options = ["--model", base, "--output", tmp_path / "memory"]
    for blank in ("", "  ", "\n"):
        assert "The context is blank" in mistake(run("write", blank, *options))
        assert "The context is blank" in mistake(run("write", *options, stdin=blank))
    for command in (["write", *options], ["chat", RETRIEVAL_ADAPTER]):
        assert "stdin is not UTF-8 text" in mistake(run(*command, stdin=b"!a:b\xff!\n"))
    assert "not both" in mistake(run("write", TEXT, "--file", tmp_path / "context.txt", *options))
    assert "context.txt" in mistake(run("write", "--file", tmp_path / "context.txt", *options))
    (tmp_path / "latin1.txt").write_bytes("caf\xe9".encode("latin-1"))
    assert "not UTF-8" in mistake(run("write", "--file", tmp_path / "latin1.txt", *options))
    assert "Give it as --file" in mistake(run("write", tmp_path / "latin1.txt", *options))
    assert not (tmp_path / "memory").exists()


def test_an_export_does_not_go_into_the_directory_of_a_model(base: str, tmp_path: Path) -> None:
    of_model = ["--model", base]
    assert run("write", TEXT, *of_model, "--steps", 1, "--output", tmp_path / "memory").exit_code == 0
    refused = run("export", tmp_path / "memory", *of_model, "--output", base)
    assert f"{base} is the directory of a model, with a config.json" in mistake(refused)
    assert not (Path(base) / "adapter_config.json").exists()


@pytest.mark.skipif(os.name == "nt", reason="closed by a shell")
@pytest.mark.parametrize(("command", "message"), [("write", "There is no context"), ("chat", "stdin is closed")])
def test_a_closed_stdin_is_a_mistake(command: str, message: str, base: str, tmp_path: Path) -> None:
    given = ["--model", base, "--output", tmp_path / "memory"] if command == "write" else [base]
    told = subprocess.run(
        ["sh", "-c", 'exec "$@" <&-', "sh", sys.executable, "-m", "hf_gradmem_cli", command, *map(str, given)],
        capture_output=True,
        text=True,
        check=False,
    )
    assert told.returncode == 2
    assert told.stderr.startswith(f"Error: {message}")
    assert told.stderr.count("\n") == 1


def test_options_out_of_range_are_mistakes(base: str, tmp_path: Path) -> None:
    options = ["--model", base, "--output", tmp_path / "memory"]
    assert "write_steps" in mistake(run("write", TEXT, *options, "--steps", -1))
    assert "num_memory_tokens" in mistake(run("write", TEXT, *options, "--memory-tokens", 0))
    assert "at most 124" in mistake(run("write", TEXT, *options, "--segment-length", 125))
    assert run("write", TEXT, *options, "--optimizer", "lion").exit_code == 2
    for tolerance in ("nan", "-1"):
        refused = run("write", TEXT, *options, "--tolerance", tolerance)
        assert "tolerance must be at least 0, which never stops" in mistake(refused)
    assert run("write", TEXT, *options, "--seed", 2**63).exit_code == 2
    assert "The context is not Unicode text: at character 3" in mistake(run("write", "caf\udce9", *options))
    assert "no device 'cuda:99'" in mistake(run("write", TEXT, *options, "--device", "cuda:99"))
    assert "no device 'toaster'" in mistake(run("write", TEXT, *options, "--device", "toaster"))
    (tmp_path / "file").touch()
    assert "not a directory" in mistake(run("write", TEXT, "--model", base, "--output", tmp_path / "file"))
    assert not (tmp_path / "memory").exists()


@pytest.mark.parametrize("command", ["write", "write-dataset", "export", "inspect", "evaluate", "plot", "train"])
def test_an_output_that_cannot_be_written_is_found_out_before_anything_is_loaded(
    command: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def too_late(*_: object, **__: object) -> None:
        pytest.fail("loaded before the output was looked at")

    for name in ("commands.opening.load_model", "commands.opening.load_memory", "commands.dataset_rows.load_source"):
        monkeypatch.setattr(f"hf_gradmem.{name}", too_late)
    for name in ("evaluation.results.load_sets", "evaluation.results.load_records", "training.run.build_trainer"):
        monkeypatch.setattr(f"hf_gradmem.{name}", too_late)
    recipe = tmp_path / "recipe.yaml"
    lines = ["task: kv_retrieval", "base_config: {model_type: llama}", "stages: [{steps: 1}]", "eval_sets: {a: {}}"]
    recipe.write_text("\n".join(lines), encoding="utf-8")
    (tmp_path / "file").touch()
    place = tmp_path / "file" / "below"
    arguments = {
        "write": [TEXT, "--model", "base", "--output"],
        "write-dataset": ["rows.jsonl", "--model", "base", "--output"],
        "export": ["memory", "--model", "base", "--output"],
        "inspect": ["memory", "--model", "base", "--context-file", recipe, "--html"],
        "evaluate": ["base", "--recipe", recipe, "--output"],
        "plot": ["results.json", "--output"],
        "train": [recipe, "--override"],
    }[command]
    given = f"output_dir={place}" if command == "train" else place
    assert f"{tmp_path / 'file'} is a file" in mistake(run(command, *arguments, given))


def test_a_memory_that_a_directory_is_in_the_way_of_is_a_mistake(base: str, tmp_path: Path) -> None:
    (tmp_path / "memory.safetensors").mkdir()
    refused = run("write", TEXT, "--model", "nobody", "--output", tmp_path)
    assert "memory.safetensors is a directory" in mistake(refused)


def test_a_write_that_diverges_fails_and_saves_nothing(base: str, tmp_path: Path) -> None:
    result = run(
        "write", TEXT, "--model", base, "--output", tmp_path / "memory", "--optimizer", "sgd", "--learning-rate", "1e39"
    )
    assert result.exit_code == 1
    assert "NaN" in result.stderr
    assert len(result.stderr.splitlines()) == 1
    assert not (tmp_path / "memory").exists()


def test_a_missing_memory_or_model_is_named(base: str, memory: str, tmp_path: Path) -> None:
    assert "nowhere" in mistake(run("inspect", tmp_path / "nowhere"))
    assert "memory.safetensors is missing" in mistake(run("inspect", base))
    assert "nowhere" in mistake(run("ask", "?", "--memory", memory, "--model", tmp_path / "nowhere"))
    assert "config.json is missing" in mistake(run("ask", "?", "--memory", memory, "--model", memory))
    assert "name of the model is empty" in mistake(run("ask", "?", "--memory", memory, "--model", ""))
    asked = ("ask", "?", "--memory", memory, "--model", base)
    assert "has no revision 'old'" in mistake(run(*asked, "--revision", "old"))
    assert "has no revision 'old'" in mistake(run(*asked, "--memory-revision", "old"))


def test_files_that_are_not_what_they_should_be_are_named(base: str, memory: str, tmp_path: Path) -> None:
    torn = tmp_path / "torn"
    torn.mkdir()
    whole = (Path(memory) / "memory.safetensors").read_bytes()
    (torn / "memory.safetensors").write_bytes(whole[: len(whole) // 2])
    assert "Was it copied whole?" in mistake(run("inspect", torn))
    broken = Path(shutil.copytree(base, tmp_path / "broken"))
    weights = broken / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])
    output = tmp_path / "output"
    assert f"weights of {broken}" in mistake(run("write", TEXT, "--model", broken, "--output", output))
    (broken / "config.json").write_text("{", encoding="utf-8")
    assert "config.json" in mistake(run("write", TEXT, "--model", broken, "--output", output))

    for name in ("rows.parquet", "rows.jsonl", "recipe.yaml", "results.json"):
        (tmp_path / name).write_text("{[ not this", encoding="utf-8")
    for name in ("rows.parquet", "rows.jsonl"):
        assert name in mistake(run("write-dataset", tmp_path / name, "--model", base, "--output", output))
    assert "recipe.yaml" in mistake(run("train", tmp_path / "recipe.yaml"))
    assert "recipe.yaml" in mistake(run("evaluate", base, "--recipe", tmp_path / "recipe.yaml"))
    assert "results.json" in mistake(run("plot", tmp_path / "results.json", "--output", tmp_path / "curve.png"))
    assert "nowhere.json" in mistake(run("plot", tmp_path / "nowhere.json", "--output", tmp_path / "curve.png"))
    assert not output.exists()


def test_a_package_that_is_missing_is_named(memory: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("matplotlib", "matplotlib.figure"):  # which another test may have imported already
        monkeypatch.setitem(sys.modules, name, None)
    record = {"model": "m", "set": "s", "context": "memory", "write_steps": 1, "exact_match": 1.0, "arguments": {}}
    (tmp_path / "results.json").write_text(json.dumps({"results": [record]}), encoding="utf-8")
    message = mistake(run("plot", tmp_path / "results.json", "--output", tmp_path / "curve.png"))
    assert "pip install 'hf-gradmem[plots]'" in message
    assert not (tmp_path / "curve.png").exists()


def test_a_memory_of_another_model_is_refused(memory: str, tmp_path: Path) -> None:
    save_base(tmp_path, seed=1)
    assert "was written by" in mistake(run("ask", "?", "--memory", memory, "--model", tmp_path))
    assert "was written by" in mistake(run("inspect", memory, "--model", tmp_path))


@pytest.mark.parametrize(("offline", "attempts"), [("1", 0), ("0", 1)])
def test_an_unknown_name_costs_one_attempt_to_reach_the_hub_and_none_offline(
    offline: str, attempts: int, tmp_path: Path
) -> None:
    with socket.create_server(("127.0.0.1", 0)) as hub:
        tried = []

        def hang_up() -> None:
            with contextlib.suppress(OSError):  # closed, at the end
                while True:
                    connection, _ = hub.accept()
                    tried.append(connection.close())

        thread = threading.Thread(target=hang_up, daemon=True)
        thread.start()
        places = {"HF_HOME": str(tmp_path), "HF_ENDPOINT": f"http://127.0.0.1:{hub.getsockname()[1]}"}
        arguments = ["write", TEXT, "--model", "nobody/nothing", "--output", tmp_path / "memory"]
        result = run_process(*arguments, HF_HUB_OFFLINE=offline, **places)
        hub.shutdown(socket.SHUT_RDWR)
        thread.join()
    assert len(tried) == attempts
    assert result.returncode == 2
    (line,) = result.stderr.splitlines()
    assert "'nobody/nothing'" in line
    assert ("switched off" if offline == "1" else "cannot be reached") in line
