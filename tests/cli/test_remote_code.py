"""Code that a repository brings: run by no command, whatever stands on stdin, unless it is asked for by its flag."""

import json
import shutil
from pathlib import Path

import pytest
import yaml

from tests.support.command_line import TEXT, mistake, run
from tests.support.tiny_training import TINY

CODE = """
from pathlib import Path
from transformers import LlamaConfig, LlamaForCausalLM

Path({ran!r}).touch()


class TheirConfig(LlamaConfig):
    model_type = "their_llama"


class TheirModel(LlamaForCausalLM):
    config_class = TheirConfig
"""


@pytest.fixture
def ran(tmp_path: Path) -> Path:
    """There as soon as the code has run."""
    return tmp_path / "ran"


@pytest.fixture
def base_with_code(base: str, tmp_path: Path, ran: Path) -> Path:
    """A base that needs the code beside it."""
    directory = Path(shutil.copytree(base, tmp_path / "with_code"))
    (directory / "theirs.py").write_text(CODE.format(ran=str(ran)), encoding="utf-8")
    config = json.loads((directory / "config.json").read_text(encoding="utf-8"))
    auto_map = {"AutoConfig": "theirs.TheirConfig", "AutoModelForCausalLM": "theirs.TheirModel"}
    config |= {"model_type": "their_llama", "architectures": ["TheirModel"], "auto_map": auto_map}
    (directory / "config.json").write_text(json.dumps(config), encoding="utf-8")
    return directory


def commands(model: Path, memory: str, directory: Path) -> dict[str, list[object]]:
    """Each command that loads a model."""
    (directory / "rows.jsonl").write_text(json.dumps({"context": TEXT}) + "\n", encoding="utf-8")
    recipe = {name: value for name, value in TINY.items() if name != "base_config"}
    recipe |= {"base_model": str(model), "output_dir": str(directory / "run"), "eval_sets": {"few": {}}}
    (directory / "recipe.yaml").write_text(yaml.safe_dump(recipe), encoding="utf-8")
    of_model = ["--model", model]
    return {
        "write": ["write", TEXT, *of_model, "--output", directory / "memory", "--steps", 1],
        "write-dataset": ["write-dataset", directory / "rows.jsonl", *of_model, "--output", directory / "many"],
        "ask": ["ask", "?", "--memory", memory, *of_model],
        "inspect": ["inspect", memory, *of_model],
        "export": ["export", memory, *of_model, "--output", directory / "exported"],
        "evaluate": ["evaluate", model, "--recipe", directory / "recipe.yaml"],
        "train": ["train", directory / "recipe.yaml"],
        "demo": ["demo", *of_model],
    }


NAMES = ["write", "write-dataset", "ask", "inspect", "export", "evaluate", "train", "demo"]


@pytest.mark.parametrize("name", NAMES)
def test_no_command_runs_the_code_of_a_repository(
    name: str, base_with_code: Path, memory: str, tmp_path: Path, ran: Path
) -> None:
    message = mistake(run(*commands(base_with_code, memory, tmp_path)[name], stdin="y\n" * 9))
    assert "with_code" in message
    assert "--trust-remote-code" in message
    assert not ran.exists()


def test_a_flag_lets_the_code_of_a_repository_run(base_with_code: Path, memory: str, tmp_path: Path, ran: Path) -> None:
    command = commands(base_with_code, memory, tmp_path)["write"]
    result = run(*command, "--trust-remote-code")
    assert result.exit_code == 0, result.output
    assert ran.exists()


@pytest.mark.parametrize("name", NAMES)
def test_every_command_that_loads_a_model_has_the_flag(name: str) -> None:
    assert "--trust-remote-code" in run(name, "--help", env={"COLUMNS": "200"}).stdout
