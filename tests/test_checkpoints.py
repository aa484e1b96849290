"""Checkpoints: adapters beside their base, bases saved with them, and training that stops and goes on."""

import itertools
import json
import logging
import os
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    BitsAndBytesConfig,
    Trainer,
    TrainingArguments,
    default_data_collator,
)

from hf_gradmem import GradMemConfig, GradMemForCausalLM, GradMemMemory, get_gradmem_model
from hf_gradmem.checkpoint import base_keys

from .small_models import EVERY_OPTION, PLAIN, named_base, nameless_base, small_tokenizer, with_memory
from .tiny_models import VOCAB_SIZE, tiny_causal_lm, tiny_tokens

CONTEXT, QUERY = tiny_tokens(2, 9, seed=1), tiny_tokens(2, 5, seed=2)


ADAPTER_FILES = {"config.json", "model.safetensors", "README.md", "modeling_gradmem_hub.py"}


def results(model: GradMemForCausalLM) -> tuple[torch.Tensor, torch.Tensor]:
    memory = model.write(input_ids=CONTEXT)
    with torch.no_grad():
        return memory.embeddings, model(input_ids=QUERY, memory=memory).logits


def assert_same_results(model: GradMemForCausalLM, other: GradMemForCausalLM) -> None:
    for ours, theirs in zip(results(model), results(other), strict=True):
        assert torch.equal(ours, theirs)


def beside_base(model: GradMemForCausalLM) -> dict[str, torch.Tensor]:
    base = base_keys(model)
    return {key: value.clone() for key, value in model.state_dict().items() if key not in base}


def base_state(model: GradMemForCausalLM) -> dict[str, torch.Tensor]:
    base = base_keys(model)
    return {key: value.clone() for key, value in model.state_dict().items() if key in base}


