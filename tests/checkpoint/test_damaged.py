"""Checkpoints that are not what they should be: what is refused, and what the message says."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModel

from hf_gradmem import GradMemForCausalLM, GradMemMemory, get_gradmem_model
from tests.support.messages import says
from tests.support.small_models import EVERY_OPTION, PLAIN, named_base, nameless_base, small_tokenizer, with_memory


@pytest.fixture
def adapter(tmp_path):
    with_memory(named_base(tmp_path / "base"), **EVERY_OPTION).save_pretrained(tmp_path / "adapter")
    return tmp_path / "adapter"


LOADERS = {
    "from_pretrained": GradMemForCausalLM.from_pretrained,
    "get_gradmem_model": lambda directory: get_gradmem_model(named_base(directory.parent / "base"), directory),
}


def test_adapter_that_names_itself_as_its_base(adapter):
    path = adapter / "config.json"
    values = json.loads(path.read_text(encoding="utf-8"))
    path.write_text(json.dumps(values | {"base_model_name_or_path": str(adapter)}), encoding="utf-8")
    with pytest.raises(ValueError, match=says(f"base_model_name_or_path={str(adapter)!r} is an adapter itself")):
        GradMemForCausalLM.from_pretrained(adapter)


@pytest.mark.parametrize("whose", ["adapter", "base"])
def test_tokenizer_that_is_none(adapter, whose):
    directory = adapter.parent / whose
    small_tokenizer().save_pretrained(directory)
    (directory / "tokenizer.json").write_text("{}", encoding="utf-8")
    with pytest.raises(ValueError, match=says(f"The tokenizer in {directory} cannot be read", "tokenizer.json")):
        GradMemForCausalLM.from_pretrained(adapter).write("abc")


@pytest.mark.parametrize("load", LOADERS.values(), ids=LOADERS)
@pytest.mark.parametrize("keep", [0, 50, -1])
def test_truncated_adapter(adapter, load, keep):
    path = adapter / "model.safetensors"
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(ValueError, match=says(f"{path} is not a readable safetensors file", "copied whole")):
        load(adapter)


@pytest.mark.parametrize("load", LOADERS.values(), ids=LOADERS)
def test_foreign_weights_in_an_adapter(adapter, load):
    save_file({"theirs": torch.zeros(2)}, adapter / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match=says("not the adapter that its config.json describes", "unexpected theirs")):
        load(adapter)


@pytest.mark.parametrize(
    "key", ["memory_init", "read_end", "base_model.model.layers.1.self_attn.v_proj.lora_B.read.weight"]
)
def test_adapter_that_lacks_a_parameter(adapter, key):
    tensors = load_file(adapter / "model.safetensors")
    del tensors[key]
    save_file(tensors, adapter / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match=says(f"missing {key}", "unexpected none")):
        AutoModel.from_pretrained(adapter)


def test_adapter_of_another_shape_than_its_configuration(adapter):
    with pytest.raises(
        ValueError, match=says("does not fit its own configuration", "memory_init", "[3, 32]", "[4, 32]")
    ):
        GradMemForCausalLM.from_pretrained(adapter, num_memory_tokens=4)


@pytest.mark.parametrize("load", LOADERS.values(), ids=LOADERS)
def test_directory_without_weights(adapter, load):
    (adapter / "model.safetensors").unlink()
    with pytest.raises(OSError, match=r"model\.safetensors"):
        load(adapter)


@pytest.mark.parametrize("load", LOADERS.values(), ids=LOADERS)
def test_directory_without_a_configuration(adapter, load):
    (adapter / "config.json").unlink()
    with pytest.raises(OSError, match=r"config\.json"):
        load(adapter)


@pytest.mark.parametrize("load", LOADERS.values(), ids=LOADERS)
def test_directory_of_another_kind_of_model(adapter, load):
    with pytest.raises(ValueError, match=says("model of type 'llama', not 'gradmem'", "get_gradmem_model")):
        load(adapter.parent / "base")


def test_full_checkpoint_with_weights_that_its_configuration_does_not_describe(tmp_path):
    with_memory(nameless_base(), **PLAIN).save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text(encoding="utf-8"))
    config["text_config"]["num_hidden_layers"] = 1
    (tmp_path / "config.json").write_text(json.dumps(config), encoding="utf-8")
    with pytest.raises(ValueError, match=says("missing none; unexpected base_model.model.layers.1.", "and 4 more")):
        GradMemForCausalLM.from_pretrained(tmp_path)


def test_attaching_a_checkpoint_that_brings_its_own_base(tmp_path):
    with_memory(nameless_base(), **PLAIN).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=says("includes its own base", "Load it with from_pretrained")):
        get_gradmem_model(nameless_base(), tmp_path)


def test_memory_of_a_file_that_is_a_model(adapter):
    with pytest.raises(ValueError, match=says("is not a memory", "'format': 'pt'")):
        GradMemMemory.from_pretrained(adapter / "model.safetensors")
