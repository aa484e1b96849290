"""Memories in others' formats: read alike without this package, refused where they would not be."""

import json
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig
from typer.testing import CliRunner

from hf_gradmem import GradMemConfig, get_gradmem_model
from hf_gradmem.base.short_attention import ShortAttentionInFloat32
from hf_gradmem.commands.packaged import GGUF_FILE, PACKAGE
from hf_gradmem_cli import app
from tests.support.small_models import EVERY_OPTION, PLAIN, named_base, nameless_base, small_tokenizer, with_memory
from tests.support.tiny_models import tiny_tokens

WITHOUT_READ_LORA = EVERY_OPTION | {"read_lora": None}
# Grouped heads, learned positions, alibi, one key head for all, sliding windows, norms of the heads.
BASES = ("llama", "gpt2", "bloom", "falcon", "mistral", "qwen3")
SLIDING = "mistral"
NEW = {"max_new_tokens": 6, "min_new_tokens": 6, "do_sample": False}

READ_BY_PEFT = """
import sys
sys.modules["hf_gradmem"] = None
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM
for directory in sys.argv[1:]:
    model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(directory + "/base"), directory + "/export")
    prompts = load_file(directory + "/prompts.safetensors")
    output = {
        name: model.generate(
            input_ids=prompts["input_ids"], attention_mask=mask, max_new_tokens=6, min_new_tokens=6, do_sample=False
        )
        for name, mask in prompts.items()
        if name != "input_ids"
    }
    save_file(output, directory + "/output.safetensors")
"""


def prompts() -> dict[str, torch.Tensor]:
    input_ids = tiny_tokens(4, 5, seed=2)
    padded = torch.ones_like(input_ids)
    padded[1, :2] = padded[2, :3] = 0
    return {"input_ids": input_ids, "whole": torch.ones_like(input_ids), "padded": padded}


@pytest.fixture(scope="module")
def read_by_peft(tmp_path_factory):
    """What stock PEFT generates from exported cartridges, in a process that cannot import this package; and we."""
    ours = {}
    for model_type in BASES:
        directory = tmp_path_factory.mktemp(model_type)
        base = named_base(directory / "base", model_type)
        model = with_memory(base, **(WITHOUT_READ_LORA if model_type == "llama" else PLAIN))
        memory = model.write(input_ids=tiny_tokens(2, 8))[1]
        model.export_cartridge(memory, directory / "export")
        save_file(prompts(), directory / "prompts.safetensors")
        ids = prompts()["input_ids"]
        ours[model_type] = (
            directory,
            {
                name: model.generate(input_ids=ids, attention_mask=prompts()[name], memory=memory, **NEW)
                for name in ("whole", "padded")
            },
        )
    command = [sys.executable, "-c", READ_BY_PEFT, *(str(directory) for directory, _ in ours.values())]
    run = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    assert run.returncode == 0, run.stderr
    return {name: (load_file(directory / "output.safetensors"), own) for name, (directory, own) in ours.items()}


@pytest.mark.parametrize("model_type", BASES)
def test_cartridge_is_read_alike_by_stock_peft(read_by_peft, model_type):
    theirs, ours = read_by_peft[model_type]
    assert torch.equal(theirs["whole"], ours["whole"])


@pytest.mark.parametrize(
    "model_type",
    [
        pytest.param(name, marks=pytest.mark.xfail(strict=True, reason="PEFT masks padding wrongly in sliding windows"))
        if name == SLIDING
        else name
        for name in BASES
    ],
)
def test_cartridge_is_read_alike_by_stock_peft_in_left_padded_rows(read_by_peft, model_type):
    theirs, ours = read_by_peft[model_type]
    assert torch.equal(theirs["padded"], ours["padded"])


def test_cartridge_records_the_base_and_what_it_holds(tmp_path):
    model = with_memory(named_base(tmp_path / "base"), **WITHOUT_READ_LORA, base_model_revision="abc")
    model.export_cartridge(model.write(input_ids=tiny_tokens(1, 4)), tmp_path / "export")
    assert {path.name for path in (tmp_path / "export").iterdir()} == {
        "adapter_config.json",
        "adapter_model.safetensors",
    }
    config = json.loads((tmp_path / "export" / "adapter_config.json").read_text())
    assert (config["base_model_name_or_path"], config["revision"]) == (str(tmp_path / "base"), "abc")
    assert (config["peft_type"], config["num_virtual_tokens"], config["num_frozen_tokens"]) == ("CARTRIDGE", 7, 0)


@pytest.mark.parametrize("export", ["export_cartridge", "export_prompt_embeds", "export_prompt_tuning"])
def test_what_the_named_base_could_not_read_is_refused(tmp_path, export):
    target = tmp_path / "export"
    for message, base, options in (
        ("reads with a LoRA in READ", named_base(tmp_path / "base"), EVERY_OPTION),
        ("a base that is saved with the adapter", nameless_base(), PLAIN),
    ):
        model = with_memory(base, **options)
        with pytest.raises(ValueError, match=message):
            getattr(model, export)(model.write(input_ids=tiny_tokens(1, 6)), target)
    model = with_memory(named_base(tmp_path / "base"), **PLAIN)
    with pytest.raises(ValueError, match="holds one memory, got 2"):
        getattr(model, export)(model.write(input_ids=tiny_tokens(2, 6)), target)
    other = with_memory(named_base(tmp_path / "other", seed=1), **PLAIN)
    with pytest.raises(ValueError, match="was written by"):
        getattr(model, export)(other.write(input_ids=tiny_tokens(1, 6)), target)
    assert not target.exists()


