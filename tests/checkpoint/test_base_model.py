"""Bases: how they are loaded for an adapter, and saved with one where nobody else has them."""

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    BitsAndBytesConfig,
)

from hf_gradmem import GradMemForCausalLM, get_gradmem_model
from hf_gradmem.checkpoint.stored_base import differs_from_stored
from tests.support.comparing import CONTEXT, QUERY, assert_equal_states, assert_same_results, base_state, beside_base
from tests.support.small_models import EVERY_OPTION, PLAIN, nameless_base, with_memory
from tests.support.tiny_models import tiny_causal_lm


@pytest.fixture
def base_arguments(monkeypatch):
    """What reaches the loading of the base."""
    seen: dict = {}
    load = AutoModelForCausalLM.from_pretrained

    def recorded(name, **arguments):
        seen.update(arguments, name=name)
        return load(name, **{key: value for key, value in arguments.items() if key != "quantization_config"})

    monkeypatch.setattr("hf_gradmem.checkpoint.base_model.AutoModelForCausalLM.from_pretrained", recorded)
    return seen


# ------------------------------------------------------------------------------------------------ loading options


@pytest.mark.parametrize("loader", [GradMemForCausalLM, AutoModel])
def test_loading_options_reach_the_base(base, tmp_path, base_arguments, loader):
    with_memory(base, **EVERY_OPTION).save_pretrained(tmp_path / "adapter")
    quantization = BitsAndBytesConfig(load_in_4bit=True)
    model = loader.from_pretrained(
        tmp_path / "adapter",
        dtype=torch.bfloat16,
        device_map={"": "cpu"},
        attn_implementation="eager",
        quantization_config=quantization,
        subfolder="",
    )
    assert base_arguments["quantization_config"].load_in_4bit
    assert base_arguments["device_map"] == {"": "cpu"}
    assert "subfolder" not in base_arguments
    assert model.base_model.config._attn_implementation == "eager"
    assert model.dtype == torch.bfloat16
    assert {parameter.dtype for parameter in model.base_model.parameters()} == {torch.bfloat16, torch.float32}
    assert {value.dtype for value in base_state(model).values()} == {torch.bfloat16}
    assert {value.dtype for value in beside_base(model).values()} == {torch.float32}


def test_revisions_of_adapter_and_base_are_kept_apart(base, tmp_path, base_arguments):
    model = with_memory(base, **PLAIN, base_model_revision="of-the-base")
    model.save_pretrained(tmp_path / "adapter")
    AutoModel.from_pretrained(tmp_path / "adapter", revision="of-the-adapter")
    assert base_arguments["revision"] == "of-the-base"


def test_full_checkpoint_takes_loading_options(tmp_path):
    model = with_memory(nameless_base(), **EVERY_OPTION)
    model.save_pretrained(tmp_path / "full")
    arguments = {"dtype": torch.bfloat16, "device_map": {"": "cpu"}, "attn_implementation": "eager"}
    loaded = AutoModel.from_pretrained(tmp_path / "full", **arguments)
    assert loaded.base_model.config._attn_implementation == "eager"
    assert {value.dtype for value in base_state(loaded).values()} == {torch.bfloat16}
    assert_equal_states(beside_base(loaded), beside_base(model))  # not rounded


# ------------------------------------------------------------------------------------------------ full checkpoints


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
def test_base_without_a_name_is_saved_with_the_adapter(tmp_path, tied, dtype, transformers_warnings):
    model = with_memory(nameless_base(tied, dtype), **EVERY_OPTION)
    memory = model.write(input_ids=CONTEXT)
    model.save_pretrained(tmp_path / "full")
    assert ("base_model.lm_head.weight" in load_file(tmp_path / "full" / "model.safetensors")) != tied
    loaded = AutoModel.from_pretrained(tmp_path / "full")
    assert loaded.dtype == dtype
    assert_equal_states(loaded.state_dict(), model.state_dict())
    assert_same_results(model, loaded)
    assert torch.equal(loaded(input_ids=QUERY, memory=memory).logits, model(input_ids=QUERY, memory=memory).logits)
    assert transformers_warnings == []


