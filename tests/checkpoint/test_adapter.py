"""Adapters: saved beside their base, loaded with it or attached to it."""

import json
import os
import shutil

import pytest
import torch
from peft import LoraConfig
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM

from hf_gradmem import GradMemConfig, GradMemForCausalLM, GradMemMemory, get_gradmem_model
from tests.support.comparing import (
    ADAPTER_FILES,
    CONTEXT,
    QUERY,
    all_paths,
    assert_equal_states,
    assert_same_results,
    beside_base,
)
from tests.support.messages import says
from tests.support.small_models import (
    EVERY_OPTION,
    PLAIN,
    named_base,
    nameless_base,
    small_tokenizer,
    with_memory,
)
from tests.support.tiny_models import VOCAB_SIZE, tiny_causal_lm, tiny_tokens

# ------------------------------------------------------------------------------------------------ adapters


@pytest.mark.parametrize("auto_class", [GradMemForCausalLM, AutoModel, AutoModelForCausalLM])
@pytest.mark.parametrize("options", [PLAIN, EVERY_OPTION], ids=["plain", "every_option"])
def test_adapter_loaded_again_writes_and_reads_the_same(base, tmp_path, auto_class, options, transformers_warnings):
    model = with_memory(base, **options)
    model.save_pretrained(tmp_path / "adapter")
    loaded = auto_class.from_pretrained(tmp_path / "adapter")
    assert type(loaded) is GradMemForCausalLM
    assert_same_results(model, loaded)
    assert not loaded.training
    assert transformers_warnings == []


def test_adapter_directory_holds_what_is_beside_the_base_and_nothing_else(base, tmp_path):
    model = with_memory(base, **EVERY_OPTION)
    model.save_pretrained(tmp_path / "adapter")
    assert all_paths(tmp_path / "adapter") == ADAPTER_FILES
    saved = load_file(tmp_path / "adapter" / "model.safetensors")
    assert_equal_states(saved, beside_base(model))
    config = json.loads((tmp_path / "adapter" / "config.json").read_text())
    assert (config["model_type"], config["includes_base"]) == ("gradmem", False)
    assert config["base_model_name_or_path"] == str(tmp_path / "base")


def test_the_arguments_of_a_lora_may_be_a_peft_configuration_as_a_dict(base, tmp_path):
    """In which the targets are sets."""
    arguments = LoraConfig(r=2, target_modules=["v_proj", "q_proj"]).to_dict()
    model = with_memory(base, **PLAIN, write_lora=arguments, read_lora={"r": 2, "target_modules": {"o_proj"}})
    model.save_pretrained(tmp_path / "adapter")
    loaded = GradMemForCausalLM.from_pretrained(tmp_path / "adapter")
    assert loaded.config.write_lora["target_modules"] == ["q_proj", "v_proj"]
    assert_same_results(model, loaded)


def test_tokenizer_is_saved_with_the_adapter(base, tmp_path):
    model = get_gradmem_model(base, GradMemConfig(**PLAIN), tokenizer=small_tokenizer())
    model.save_pretrained(tmp_path / "adapter")
    files = all_paths(tmp_path / "adapter")
    assert files == ADAPTER_FILES | {"tokenizer.json", "tokenizer_config.json"}
    loaded = AutoModel.from_pretrained(tmp_path / "adapter")
    assert torch.equal(model.write("abc").embeddings, loaded.write("abc").embeddings)


def test_tokenizer_is_the_one_given_then_the_adapters_then_the_bases(base, tmp_path):
    def first_id(model):
        return model.tokenizer("a", add_special_tokens=False).input_ids[0]

    def ids(offset):
        return small_tokenizer(offset)("a").input_ids[0]

    small_tokenizer(1).save_pretrained(tmp_path / "base")
    model = get_gradmem_model(base, GradMemConfig(**PLAIN))
    model.save_pretrained(tmp_path / "without")
    assert first_id(model) == ids(1)
    get_gradmem_model(base, GradMemConfig(**PLAIN), tokenizer=small_tokenizer(2)).save_pretrained(tmp_path / "with")
    assert first_id(AutoModel.from_pretrained(tmp_path / "without")) == ids(1)
    assert first_id(AutoModel.from_pretrained(tmp_path / "with")) == ids(2)
    fresh = named_base(tmp_path / "base")
    assert first_id(get_gradmem_model(fresh, tmp_path / "with")) == ids(2)
    assert first_id(get_gradmem_model(fresh, tmp_path / "with", tokenizer=small_tokenizer(3))) == ids(3)


def test_shard_size_and_variant_do_not_move_an_adapter_out_of_its_one_file(base, tmp_path):
    model = with_memory(base, **EVERY_OPTION)
    model.save_pretrained(tmp_path / "adapter", max_shard_size=1000, variant="fp16")
    assert all_paths(tmp_path / "adapter") == ADAPTER_FILES
    assert_same_results(model, AutoModel.from_pretrained(tmp_path / "adapter"))


