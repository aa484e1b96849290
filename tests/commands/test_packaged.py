"""Adapters of the package, by their names."""

import json
import os
import shutil

import pytest

from hf_gradmem import GradMemConfig
from hf_gradmem.commands import opening, packaged
from hf_gradmem.commands.opening import is_adapter, load_model
from hf_gradmem.commands.packaged import HUB_NAME, LANGUAGE_ADAPTER, RETRIEVAL_ADAPTER, needs_copy, packaged_adapter
from hf_gradmem.training import run
from hf_gradmem.training.recipe import make_recipe
from hf_gradmem.training.run import build_model
from tests.support.command_line import run as run_command
from tests.support.command_line import save_base
from tests.support.on_the_hub import forget


def test_an_adapter_of_the_package_is_loaded_by_its_name():
    assert packaged_adapter(RETRIEVAL_ADAPTER.name) == RETRIEVAL_ADAPTER
    assert is_adapter(RETRIEVAL_ADAPTER.name)
    assert load_model(RETRIEVAL_ADAPTER.name).fingerprint() == load_model(str(RETRIEVAL_ADAPTER)).fingerprint()


@pytest.mark.parametrize("name", ["", ".", "..", "missing", "../pretrained/gradmem-kv-tiny", "me/gradmem-kv-tiny"])
def test_other_names_are_not_of_the_package(name):
    assert packaged_adapter(name) is None


def test_a_directory_of_that_name_comes_first(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    save_base(tmp_path / RETRIEVAL_ADAPTER.name, 0)
    assert packaged_adapter(RETRIEVAL_ADAPTER.name) is None
    assert not is_adapter(RETRIEVAL_ADAPTER.name)


def test_the_language_adapter_is_put_on_the_copy_of_its_base(monkeypatch, tmp_path):
    asked = []
    monkeypatch.setattr(opening, "find_demo_model", lambda: asked.append(None) or "no/such/copy/here")
    monkeypatch.setattr(run, "find_demo_model", opening.find_demo_model)
    trained_on = shutil.copytree(LANGUAGE_ADAPTER, tmp_path / "run")
    for name in (LANGUAGE_ADAPTER.name, os.path.relpath(LANGUAGE_ADAPTER), str(trained_on)):
        recipe = make_recipe({"task": "facts", "stages": [{"steps": 1}], "adapter": name, "output_dir": "unused"})
        with pytest.raises(OSError, match="no/such/copy/here"):
            load_model(name)
        with pytest.raises(OSError, match="no/such/copy/here"):
            build_model(recipe.arguments)
    assert len(asked) == 6
    config = json.loads((trained_on / "config.json").read_text(encoding="utf-8"))
    (trained_on / "config.json").write_text(json.dumps(config | {"base_model_revision": "of-the-hub"}))
    assert not needs_copy(str(trained_on), GradMemConfig.from_pretrained(trained_on))
    assert HUB_NAME == "HuggingFaceTB/SmolLM2-135M-Instruct"


@pytest.mark.parametrize("quiet", [True, False])
def test_a_quiet_command_does_not_say_that_it_fetches_the_base(monkeypatch, tmp_path, quiet):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(packaged, "PACKAGE", "not_installed")
    monkeypatch.setattr(packaged, "hub_is_reachable", lambda: True)
    forget(tmp_path, monkeypatch)
    ended = run_command(*(["--quiet"] if quiet else []), "chat", LANGUAGE_ADAPTER.name, stdin="")
    assert ended.exit_code == 2, ended.output
    *told, mistake = ended.stderr.splitlines()
    assert "There is no directory" in mistake
    assert told == ([] if quiet else [f"Downloading {HUB_NAME} from the Hugging Face Hub (once, 270 MB) ..."])