def test_what_trains_after_loading_is_what_trained_when_it_was_made(base, tmp_path):
    def trains(model):
        return {name for name, parameter in model.named_parameters() if parameter.requires_grad}

    full, adapter = with_memory(nameless_base(), **EVERY_OPTION), with_memory(base, **EVERY_OPTION)
    for model, directory in ((full, tmp_path / "full"), (adapter, tmp_path / "adapter")):
        model.save_pretrained(directory)
        assert trains(AutoModel.from_pretrained(directory)) == trains(model)


def test_memories_of_two_bases_without_a_name_are_told_apart():
    one, same = with_memory(nameless_base(), **PLAIN), with_memory(nameless_base(), **PLAIN)
    memory = one.write(input_ids=CONTEXT)
    same(input_ids=QUERY, memory=memory)
    # Even if the other was made from the first one's configuration.
    other = get_gradmem_model(tiny_causal_lm("llama", torch.float32, 5), one.config)
    with pytest.raises(ValueError, match="another base"):
        other(input_ids=QUERY, memory=memory)


# ------------------------------------------------------------------------------------------------ bases that changed


def merged(base):
    """The base with a LoRA of its own in its weights, as PEFT merges it: in place, and through `.data`."""
    lora = LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False)
    return get_peft_model(base, lora).merge_and_unload()


def test_base_that_was_merged_before_it_was_wrapped_is_saved_with_the_adapter(base, tmp_path):
    model = with_memory(merged(base), **EVERY_OPTION)
    model.save_pretrained(tmp_path / "saved")
    loaded = AutoModel.from_pretrained(tmp_path / "saved")
    assert loaded.config.includes_base
    assert_same_results(model, loaded)


@pytest.mark.parametrize("at_once", [True, False])
def test_base_that_was_edited_after_it_was_wrapped_is_saved_with_the_adapter(base, tmp_path, at_once):
    model = with_memory(base, **PLAIN)
    if not at_once:
        model.save_pretrained(tmp_path / "before")
        assert not model.config.includes_base
    model.base_model.get_input_embeddings().weight.data[7, 3] += 0.5
    model.save_pretrained(tmp_path / "saved")
    assert_same_results(model, AutoModel.from_pretrained(tmp_path / "saved"))


def test_base_in_shards_or_in_another_precision_is_still_the_named_one(tmp_path):
    whole = tiny_causal_lm("llama", torch.float32)
    whole.save_pretrained(tmp_path / "base", max_shard_size=20_000)
    assert len(list((tmp_path / "base").glob("*.safetensors"))) > 2
    for dtype in (torch.float16, torch.bfloat16, torch.float32, torch.float64):
        base = AutoModelForCausalLM.from_pretrained(tmp_path / "base", dtype=dtype)
        assert not differs_from_stored(base, tmp_path / "base", None)
        base.lm_head.weight.data[0, 0] += 1
        assert differs_from_stored(base, tmp_path / "base", None)


def test_base_that_is_not_here_to_compare_with_is_named(base, tmp_path):
    assert not differs_from_stored(base, "me/not-on-this-machine", None)
    assert not differs_from_stored(base, tmp_path / "nowhere", None)


def test_memory_of_a_base_that_was_edited_is_not_exported(base, tmp_path):
    model = with_memory(merged(base), **PLAIN)
    with pytest.raises(ValueError, match=r"does not have\. Such a memory cannot be exported"):
        model.export_prompt_tuning(model.write(input_ids=CONTEXT[:1]), tmp_path / "export")


def test_base_with_an_adapter_inside_is_refused_by_its_name(base):
    base.add_adapter(LoraConfig(r=2, target_modules=["q_proj"]), adapter_name="mine")
    with pytest.raises(ValueError, match=r"PEFT adapter inside \(mine\), .* lost on saving.*merge it"):
        get_gradmem_model(base)


