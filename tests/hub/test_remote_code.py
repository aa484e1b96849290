"""Loaded by a process that never imported the package."""

import subprocess
import sys
from pathlib import Path

import pytest
from huggingface_hub import HfApi
from transformers import AutoModelForCausalLM

from tests.support.hub_server import environment
from tests.support.on_the_hub import ADAPTER, ADAPTER_FILES, BASE, CONTEXT, QUERY, logits, push_base, pushed_adapter


@pytest.fixture
def base(hub):
    """A base on the hub, loaded from there."""
    push_base(seed=0)
    return AutoModelForCausalLM.from_pretrained(BASE)


def python(code: str, hub, home: Path) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, "-c", code], env=environment(hub, home), capture_output=True, text=True, timeout=300
    )


def test_a_process_that_never_imported_the_package_loads_with_trust_remote_code_alone(hub, base, tmp_path):
    model = pushed_adapter(base)
    expected = logits(model).sum().item()
    code = f"""
import torch, sys
from transformers import AutoModelForCausalLM
try:
    AutoModelForCausalLM.from_pretrained("{ADAPTER}", trust_remote_code=False)
except ValueError as error:
    assert "trust_remote_code=True" in str(error), error
assert "hf_gradmem" not in sys.modules
model = AutoModelForCausalLM.from_pretrained("{ADAPTER}", trust_remote_code=True)
context, query = torch.tensor({CONTEXT.tolist()}), torch.tensor({QUERY.tolist()})
with torch.no_grad():
    print(model(input_ids=query, memory=model.write(input_ids=context)).logits.sum().item())
model.save_pretrained("{tmp_path}/again")
"""
    result = python(code, hub, tmp_path / "user")
    assert result.returncode == 0, result.stderr
    assert float(result.stdout) == pytest.approx(expected, rel=1e-5)
    assert {path.name for path in (tmp_path / "again").iterdir()} == ADAPTER_FILES  # no source file of the package


def test_without_the_package_the_loader_says_what_to_install(hub, base, tmp_path):
    pushed_adapter(base)
    code = f"""
import sys
sys.modules["hf_gradmem"] = None  # as if it were not installed
from transformers import AutoModelForCausalLM
AutoModelForCausalLM.from_pretrained("{ADAPTER}", trust_remote_code=True)
"""
    result = python(code, hub, tmp_path / "user")
    assert result.returncode == 1
    assert "hf_gradmem" in result.stderr.splitlines()[-1]


def test_the_package_does_not_run_the_code_of_a_repository(hub, base):
    pushed_adapter(base)
    HfApi().upload_file(
        path_or_fileobj=b"raise SystemExit('ran')", path_in_repo="modeling_gradmem_hub.py", repo_id=ADAPTER
    )
    AutoModelForCausalLM.from_pretrained(ADAPTER, trust_remote_code=True)