@pytest.mark.parametrize("auto_class", [GradMemForCausalLM, AutoModel, AutoModelForCausalLM])
def test_parts_and_precisions_that_are_asked_for_on_loading(base, tmp_path, auto_class):
    """A LoRA and step sizes that the adapter was trained without, and a precision that is left to the machine."""
    model = with_memory(base, **PLAIN)
    model.save_pretrained(tmp_path / "adapter")
    options = {"write_lora": {"r": 2, "target_modules": ["q_proj"]}, "learn_write_learning_rate": "per_step"}
    loaded = auto_class.from_pretrained(tmp_path / "adapter", **options, dtype="fastest")
    assert loaded.write_log_learning_rate.shape == (model.config.write_steps,)
    assert any("lora_A.write" in name for name in loaded.state_dict())


def test_options_given_to_from_pretrained_replace_the_saved_ones(base, tmp_path):
    with_memory(base, **PLAIN).save_pretrained(tmp_path / "adapter")
    for loader in (GradMemForCausalLM, AutoModel):
        loaded = loader.from_pretrained(tmp_path / "adapter", write_steps=5)
        assert loaded.write(input_ids=CONTEXT).write_losses.shape[1] == 5
    with pytest.raises(ValueError, match="write_steps must be at least 0, got -1"):
        GradMemForCausalLM.from_pretrained(tmp_path / "adapter", write_steps=-1)


@pytest.mark.parametrize("auto_class", [GradMemForCausalLM, AutoModel, AutoModelForCausalLM, GradMemConfig, AutoConfig])
def test_an_option_is_checked_whatever_class_it_is_given_to(base, tmp_path, auto_class):
    with_memory(base, **PLAIN).save_pretrained(tmp_path / "adapter")
    with pytest.raises(ValueError, match=says("write_learning_rate must be greater than 0, got -1.0")):
        auto_class.from_pretrained(tmp_path / "adapter", write_learning_rate=-1.0)
    with pytest.raises(ValueError, match=says("no option 'wrte_steps'", "nearest is 'write_steps'")):
        auto_class.from_pretrained(tmp_path / "adapter", wrte_steps=3)
    loaded = auto_class.from_pretrained(tmp_path / "adapter", write_steps=3)
    assert getattr(loaded, "config", loaded).write_steps == 3


@pytest.mark.parametrize("learned", ["per_step", "per_token"])
@pytest.mark.parametrize("steps", [1, 5])
@pytest.mark.parametrize("included", [False, True])
def test_learned_step_sizes_serve_another_number_of_steps(
    base, tmp_path, learned, steps, included, transformers_warnings
):
    model = with_memory(nameless_base() if included else base, **PLAIN | {"learn_write_learning_rate": learned})
    model.save_pretrained(tmp_path / "adapter")
    expected = model.write(input_ids=tiny_tokens(2, 9), write_steps=steps).embeddings
    loaded = GradMemForCausalLM.from_pretrained(tmp_path / "adapter", write_steps=steps)
    assert torch.equal(loaded.write(input_ids=tiny_tokens(2, 9)).embeddings, expected)
    assert loaded.write_log_learning_rate.requires_grad
    model.config.write_steps = steps
    model.save_pretrained(tmp_path / "adapter")
    loaded = GradMemForCausalLM.from_pretrained(tmp_path / "adapter")
    assert torch.equal(loaded.write(input_ids=tiny_tokens(2, 9)).embeddings, expected)
    assert not any("MISMATCH" in message for message in transformers_warnings)


def test_learned_step_sizes_of_a_variant_serve_another_number_of_steps(tmp_path):
    model = with_memory(nameless_base(), **PLAIN | {"learn_write_learning_rate": "per_token"})
    model.save_pretrained(tmp_path / "adapter", variant="own")
    loaded = GradMemForCausalLM.from_pretrained(tmp_path / "adapter", variant="own", write_steps=5)
    expected = model.write(input_ids=tiny_tokens(2, 9), write_steps=5).embeddings
    assert torch.equal(loaded.write(input_ids=tiny_tokens(2, 9)).embeddings, expected)


@pytest.mark.parametrize("included", [False, True])
def test_a_step_size_beside_learned_ones_is_refused(base, tmp_path, included):
    learned = PLAIN | {"learn_write_learning_rate": "per_step"}
    with_memory(nameless_base() if included else base, **learned).save_pretrained(tmp_path / "adapter")
    for auto_class in (GradMemForCausalLM, AutoModelForCausalLM):
        with pytest.raises(ValueError, match="has learned the sizes of its steps, beside which write_learning_rate"):
            auto_class.from_pretrained(tmp_path / "adapter", write_learning_rate=0.1)
    with pytest.raises(ValueError, match="learned the sizes of its steps for write_loss_reduction='mean'"):
        GradMemForCausalLM.from_pretrained(tmp_path / "adapter", write_loss_reduction="sum")


