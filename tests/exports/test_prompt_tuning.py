"""Memories as PEFT's prompt tuning."""

import json
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.support.small_models import EVERY_OPTION, PLAIN, named_base, nameless_base, with_memory
from tests.support.tiny_models import tiny_causal_lm, tiny_tokens

READ_BY_PEFT = """
import sys
sys.modules["hf_gradmem"] = None
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM
directory = sys.argv[1]
model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(directory + "/base"), directory + "/export")
prompt = load_file(directory + "/prompt.safetensors")
ids, mask = prompt["input_ids"], prompt["attention_mask"]
length = {"max_new_tokens": 6, "min_new_tokens": 6, "do_sample": False}
output = {"batch": model.generate(input_ids=ids, attention_mask=mask, **length)}
for row in range(len(ids)):
    alone = ids[row : row + 1, mask[row].bool()]
    output[str(row)] = model.generate(input_ids=alone, attention_mask=torch.ones_like(alone), **length)[0]
save_file({name: tokens.contiguous() for name, tokens in output.items()}, directory + "/output.safetensors")
"""
PADDED = 1


@pytest.fixture(scope="module", params=["plain", "every_option"])
def read_by_peft(request, tmp_path_factory):
    """What stock PEFT generates from an exported memory, in a process that cannot import this package; and ours."""
    options = PLAIN if request.param == "plain" else EVERY_OPTION | {"read_lora": None}
    directory = tmp_path_factory.mktemp("export")
    model = with_memory(named_base(directory / "base"), **options)
    memory = model.write(input_ids=tiny_tokens(2, 8))[1]
    model.export_prompt_tuning(memory, directory / "export")
    files = {path.name for path in (directory / "export").iterdir()}
    assert files == {"adapter_config.json", "adapter_model.safetensors"}
    prompt = {"input_ids": tiny_tokens(3, 5, seed=2), "attention_mask": torch.ones(3, 5, dtype=torch.long)}
    prompt["input_ids"][PADDED, :2] = prompt["attention_mask"][PADDED, :2] = 0
    save_file(prompt, directory / "prompt.safetensors")
    command = [sys.executable, "-c", READ_BY_PEFT, str(directory)]
    run = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    assert run.returncode == 0, run.stderr
    ours = model.generate(**prompt, memory=memory, max_new_tokens=6, min_new_tokens=6, do_sample=False)
    return load_file(directory / "output.safetensors"), ours


def test_exported_memory_is_read_alike_by_stock_peft(read_by_peft):
    """Rows of a batch without padding, and every row on its own."""
    theirs, ours = read_by_peft
    for row, tokens in enumerate(ours):
        assert torch.equal(theirs[str(row)][-6:], tokens[-6:])
        if row != PADDED:
            assert torch.equal(theirs["batch"][row], tokens)


@pytest.mark.xfail(strict=True, reason="PEFT drops position ids, which leaves a hole between memory and padded query")
def test_exported_memory_is_read_alike_by_stock_peft_in_left_padded_rows(read_by_peft):
    theirs, ours = read_by_peft
    assert torch.equal(theirs["batch"][PADDED], ours[PADDED])


def test_export_records_the_base_and_its_revision(tmp_path):
    model = with_memory(named_base(tmp_path / "base"), **PLAIN, base_model_revision="abc")
    model.export_prompt_tuning(model.write(input_ids=tiny_tokens(1, 4)), tmp_path / "export")
    config = json.loads((tmp_path / "export" / "adapter_config.json").read_text())
    assert (config["base_model_name_or_path"], config["revision"]) == (str(tmp_path / "base"), "abc")
    assert config["peft_type"] == "PROMPT_TUNING"


def test_export_refuses_what_stock_peft_could_not_read(tmp_path):
    context = tiny_tokens(2, 6)
    named = with_memory(named_base(tmp_path / "base"), **PLAIN)
    with pytest.raises(ValueError, match="holds one memory, got 2"):
        named.export_prompt_tuning(named.write(input_ids=context), tmp_path / "export")
    with_lora = with_memory(named_base(tmp_path / "base"), **EVERY_OPTION)
    with pytest.raises(ValueError, match="reads with a LoRA in READ"):
        with_lora.export_prompt_tuning(with_lora.write(input_ids=context[:1]), tmp_path / "export")
    nameless = with_memory(nameless_base(), **PLAIN)
    with pytest.raises(ValueError, match="a base that is saved with the adapter"):
        nameless.export_prompt_tuning(nameless.write(input_ids=context[:1]), tmp_path / "export")
    assert not (tmp_path / "export").exists()


def test_export_refuses_a_base_that_needs_token_ids(tmp_path):
    tiny_causal_lm("gemma4_text", torch.float32).save_pretrained(tmp_path / "base")
    model = with_memory(named_base(tmp_path / "base"), **PLAIN)
    assert not model.decoder.embeddings_suffice
    with pytest.raises(ValueError, match="Gemma4ForCausalLM does not make the same of embedded tokens"):
        model.export_prompt_tuning(model.write(input_ids=tiny_tokens(1, 6)), tmp_path / "export")
