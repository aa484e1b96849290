"""Recipes that ask nothing: WRITE alone is trained, on the loss of the memories themselves."""

import pytest
import torch
from torch.autograd.graph import saved_tensors_hooks
from torch.optim import Muon

from hf_gradmem import GradMemForCausalLM
from hf_gradmem.evaluation.limits import limited_rows
from hf_gradmem.tasks.collator import DataCollatorForGradMem
from hf_gradmem.tasks.kv_retrieval import build_tokenizer
from hf_gradmem.training.run import build_trainer, run_training
from tests.support.gradients import build
from tests.support.tiny_models import tiny_tokens
from tests.support.tiny_training import TINY, tiny_recipe

LORA = {"r": 2, "target_modules": ["q_proj"]}
ALONE = {
    "queries_per_context": 0,
    "train_base": False,
    "gradmem": TINY["gradmem"] | {"write_lora": LORA, "read_lora": LORA, "meta_gradient": "first_order"},
    "eval_sets": {"held_out": {"num_contexts": 8}},
    "eval_strategy": "steps",
    "eval_steps": 30,
}


def test_what_write_uses_learns_and_the_rest_stays(tmp_path):
    stages = [{"steps": 60, "write_steps": [0, 1, 2]}]
    trainer = build_trainer(tiny_recipe(tmp_path, **ALONE | {"stages": stages, "learning_rate": 3e-2}))
    model = trainer.model
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    trainer.train()
    moved = {name for name, parameter in model.named_parameters() if not torch.equal(parameter, before[name])}
    assert moved == {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert {"memory_init", "write_log_learning_rate", "write_head.weight"} < moved
    assert {name for name in before if "lora_" in name and ".write." in name} < moved
    assert not {name for name in moved if ".read." in name or "embed_tokens" in name or "mlp" in name}
    measured = [entry["eval_held_out_loss"] for entry in trainer.state.log_history if "eval_held_out_loss" in entry]
    assert len(measured) == 2
    assert measured[1] < measured[0]


def test_the_loss_is_that_of_the_memory_that_was_written(tmp_path):
    results = run_training(tiny_recipe(tmp_path, **ALONE))
    model = GradMemForCausalLM.from_pretrained(tmp_path)
    rows = build_trainer(tiny_recipe(tmp_path, **ALONE)).eval_dataset["held_out"]
    memory = model.write([row["context"] for row in rows], measure_final_loss=True)
    assert results["metrics"]["eval_held_out_loss"] == pytest.approx(memory.final_write_loss.mean().item(), rel=1e-5)
    assert "eval_held_out_exact_match" not in results["metrics"]


def test_named_parameters_stay_as_they_are(tmp_path):
    trainer = build_trainer(tiny_recipe(tmp_path, **ALONE | {"frozen": ["memory_*", "*.lora_A.*"]}))
    model = trainer.model
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    trainer.train()
    moved = {name for name, parameter in model.named_parameters() if not torch.equal(parameter, before[name])}
    assert "memory_init" not in moved
    assert {name for name in moved if "lora_" in name} == {
        name for name in before if "lora_B" in name and ".write." in name
    }


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"frozen": ["memory_strat"]},
            "frozen names 'memory_strat', and no parameter that trains is called so. They are",
        ),
        ({"frozen": "memory_init"}, "frozen must be a list, got 'memory_init'"),
        ({"frozen": ["*"]}, r"Nothing is left to train: frozen is \['\*'\], and queries_per_context 0"),
        (
            {"gradmem": ALONE["gradmem"] | {"distillation_loss_weight": 0.5, "alignment_loss_weight": 0.5}},
            "the memory alone: alignment_loss_weight, distillation_loss_weight would do nothing",
        ),
    ],
)
def test_what_would_train_nothing_is_refused(tmp_path, changes, message):
    with pytest.raises(ValueError, match=message):
        build_trainer(tiny_recipe(tmp_path, **ALONE | changes))


def test_a_rate_for_step_sizes_that_are_not_learned_is_refused(tmp_path):
    fixed = {"gradmem": {"num_memory_tokens": 2}, "step_size_learning_rate": 0.1}
    with pytest.raises(ValueError, match=r"step_size_learning_rate would do nothing, got 0.1: no step size is learned"):
        build_trainer(tiny_recipe(tmp_path, **fixed))


def test_muon_trains_what_is_left_to_it(tmp_path):
    muon = {"muon_learning_rate": 0.02, "stages": [{"steps": 1}]}
    for frozen, kind in ((["base_model.*"], torch.optim.AdamW), (["memory_*", "write_*", "*norm*", "*embed*"], Muon)):
        trainer = build_trainer(tiny_recipe(tmp_path, frozen=frozen, **muon))
        assert isinstance(trainer.optimizer, kind)
        trainer.train()


def test_the_card_has_the_loss(tmp_path):
    results = run_training(tiny_recipe(tmp_path, **ALONE))
    card = (tmp_path / "README.md").read_text(encoding="utf-8")
    assert f"{results['metrics']['eval_held_out_loss']:.4f}" in card


def test_evaluation_says_that_nothing_is_asked(tmp_path):
    trainer = build_trainer(tiny_recipe(tmp_path, **ALONE))
    with pytest.raises(ValueError, match=r"queries_per_context is 0: .*--override queries_per_context=null"):
        limited_rows(trainer.model, trainer.eval_dataset["held_out"], {"queries_per_context": 0})


def test_nothing_is_kept_for_a_loss_that_is_not_asked_for():
    def numbers_kept(weight):
        model, kept = build(meta_gradient="first_order", reconstruction_loss_weight=weight), []
        with saved_tensors_hooks(lambda tensor: kept.append(tensor.numel()) or tensor, lambda tensor: tensor):
            model(context_input_ids=tiny_tokens(2, 9)).loss.backward()
        return sum(kept)

    assert numbers_kept(0.5) == numbers_kept(0.0) > 0


def test_contexts_need_no_question():
    shape = {"padding": "max_length", "max_context_length": 9}
    collate = DataCollatorForGradMem(build_tokenizer(), queries_per_context=0, **shape)
    assert collate([{"context": "ab"}, {"context": ["a", "b"]}])["context_input_ids"].shape == (2, 9)