def test_adapter_attaches_to_a_base_in_memory(base, tmp_path):
    model = with_memory(base, **EVERY_OPTION)
    memory = model.write(input_ids=CONTEXT)
    model.save_pretrained(tmp_path / "adapter")
    shutil.copytree(tmp_path / "base", tmp_path / "moved")
    attached = get_gradmem_model(named_base(tmp_path / "moved"), tmp_path / "adapter")
    assert_same_results(model, attached)
    attached(input_ids=QUERY, memory=memory)  # of the same base, wherever it lies


def test_a_base_that_was_moved_is_named_where_it_is_now(tmp_path):
    base = named_base(tmp_path / "base")
    small_tokenizer().save_pretrained(tmp_path / "base")
    model = with_memory(base, **PLAIN)
    model.save_pretrained(tmp_path / "adapter")
    (tmp_path / "base").rename(tmp_path / "moved")
    attached = get_gradmem_model(named_base(tmp_path / "moved"), tmp_path / "adapter")
    assert len(attached.tokenizer) == len(small_tokenizer())
    attached.save_pretrained(tmp_path / "again")
    assert_same_results(model, GradMemForCausalLM.from_pretrained(tmp_path / "again"))


@pytest.mark.parametrize("fact", ["hidden_size", "vocab_size"])
def test_adapter_does_not_attach_to_another_base(base, tmp_path, fact):
    with_memory(base, **PLAIN).save_pretrained(tmp_path / "adapter")
    config = tiny_causal_lm("llama").config
    expected = getattr(config, fact)
    setattr(config, fact, expected * 2)
    other = AutoModelForCausalLM.from_config(config)
    with pytest.raises(ValueError, match=rf"with {fact} {expected}, but base_model has {expected * 2}"):
        get_gradmem_model(other, tmp_path / "adapter")


def test_base_that_changed_where_it_lies_is_refused(base, tmp_path):
    with_memory(base, **PLAIN).save_pretrained(tmp_path / "adapter")
    base = tiny_causal_lm("llama", torch.float32)
    base.resize_token_embeddings(VOCAB_SIZE + 4, mean_resizing=False)
    base.save_pretrained(tmp_path / "base")
    with pytest.raises(ValueError, match=f"has vocab_size {VOCAB_SIZE + 4}, but .* a base with {VOCAB_SIZE}"):
        AutoModel.from_pretrained(tmp_path / "adapter")


def test_base_that_is_gone_is_named_with_the_way_out(base, tmp_path):
    with_memory(base, **PLAIN).save_pretrained(tmp_path / "adapter")
    shutil.rmtree(tmp_path / "base")
    with pytest.raises(OSError, match=rf"{tmp_path / 'base'}, could not be loaded.*get_gradmem_model\(base_model"):
        AutoModel.from_pretrained(tmp_path / "adapter")


# ------------------------------------------------------------------------------------------------ saving


def test_a_save_by_another_process_writes_nothing(base, tmp_path):
    model = get_gradmem_model(base, GradMemConfig(**PLAIN), tokenizer=small_tokenizer())
    model.save_pretrained(tmp_path / "adapter", is_main_process=False)
    assert os.listdir(tmp_path / "adapter") == []


def test_saving_with_push_to_hub_uploads_the_tokenizer_too(base, tmp_path, monkeypatch):
    uploaded = {}

    def push(self, repo_id, token=None, commit_message=None):
        directory = tmp_path / "pushed"
        self.save_pretrained(directory)
        uploaded.update(repo_id=repo_id, token=token, commit_message=commit_message, files=all_paths(directory))

    monkeypatch.setattr(GradMemForCausalLM, "push_to_hub", push)
    model = get_gradmem_model(base, GradMemConfig(**PLAIN), tokenizer=small_tokenizer())
    model.save_pretrained(tmp_path / "adapter", push_to_hub=True, repo_id="me/mine", token="t", commit_message="m")
    assert {key: uploaded[key] for key in ("repo_id", "token", "commit_message")} == {
        "repo_id": "me/mine",
        "token": "t",
        "commit_message": "m",
    }
    assert {"tokenizer.json", "model.safetensors"} <= uploaded["files"]


def test_a_memory_saved_beside_its_adapter_disturbs_neither(base, tmp_path):
    model = with_memory(base, **EVERY_OPTION)
    memory = model.write(input_ids=CONTEXT)
    model.save_pretrained(tmp_path / "both")
    memory.save_pretrained(tmp_path / "both")
    loaded = AutoModel.from_pretrained(tmp_path / "both")
    restored = GradMemMemory.from_pretrained(tmp_path / "both")
    assert torch.equal(loaded(input_ids=QUERY, memory=restored).logits, model(input_ids=QUERY, memory=memory).logits)
