"""The wheel, as a user installs it: not editable, tried in a directory without the sources."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
SOURCES = ("hf_gradmem", "hf_gradmem_cli", "setup.py", "pyproject.toml", "README.md", "LICENSE")
ADAPTER = "hf_gradmem/pretrained/gradmem-kv-tiny"
OF_THE_PACKAGE = f"""
import sys
from pathlib import Path
import transformers
import hf_gradmem
from hf_gradmem.commands.demo import answer_from_memory

site = Path(sys.argv[1])
assert Path(hf_gradmem.__file__).is_relative_to(site), hf_gradmem.__file__
retrieval = answer_from_memory(seed=0)  # by every adapter in the package
assert retrieval.answers == retrieval.expected, retrieval
answers = transformers.pipeline("gradmem-text-generation", model=str(site / "{ADAPTER}"), max_new_tokens=2)
assert answers(context=[["!a:7!", "!b:Q!"]], question="?!b:")[0][0]["generated_text"] == "Q!"
answers.model.save_pretrained("adapter")
assert "gradmem" in Path("adapter/README.md").read_text(encoding="utf-8")  # filled into the template
"""

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where the wheel is installed: built from a copy of the sources, which leaves them as they are."""
    directory = tmp_path_factory.mktemp("wheel")
    for name in SOURCES:
        copy = shutil.copytree if (ROOT / name).is_dir() else shutil.copy
        copy(ROOT / name, directory / name)
    pip = [sys.executable, "-m", "pip", "--quiet", "--disable-pip-version-check"]
    alone = ["--no-deps", "--no-index"]
    subprocess.run(
        [*pip, "wheel", *alone, "--no-build-isolation", "--wheel-dir", "dist", "."], cwd=directory, check=True
    )
    (wheel,) = (directory / "dist").iterdir()
    subprocess.run([*pip, "install", *alone, "--target", directory / "site", wheel], check=True)
    return directory / "site"


def run(site: Path, directory: Path, *command: object) -> str:
    """Output of a process that finds the wheel's files before those of this repository."""
    done = subprocess.run(
        list(map(str, command)),
        cwd=directory,
        env=os.environ | {"PYTHONPATH": str(site)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_the_package_has_its_data(site: Path, tmp_path: Path) -> None:
    run(site, tmp_path, sys.executable, "-W", "ignore", "-c", OF_THE_PACKAGE, site)


def test_the_command_runs(site: Path, tmp_path: Path) -> None:
    program, adapter = site / "bin" / "hf-gradmem", site / ADAPTER
    assert "write-dataset" in run(site, tmp_path, program, "--help")
    run(site, tmp_path, program, "write", "!a:7!", "--model", adapter, "--output", "memory")
    asked = run(site, tmp_path, program, "ask", "?!a:", "--memory", "memory", "--model", adapter, "--json")
    assert json.loads(asked)["answer"].startswith("7")