@pytest.mark.parametrize("model_type", ["mamba", "lfm2"])
def test_base_without_keys_and_values_in_every_layer_is_refused_a_cartridge(tmp_path, model_type):
    model = with_memory(named_base(tmp_path / "base", model_type), **PLAIN)
    name = type(model.base_model).__name__
    with pytest.raises(ValueError, match=f"{name} does not keep keys and values .* Use export_prompt_tuning"):
        model.export_cartridge(model.write(input_ids=tiny_tokens(1, 6)), tmp_path / "export")
    assert not (tmp_path / "export").exists()


def test_memory_longer_than_a_sliding_window_is_refused_a_cartridge(tmp_path):
    model = with_memory(named_base(tmp_path / "base", SLIDING), **PLAIN | {"num_memory_tokens": 9})
    with pytest.raises(ValueError, match="for each of 9 positions in every layer"):
        model.export_cartridge(model.write(input_ids=tiny_tokens(1, 6)), tmp_path / "export")


def test_base_that_does_not_go_on_from_its_cache_is_refused_a_cartridge(tmp_path, monkeypatch):
    model = with_memory(named_base(tmp_path / "base"), **PLAIN)
    memory = model.write(input_ids=tiny_tokens(1, 6))
    forward = model.base_model.forward

    def forgetful(*args, past_key_values=None, **kwargs):
        return forward(*args, **kwargs)

    monkeypatch.setattr(model.base_model, "forward", forgetful)
    with pytest.raises(ValueError, match="does not go on from cached keys and values"):
        model.export_cartridge(memory, tmp_path / "export")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_prompt_embeds_with_the_prompts_own_generate_what_we_do(tmp_path, dtype):
    """As an engine would: the base alone, the file, and its embedding layer."""
    model = with_memory(named_base(tmp_path / "base", dtype=dtype), **WITHOUT_READ_LORA, base_model_revision="abc")
    memory = model.write(input_ids=tiny_tokens(1, 8))
    file = tmp_path / "new" / "prompt_embeds.safetensors"
    model.export_prompt_embeds(memory, file)
    with safe_open(file, framework="pt") as opened:
        assert opened.metadata()["base_model_name_or_path"] == str(tmp_path / "base")
        assert opened.metadata()["base_model_revision"] == "abc"
    exported = load_file(file)["prompt_embeds"]
    assert (exported.shape, exported.dtype) == ((7, 32), dtype)
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "base", dtype=dtype)
    ids = tiny_tokens(1, 5, seed=2)
    embeds = torch.cat([exported[None], base.get_input_embeddings()(ids)], dim=1)
    with ShortAttentionInFloat32():  # as ours attends in half precision
        theirs = base.generate(inputs_embeds=embeds, attention_mask=torch.ones(embeds.shape[:2]), **NEW)
    assert torch.equal(theirs, model.generate(input_ids=ids, memory=memory, **NEW)[:, -6:])


@pytest.mark.parametrize("to_format", ["prompt-tuning", "cartridge", "prompt-embeds"])
def test_command_exports_the_memory_of_this_index(tmp_path, to_format):
    model = with_memory(named_base(tmp_path / "base"), **PLAIN)
    model.tokenizer = small_tokenizer()
    model.save_pretrained(tmp_path / "adapter")
    memory = model.write(input_ids=tiny_tokens(2, 6))
    memory.save_pretrained(tmp_path / "memory")
    method = getattr(model, f"export_{to_format.replace('-', '_')}")
    name = "prompt_embeds.safetensors" if to_format == "prompt-embeds" else "adapter_model.safetensors"
    method(memory[1], tmp_path / "expected" / name if to_format == "prompt-embeds" else tmp_path / "expected")
    arguments = ["export", str(tmp_path / "memory"), "--model", str(tmp_path / "adapter"), "--format", to_format]
    arguments += ["--output", str(tmp_path / "out"), "--device", "cpu"]
    result = CliRunner().invoke(app, arguments)
    assert (result.exit_code, result.stdout) == (2, "")  # which of the two was not said
    result = CliRunner().invoke(app, [*arguments, "--index", "1", "--json"])
    assert result.exit_code == 0, result.output
    assert json.loads(result.stdout)["format"] == to_format
    (expected,) = load_file(tmp_path / "expected" / name).values()
    (exported,) = load_file(tmp_path / "out" / name).values()
    assert torch.equal(exported, expected)


@pytest.mark.slow
@pytest.mark.skipif(not (find_spec(PACKAGE) and find_spec("gguf")), reason=f"needs the packages {PACKAGE} and gguf")
def test_base_dequantised_from_gguf_takes_a_memory():
    directory = Path(find_spec(PACKAGE).origin).parent
    dequantised = {"dtype": torch.float32, "quantization_config": GgufConfig(dequantize=True)}
    base = AutoModelForCausalLM.from_pretrained(directory, gguf_file=GGUF_FILE, **dequantised)
    tokenizer = AutoTokenizer.from_pretrained(directory, gguf_file=GGUF_FILE)
    config = GradMemConfig(num_memory_tokens=4, write_steps=5, write_optimizer="adam", write_learning_rate=0.02)
    memory = get_gradmem_model(base, config, tokenizer=tokenizer).write(
        "Gate 7 opens at 06:45 and closes at dusk.", measure_final_loss=True
    )
    assert memory.final_write_loss.item() < 0.9 * memory.write_losses[0, 0].item()