def assert_equal_states(state: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> None:
    assert state.keys() == other.keys()
    assert [key for key in state if not torch.equal(state[key], other[key])] == []


def all_paths(directory: Path) -> set[str]:
    return {path.name for path in directory.iterdir()}


@pytest.fixture
def base(tmp_path):
    return named_base(tmp_path / "base")


@pytest.fixture
def transformers_warnings():
    """Messages at warning level and above that Transformers logs."""
    messages: list[str] = []
    handler = logging.Handler(logging.WARNING)
    handler.emit = lambda record: messages.append(record.getMessage())
    logger = logging.getLogger("transformers")
    logger.addHandler(handler)
    yield messages
    logger.removeHandler(handler)


@pytest.fixture
def base_arguments(monkeypatch):
    """What reaches the loading of the base."""
    seen: dict = {}
    load = AutoModelForCausalLM.from_pretrained

    def recorded(name, **arguments):
        seen.update(arguments, name=name)
        return load(name, **{key: value for key, value in arguments.items() if key != "quantization_config"})

    monkeypatch.setattr("hf_gradmem.checkpoint.AutoModelForCausalLM.from_pretrained", recorded)
    return seen


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


def test_options_given_to_from_pretrained_replace_the_saved_ones(base, tmp_path):
    with_memory(base, **PLAIN).save_pretrained(tmp_path / "adapter")
    for loader in (GradMemForCausalLM, AutoModel):
        loaded = loader.from_pretrained(tmp_path / "adapter", write_steps=5)
        assert loaded.write(input_ids=CONTEXT).write_losses.shape[1] == 5
    with pytest.raises(ValueError, match="write_steps must be at least 0, got -1"):
        GradMemForCausalLM.from_pretrained(tmp_path / "adapter", write_steps=-1)


def test_adapter_attaches_to_a_base_in_memory(base, tmp_path):
    model = with_memory(base, **EVERY_OPTION)
    memory = model.write(input_ids=CONTEXT)
    model.save_pretrained(tmp_path / "adapter")
    shutil.copytree(tmp_path / "base", tmp_path / "moved")
    attached = get_gradmem_model(named_base(tmp_path / "moved"), tmp_path / "adapter")
    assert_same_results(model, attached)
    attached(input_ids=QUERY, memory=memory)  # of the same base, wherever it lies


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


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_casting_to_half_precision_casts_the_base_alone(base, dtype):
    model = with_memory(base, **EVERY_OPTION)
    before = beside_base(model)
    model.memory_init.grad = torch.ones_like(model.memory_init)
    assert model.to(dtype).dtype == dtype
    assert {value.dtype for value in base_state(model).values()} == {dtype}
    assert_equal_states(beside_base(model), before)
    assert model.memory_init.grad.dtype == torch.float32
    model.float()
    assert_equal_states(beside_base(model), before)
    assert {value.dtype for value in base_state(model).values()} == {torch.float32}


def test_casting_to_double_casts_everything_and_half_precision_takes_it_back(base):
    model = with_memory(base, **EVERY_OPTION).double()
    assert {value.dtype for value in model.state_dict().values()} == {torch.float64}
    model.half()
    assert {value.dtype for value in beside_base(model).values()} == {torch.float32}


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
    one = with_memory(nameless_base(), **PLAIN)
    # Even if the second was made from the first one's configuration.
    two = get_gradmem_model(nameless_base(), one.config)
    with pytest.raises(ValueError, match="another base"):
        two(input_ids=QUERY, memory=one.write(input_ids=CONTEXT))


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


# ------------------------------------------------------------------------------------------------ vocabulary


@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
def test_resized_vocabulary_keeps_its_rows_and_is_saved_with_the_base(tmp_path, tied):
    nameless_base(tied).save_pretrained(tmp_path / "base")
    model = with_memory(named_base(tmp_path / "base"), **EVERY_OPTION)
    old = {
        "embeddings": model.get_input_embeddings().weight.clone(),
        "head": model.get_output_embeddings().weight.clone(),
        "write_head": model.write_head.weight.clone(),
    }
    model.resize_token_embeddings(VOCAB_SIZE + 6)
    new = {
        "embeddings": model.get_input_embeddings().weight,
        "head": model.get_output_embeddings().weight,
        "write_head": model.write_head.weight,
    }
    for name, weight in new.items():
        assert weight.shape[0] == VOCAB_SIZE + 6
        assert torch.equal(weight[:VOCAB_SIZE], old[name])
    assert torch.equal(new["write_head"][VOCAB_SIZE:], new["head"][VOCAB_SIZE:])
    assert not new["embeddings"].requires_grad
    assert new["write_head"].requires_grad
    model.save_pretrained(tmp_path / "full")
    loaded = AutoModel.from_pretrained(tmp_path / "full")
    assert_equal_states(loaded.state_dict(), model.state_dict())
    added = torch.tensor([[VOCAB_SIZE + 1, VOCAB_SIZE + 5, 20]])
    assert torch.equal(model.write(input_ids=added).embeddings, loaded.write(input_ids=added).embeddings)


def test_resizing_to_the_same_size_leaves_the_base_to_its_name(base, tmp_path):
    model = with_memory(base, **PLAIN)
    model.resize_token_embeddings(VOCAB_SIZE)
    model.save_pretrained(tmp_path / "adapter")
    assert not AutoModel.from_pretrained(tmp_path / "adapter").config.includes_base


# ------------------------------------------------------------------------------------------------ Trainer


def examples(number: int, labels_in_row: list[int] | None = None) -> list[dict[str, torch.Tensor]]:
    """Contexts with a query each; `labels_in_row` says how many of a query's 4 tokens are labels."""
    contexts, queries = tiny_tokens(number, 8, seed=3), tiny_tokens(number, 4, seed=4)
    labels = queries.clone()
    labels[:, :2] = -100
    for row, count in enumerate(labels_in_row or []):
        labels[row] = queries[row]
        labels[row, : 4 - count] = -100
    masks = torch.ones_like(contexts)
    masks[::2, :3] = 0
    return [
        {
            "context_input_ids": contexts[row],
            "context_attention_mask": masks[row],
            "input_ids": queries[row],
            "attention_mask": torch.ones(4, dtype=torch.long),
            "labels": labels[row],
            "not_for_the_model": torch.tensor(row),
        }
        for row in range(number)
    ]


def trainer(model, directory: Path, train=None, **arguments) -> Trainer:
    settings = {
        "output_dir": str(directory),
        "max_steps": 4,
        "per_device_train_batch_size": 2,
        "per_device_eval_batch_size": 2,
        "learning_rate": 1e-2,
        "lr_scheduler_type": "constant",
        "report_to": [],
        "use_cpu": True,
        "disable_tqdm": True,
        "logging_strategy": "no",
        "save_strategy": "no",
        "seed": 3,
    }
    return Trainer(
        model=model,
        args=TrainingArguments(**settings | arguments),
        train_dataset=train or examples(6),
        eval_dataset=examples(5),
        data_collator=default_data_collator,
    )


def about_loading(messages: list[str]) -> list[str]:
    return [message for message in messages if "missing keys" in message or "unexpected keys" in message]


@pytest.mark.parametrize("options", [PLAIN, EVERY_OPTION], ids=["plain", "every_option"])
def test_resumed_adapter_training_ends_where_an_unbroken_one_does(base, tmp_path, options, transformers_warnings):
    model = with_memory(base, **options)
    before, base_before = beside_base(model), base_state(model)
    saving = {"save_strategy": "steps", "save_steps": 2}
    trainer(model, tmp_path / "run", **saving).train()
    assert_equal_states(base_state(model), base_before)
    moved = {key for key, value in beside_base(model).items() if not torch.equal(value, before[key])}
    # Everything beside the base trains; control tokens of READ and LoRA included.
    assert moved == before.keys()
    assert {"config.json", "model.safetensors"} <= all_paths(tmp_path / "run" / "checkpoint-2")
    assert "generation_config.json" not in all_paths(tmp_path / "run" / "checkpoint-2")

    fresh = get_gradmem_model(named_base(tmp_path / "base"), GradMemConfig(**options))
    trainer(fresh, tmp_path / "resumed", **saving).train(resume_from_checkpoint=str(tmp_path / "run" / "checkpoint-2"))
    assert_equal_states(fresh.state_dict(), model.state_dict())
    assert about_loading(transformers_warnings) == []


def test_best_adapter_is_loaded_at_the_end(base, tmp_path, transformers_warnings):
    model = with_memory(base, **PLAIN)
    run = trainer(
        model,
        tmp_path / "run",
        load_best_model_at_end=True,
        metric_for_best_model="evaluations",
        greater_is_better=False,
        eval_strategy="steps",
        save_strategy="steps",
        eval_steps=2,
        save_steps=2,
    )
    evaluations = itertools.count()
    run.compute_metrics = lambda prediction: {"evaluations": next(evaluations)}  # so that the first is the best
    run.train()
    best = Path(run.state.best_model_checkpoint)
    assert best.name == "checkpoint-2"
    assert torch.equal(load_file(best / "model.safetensors")["memory_init"], model.memory_init)
    assert about_loading(transformers_warnings) == []


@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
def test_resumed_training_of_the_base_ends_where_an_unbroken_one_does(tmp_path, tied, transformers_warnings):
    nameless_base(tied).save_pretrained(tmp_path / "base")

    def fresh():
        model = with_memory(named_base(tmp_path / "base"), **PLAIN)
        return model.requires_grad_(True)

    model = fresh()
    saving = {"save_strategy": "steps", "save_steps": 2, "learning_rate": 1e-3}
    trainer(model, tmp_path / "run", **saving).train()
    assert not torch.equal(model.get_input_embeddings().weight, fresh().get_input_embeddings().weight)
    resumed = fresh()
    trainer(resumed, tmp_path / "resumed", **saving).train(
        resume_from_checkpoint=str(tmp_path / "run" / "checkpoint-2")
    )
    assert_equal_states(resumed.state_dict(), model.state_dict())
    assert about_loading(transformers_warnings) == []
    loaded = AutoModel.from_pretrained(tmp_path / "run" / "checkpoint-4")
    assert_same_results(model.eval(), loaded)


def test_prediction_returns_every_row_of_a_ragged_last_batch(base, tmp_path):
    model = with_memory(base, **PLAIN)
    rows = examples(5)
    output = trainer(model, tmp_path / "run").predict(rows)
    batch = default_data_collator([{k: v for k, v in row.items() if k != "not_for_the_model"} for row in rows])
    with torch.no_grad():
        expected = model(**batch)
    torch.testing.assert_close(torch.from_numpy(output.predictions), expected.logits, rtol=1e-4, atol=1e-5)
    assert torch.equal(torch.from_numpy(output.label_ids), batch["labels"])


def one_sgd_step(base, directory, labels_in_row, batch_size, accumulation) -> dict[str, torch.Tensor]:
    model = with_memory(base, **PLAIN)
    arguments = {
        "max_steps": 1,
        "per_device_train_batch_size": batch_size,
        "gradient_accumulation_steps": accumulation,
        "optim": "sgd",
        "max_grad_norm": 0.0,
        "learning_rate": 1.0,
    }
    trainer(model, directory, examples(4, labels_in_row), **arguments).train()
    return beside_base(model)


@pytest.mark.parametrize("labels_in_row", [[2, 2, 2, 2], [1, 4, 4, 4]], ids=["as_many_labels", "not_as_many"])
def test_accumulated_gradients_equal_one_batch_if_each_part_has_as_many_labels(tmp_path, labels_in_row):
    """CE(Y) is a mean over a batch's labels, so parts are weighted alike whatever labels they hold."""
    whole = one_sgd_step(named_base(tmp_path / "base"), tmp_path, labels_in_row, 4, 1)["memory_init"]
    parts = one_sgd_step(named_base(tmp_path / "base"), tmp_path, labels_in_row, 2, 2)["memory_init"]
    assert torch.allclose(whole, parts, rtol=1e-4, atol=1e-5) == (len(set(labels_in_row)) == 1)


def test_training_under_bfloat16_autocast_moves_the_memory_and_stays_in_float32(base, tmp_path):
    model = with_memory(base, **PLAIN)
    before = model.memory_init.detach().clone()
    trainer(model, tmp_path / "run", bf16=True).train()
    assert model.memory_init.dtype == torch.float32
    assert model.memory_init.isfinite().all()
    assert not torch.equal(model.memory_init, before)


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