def test_base_that_trained_is_saved_with_the_adapter_from_then_on(base, tmp_path):
    model = with_memory(base, **EVERY_OPTION)
    model.base_model.lm_head.weight.requires_grad_(True)
    memory = model.write(input_ids=CONTEXT)
    model.save_pretrained(tmp_path / "full")
    with torch.no_grad():
        model.base_model.lm_head.weight.mul_(1.5)
    model.base_model.requires_grad_(False)
    model.save_pretrained(tmp_path / "again")
    loaded = AutoModel.from_pretrained(tmp_path / "again")
    assert_same_results(model, loaded)
    loaded.save_pretrained(tmp_path / "later")
    assert_same_results(model, AutoModel.from_pretrained(tmp_path / "later"))
    AutoModel.from_pretrained(tmp_path / "full")(input_ids=QUERY, memory=memory)


def test_lora_alone_does_not_make_a_full_checkpoint(base, tmp_path):
    model = with_memory(base, **EVERY_OPTION)
    assert any("lora" in name for name, p in model.named_parameters() if p.requires_grad)
    model.save_pretrained(tmp_path / "adapter")
    assert not model.config.includes_base


def test_full_checkpoint_in_shards(tmp_path):
    model = with_memory(nameless_base(), **EVERY_OPTION)
    model.save_pretrained(tmp_path / "full", max_shard_size=20_000)
    assert len(list((tmp_path / "full").glob("model-*.safetensors"))) > 2
    assert_same_results(model, AutoModel.from_pretrained(tmp_path / "full"))


@pytest.mark.parametrize("model_type", ["mixtral", "emu3"])
def test_full_checkpoint_of_a_base_that_renames_or_has_no_auto_class(tmp_path, model_type):
    """Mixtures of experts are stored under other names; a text part is no model of its own to the Auto classes."""
    model = with_memory(tiny_causal_lm(model_type, torch.float32), **PLAIN)
    model.save_pretrained(tmp_path / "full")
    loaded = AutoModel.from_pretrained(tmp_path / "full")
    assert type(loaded.base_model) is type(model.base_model)
    assert_same_results(model, loaded)


def test_full_checkpoint_with_a_key_missing_is_refused(tmp_path):
    model = with_memory(nameless_base(), **PLAIN)
    model.save_pretrained(tmp_path / "full")
    path = tmp_path / "full" / "model.safetensors"
    whole = load_file(path)
    for key in ("base_model.model.layers.1.mlp.up_proj.weight", "memory_init"):
        save_file({name: tensor for name, tensor in whole.items() if name != key}, path, metadata={"format": "pt"})
        with pytest.raises(ValueError, match=f"config.json describes: missing {key}; unexpected none"):
            AutoModel.from_pretrained(tmp_path / "full")


def test_full_checkpoint_that_does_not_fit_its_configuration_is_refused(tmp_path):
    model = with_memory(nameless_base(), **PLAIN, memory_projection=True)
    model.save_pretrained(tmp_path / "full")
    with pytest.raises(ValueError, match=r"of another shape memory_init \(3, 32\) for \(4, 32\)"):
        AutoModel.from_pretrained(tmp_path / "full", num_memory_tokens=4)
    with pytest.raises(ValueError, match=r"unexpected memory_projection.bias, memory_projection.weight"):
        AutoModel.from_pretrained(tmp_path / "full", memory_projection=False)


def test_truncated_full_checkpoint_is_refused(tmp_path):
    with_memory(nameless_base(), **PLAIN).save_pretrained(tmp_path / "full")
    path = tmp_path / "full" / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(ValueError, match=r"full are not readable safetensors .* copied whole"):
        AutoModel.from_pretrained(tmp_path / "full")


def test_pickled_weights_are_not_loaded(tmp_path):
    model = with_memory(nameless_base(), **PLAIN)
    model.save_pretrained(tmp_path / "full")
    (tmp_path / "full" / "model.safetensors").unlink()
    torch.save(model.state_dict(), tmp_path / "full" / "pytorch_model.bin")
    with pytest.raises(OSError, match="safetensors"):
        AutoModel.from_pretrained(tmp_path / "full")
