"""The stock Trainer: training that stops and goes on, evaluation, precision."""

import itertools
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import (
    AutoModel,
    Trainer,
    TrainingArguments,
    default_data_collator,
)

from hf_gradmem import GradMemConfig, get_gradmem_model
from hf_gradmem.training.callbacks import log_writes
from hf_gradmem.training.card import fill_model_card
from tests.support.comparing import all_paths, assert_equal_states, assert_same_results, base_state, beside_base
from tests.support.small_models import EVERY_OPTION, PLAIN, named_base, nameless_base, with_memory
from tests.support.tiny_models import tiny_tokens


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


@pytest.mark.parametrize("set_up", [log_writes, fill_model_card])
def test_label_smoothing_is_refused_where_a_trainer_is_set_up(base, tmp_path, set_up):
    model = with_memory(base, **PLAIN)
    with pytest.raises(ValueError, match=r"label_smoothing_factor=0\.1 makes Trainer compute a loss of its own"):
        set_up(trainer(model, tmp_path, examples(2), label_smoothing_factor=0.1))
    set_up(trainer(model, tmp_path, examples(2)))
