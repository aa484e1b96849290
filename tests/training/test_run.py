"""Training from recipes with the stock Trainer."""

import json
import math
import shutil

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, Trainer, TrainerCallback, TrainingArguments

from hf_gradmem import GradMemConfig, GradMemForCausalLM, get_gradmem_model
from hf_gradmem.evaluation import evaluate_rows
from hf_gradmem.evaluation.results import evaluate_model
from hf_gradmem.tasks import load_set, load_task
from hf_gradmem.tasks.kv_retrieval import build_tokenizer
from hf_gradmem.training.callbacks import log_writes
from hf_gradmem.training.checkpoints import keep_recipe, last_checkpoint
from hf_gradmem.training.optimizer import build_optimizer
from hf_gradmem.training.recipe import make_recipe
from hf_gradmem.training.run import build_model, build_trainer, run_training
from tests.support.small_models import small_llama, with_memory
from tests.support.tiny_models import tiny_causal_lm
from tests.support.tiny_training import (
    TINY,
    assert_same_weights,
    on_two_processes,
    stock_trainer,
    tiny_model,
    tiny_recipe,
    weights,
)

LORA = {"r": 2, "target_modules": ["q_proj"]}


def logged(trainer, name):
    return [entry[name] for entry in trainer.state.log_history if name in entry]


# ------------------------------------------------------------------------------------------------ learning


def test_loss_falls_within_twenty_steps(tmp_path):
    trainer = build_trainer(tiny_recipe(tmp_path, stages=[{"steps": 20}], learning_rate=1e-2))
    trainer.train()
    losses = logged(trainer, "loss")
    assert len(losses) == 20
    assert losses[-1] < 0.75 * losses[0]


def test_log_has_write_losses_memory_norm_and_step_sizes(tmp_path):
    trainer = build_trainer(tiny_recipe(tmp_path, step_size_learning_rate=0.1))
    seen = []

    class Plotter(TrainerCallback):
        def on_log(self, args, state, control, logs=None, **kwargs):
            seen.append(dict(logs))

    trainer.add_callback(Plotter())
    trainer.train()
    entries = [entry for entry in trainer.state.log_history if "loss" in entry]
    names = {"write_loss/0", "write_loss/1", "read_loss", "memory_norm", "step_size/0", "step_size/1"}
    assert all(names <= entry.keys() for entry in entries)
    assert all(names <= entry.keys() for entry in seen if "loss" in entry)  # plotting callbacks have them too
    first = entries[0]
    weight = trainer.model.config.reconstruction_loss_weight
    assert first["loss"] == pytest.approx(first["read_loss"] + weight * first["write_loss/1"], rel=1e-4)
    # Adam's first step has the size of its learning rate, whatever the gradient; step sizes live in log space.
    assert abs(np.log(first["step_size/0"] / 0.04)) == pytest.approx(0.1, rel=0.35)
    moved = trainer.model.write_log_learning_rate.detach() - np.log(0.04)
    assert moved.abs().max() > 0.15


def test_step_sizes_have_a_learning_rate_of_their_own(tmp_path):
    trainer = build_trainer(tiny_recipe(tmp_path, step_size_learning_rate=0.1, weight_decay=0.3))
    model = trainer.model
    rates = {parameter: group for group in trainer.optimizer.param_groups for parameter in group["params"]}
    assert set(rates) == {parameter for parameter in model.parameters() if parameter.requires_grad}
    assert rates[model.write_log_learning_rate]["lr"] == 0.1
    assert rates[model.memory_init]["lr"] == 1e-3
    decayed = {name for name, parameter in model.named_parameters() if rates[parameter]["weight_decay"] == 0.3}
    layers = [f"base_model.model.layers.0.{part}" for part in ("self_attn", "mlp")]
    assert decayed == {name for name in dict(model.named_parameters()) if name.startswith(tuple(layers))} | {
        "write_head.weight"
    }


def test_muon_leaves_a_lora_inside_the_base_to_the_optimizer_of_the_rest(tmp_path):
    lora = {"r": 2, "target_modules": "all-linear"}
    settings = {"muon_learning_rate": 0.02, "stages": [{"steps": 1}]}
    trainer = build_trainer(tiny_recipe(tmp_path, gradmem={"read_lora": lora, "write_lora": lora}, **settings))
    rates = {parameter: group["lr"] for group in trainer.optimizer.param_groups for parameter in group["params"]}
    named = dict(trainer.model.named_parameters())
    with_muon = {name for name, parameter in named.items() if rates[parameter] == 0.02}
    assert with_muon == {name for name in named if ".layers." in name and "norm" not in name and "lora_" not in name}


@pytest.mark.parametrize("muon", [None, 0.02])
def test_experts_in_one_tensor_are_decayed_and_left_to_the_optimizer_of_the_rest(tmp_path, muon):
    model = with_memory(tiny_causal_lm("mixtral", torch.float32), num_memory_tokens=2).requires_grad_(True)
    training = TrainingArguments(str(tmp_path), weight_decay=0.1, report_to="none", use_cpu=True)
    groups = build_optimizer(model, training, None, muon).param_groups
    of = {parameter: group for group in groups for parameter in group["params"]}
    experts = [parameter for name, parameter in model.named_parameters() if "experts." in name]
    assert {parameter.dim() for parameter in experts} == {3}
    assert {of[parameter]["weight_decay"] for parameter in experts} == {0.1}
    assert {of[parameter]["lr"] for parameter in experts} == {training.learning_rate}


def test_muon_takes_the_matrices_of_the_base_and_leaves_the_rest(tmp_path):
    trainer = build_trainer(tiny_recipe(tmp_path, muon_learning_rate=0.02, stages=[{"steps": 1}]))
    model = trainer.model
    groups = {parameter: group for group in trainer.optimizer.param_groups for parameter in group["params"]}
    assert set(groups) == {parameter for parameter in model.parameters() if parameter.requires_grad}
    with_muon = {name for name, parameter in model.named_parameters() if groups[parameter]["lr"] == 0.02}
    matrices = {name for name in dict(model.named_parameters()) if ".layers." in name and "norm" not in name}
    assert with_muon == matrices
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    trainer.train()
    assert model.card_facts.training["optimizer"] == "adamw_torch_fused, Muon (0.02) for the base's matrices"
    for name, parameter in model.named_parameters():
        assert parameter.requires_grad == (not torch.equal(parameter, before[name])), name
    # A step of Muon is orthogonal, up to its five Newton-Schulz iterations: it is about as long in every direction.
    for name in matrices:
        moved = torch.linalg.svdvals(model.get_parameter(name).detach() - before[name])
        assert moved.median() > 0.5 * moved.max()


def test_curriculum_is_followed_to_the_row(tmp_path):
    stages = [
        {"steps": 2, "write_steps": 1},
        {"steps": 3, "task_arguments": {"num_pairs": 4}},
        {"steps": 1, "write_steps": 3, "task_arguments": {"num_pairs": 3}},
    ]
    trainer = build_trainer(tiny_recipe(tmp_path, stages=stages))
    seen = [(len(batch["context_input_ids"][0]), batch["write_steps"]) for batch in trainer.get_train_dataloader()]
    assert seen == [(10, 1)] * 2 + [(20, 2)] * 3 + [(15, 3)]
    trainer.train()
    assert trainer.state.global_step == 6


def test_a_stage_draws_the_steps_of_write_anew_for_each_outer_step(tmp_path):
    stages = [{"steps": 24, "write_steps": [1, 2, 5]}]
    trainer = build_trainer(tiny_recipe(tmp_path, stages=stages))
    drawn = [batch["write_steps"] for batch in trainer.get_train_dataloader()]
    assert len(drawn) == 24
    assert set(drawn) == {1, 2, 5}
    assert drawn == [batch["write_steps"] for batch in trainer.get_train_dataloader()]  # as a resumed run needs


def test_a_file_is_repeated_in_new_orders_as_long_as_the_stage_takes(tmp_path):
    stories = "".join(f"1 Story {index} begins.\n2 Which? \t{index}\t1\n" for index in range(10))
    (tmp_path / "qa.txt").write_text(stories, encoding="utf-8")
    recipe = tiny_recipe(tmp_path / "run", task="babi", task_arguments={"path": str(tmp_path / "qa.txt")})
    rows = [row["targets"][0] for row in build_trainer(recipe).train_dataset]
    assert len(rows) == 24
    assert set(rows[:9]) == set(rows[9:18])
    assert rows[:9] != rows[9:18]


def test_a_stage_does_not_begin_the_data_anew(tmp_path):
    """A stream goes on where the stage before left it, and a file in orders that it has not been read in."""
    recipe = tiny_recipe(tmp_path / "stream", stages=[{"steps": 4}, {"steps": 2, "write_steps": 1}])
    rows = [row["context"] for row in build_trainer(recipe).train_dataset]
    assert rows == list(load_task("kv_retrieval", **TINY["task_arguments"], num_contexts=24)["context"])
    own = TINY["task_arguments"] | {"num_contexts": 3}
    recipe = tiny_recipe(tmp_path / "few", task_arguments=own, stages=[{"steps": 1}, {"steps": 2}])
    few = list(load_task("kv_retrieval", **own)["context"])
    assert [row["context"] for row in build_trainer(recipe).train_dataset] == [*few, few[0], *few, *few, *few[:2]]

    with pytest.raises(ValueError, match="first=7 would do nothing"):
        build_trainer(tiny_recipe(tmp_path, stages=[{"steps": 1, "task_arguments": {"first": 7}}]))
    recipe = tiny_recipe(tmp_path / "later", task_arguments=own | {"first": 7}, stages=[{"steps": 1}])
    later = list(load_task("kv_retrieval", **own | {"num_contexts": 10})["context"])[7:]
    assert [row["context"] for row in build_trainer(recipe).train_dataset] == [*later, later[0]]

    stories = "".join(f"1 Story {index} begins.\n2 Which? \t{index}\t1\n" for index in range(10))
    (tmp_path / "qa.txt").write_text(stories, encoding="utf-8")
    of_file = {"task": "babi", "task_arguments": {"path": str(tmp_path / "qa.txt")}}

    def read(stages):
        trainer = build_trainer(tiny_recipe(tmp_path / "run", **of_file, stages=stages))
        return [row["targets"][0] for row in trainer.train_dataset]

    # Nine rows are trained on: the first stage reads one order, and of the second one three rows.
    assert read([{"steps": 3}, {"steps": 2}])[12:] == read([{"steps": 7}])[18:26]


def test_a_new_base_knows_the_words_of_all_stages_and_evaluation_sets(tmp_path):
    for name, word in (("first", "attic"), ("later", "barn"), ("held_out", "cave")):
        story = f"1 Ann is in the {word}.\n2 Where? \t{word}\t1\n" * 10
        (tmp_path / f"{name}.txt").write_text(story, encoding="utf-8")
    recipe = tiny_recipe(
        tmp_path / "run",
        task="babi",
        task_arguments={"path": str(tmp_path / "first.txt")},
        stages=[{"steps": 1}, {"steps": 1, "task_arguments": {"path": str(tmp_path / "later.txt")}}],
        eval_sets={"v": {"path": str(tmp_path / "held_out.txt")}, "other": {"task": "babi_stories", "num_contexts": 1}},
    )
    vocabulary = build_trainer(recipe).processing_class.get_vocab()
    (of_other,) = load_task("babi_stories", "validation", num_contexts=1)
    assert {"attic", "barn", "cave", of_other["targets"][0].strip()} <= vocabulary.keys()


def test_a_writer_that_takes_no_steps_is_trained_and_evaluated(tmp_path):
    pooled = {"num_memory_tokens": 2, "writer": "pooled", "reconstruction_loss_weight": 0.0}
    recipe = tiny_recipe(tmp_path, gradmem=pooled, stages=[{"steps": 2}], eval_sets={"a": {"num_contexts": 4}})
    results = run_training(recipe)
    assert math.isfinite(results["metrics"]["eval_a_loss"])
    model = GradMemForCausalLM.from_pretrained(tmp_path)
    rows = {"a": load_task("kv_retrieval", **TINY["task_arguments"], num_contexts=4)}
    (record,) = evaluate_model("it", model, rows, {"a": {}}, metrics={"a": "exact_match"}, split="validation")
    assert (record["write_steps"], record["write_steps_trained"]) == (0, 0)


def test_a_recipe_can_be_evaluated_on_another_task(tmp_path):
    recipe = tiny_recipe(
        tmp_path, eval_sets={"same": {"num_contexts": 3}, "other": {"task": "facts", "num_contexts": 4}}
    )
    trainer = build_trainer(recipe)
    assert list(trainer.eval_dataset["other"]) == list(load_task("facts", "validation", num_contexts=4))
    with pytest.raises(ValueError, match="There is no task 'kv'"):
        tiny_recipe(tmp_path, eval_sets={"other": {"task": "kv"}})


def test_an_evaluation_counts_nothing_of_one_that_was_interrupted(tmp_path, monkeypatch):
    sets = {"eval_sets": {"a": {"num_contexts": 4}}, "per_device_eval_batch_size": 2}
    trainer = build_trainer(tiny_recipe(tmp_path, **sets))
    expected = trainer.evaluate()
    metric, step = trainer.compute_metrics, trainer.prediction_step

    def interrupted(*arguments, **options):
        if metric.answers:
            raise KeyboardInterrupt
        return step(*arguments, **options)

    monkeypatch.setattr(trainer, "prediction_step", interrupted)
    with pytest.raises(KeyboardInterrupt):
        trainer.evaluate()
    monkeypatch.setattr(trainer, "prediction_step", step)
    assert metric.answers == 4  # of two contexts
    metric.right_answers, metric.right_tokens = 4, 8  # all of them, so that what is left of them would tell
    again = trainer.evaluate()
    assert {name: again[f"eval_a_{name}"] for name in ("exact_match", "token_accuracy")} == {
        name: expected[f"eval_a_{name}"] for name in ("exact_match", "token_accuracy")
    }


def test_running_text_has_no_end_to_learn(tmp_path):
    """Where a task's targets end, the end is learned; a continuation just stops being given."""
    (tmp_path / "book.txt").write_text("A sentence of some words. " * 40, encoding="utf-8")
    tiny = build_trainer(tiny_recipe(tmp_path / "kv"))
    for part in (tiny.model.base_model, tiny.processing_class):
        part.save_pretrained(tmp_path / "base")
    recipe = tiny_recipe(
        tmp_path / "text",
        task="text",
        task_arguments={"path": str(tmp_path / "book.txt")},
        base_config=None,
        base_model=str(tmp_path / "base"),
        train_base=False,
        eval_sets={},
        eval_strategy="no",
    )
    for trainer, ends in ((tiny, True), (build_trainer(recipe), False)):
        labels = next(iter(trainer.get_train_dataloader()))["labels"]
        assert bool((labels == trainer.processing_class.eos_token_id).any()) == ends


@pytest.mark.parametrize("steps", [1, 6])
def test_a_run_that_diverges_ends_with_an_error_and_saves_nothing_of_it(tmp_path, steps):
    """Also where the last step alone breaks the weights, of which no loss tells."""
    settings = {"learning_rate": float("inf"), "max_grad_norm": 0, "save_strategy": "steps", "save_steps": 1}
    with pytest.raises(FloatingPointError, match=r"Training diverged: by step 1 .* Lower learning_rate"):
        run_training(tiny_recipe(tmp_path, stages=[{"steps": steps}], eval_sets={"a": {"num_contexts": 2}}, **settings))
    assert not list(tmp_path.glob("**/model.safetensors"))
    settings |= {"learning_rate": 1e30, "save_strategy": "no", "stages": [{"steps": 6}]}
    with pytest.raises(FloatingPointError, match="Training diverged: by step 2"):
        run_training(tiny_recipe(tmp_path / "later", **settings))


# ------------------------------------------------------------------------------------------------ same numbers


def test_same_seed_gives_the_same_numbers(tmp_path):
    for name in ("first", "second"):
        run_training(tiny_recipe(tmp_path / name))
    run_training(tiny_recipe(tmp_path / "other", seed=1))
    assert_same_weights(weights(tmp_path / "first"), weights(tmp_path / "second"))
    other = weights(tmp_path / "other")
    assert not torch.equal(weights(tmp_path / "first")["memory_init"], other["memory_init"])


@pytest.mark.parametrize("optimizer", [{}, {"muon_learning_rate": 1e-2}], ids=["adamw", "muon"])
def test_killed_and_resumed_run_equals_an_unbroken_one(tmp_path, monkeypatch, optimizer):
    settings = optimizer | {
        "save_strategy": "steps",
        "save_steps": 2,
        "lr_scheduler_type": "linear",
        "warmup_steps": 3,
        "stages": [{"steps": 3}, {"steps": 4, "task_arguments": {"num_pairs": 3}}],
    }
    run_training(tiny_recipe(tmp_path / "whole", **settings))

    class KilledError(Exception):
        pass

    class Kill(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            if state.global_step == 5:
                raise KilledError

    recipe = tiny_recipe(tmp_path / "broken", **settings)
    broken = build_trainer(recipe)
    keep_recipe(recipe, tmp_path / "broken")
    broken.add_callback(Kill())
    with pytest.raises(KilledError):
        broken.train()
    (tmp_path / "broken" / "checkpoint-6").mkdir()  # the save that the kill fell into
    for cut in ("", '{"global_step": 6,', "[]"):
        (tmp_path / "broken" / "checkpoint-6" / "trainer_state.json").write_text(cut, encoding="utf-8")
        assert last_checkpoint(tmp_path / "broken").endswith("checkpoint-4")
    (tmp_path / "broken" / "checkpoint-6" / "trainer_state.json").unlink()
    assert last_checkpoint(tmp_path / "broken").endswith("checkpoint-4")
    taken = []
    training_step = Trainer.training_step

    def counted_step(*arguments, **options):
        taken.append(1)
        return training_step(*arguments, **options)

    monkeypatch.setattr(Trainer, "training_step", counted_step)
    run_training(tiny_recipe(tmp_path / "broken", **settings))
    assert len(taken) == 3
    assert_same_weights(weights(tmp_path / "whole"), weights(tmp_path / "broken"))
    states = [json.loads((tmp_path / name / "trainer_state.json").read_text()) for name in ("whole", "broken")]
    losses = [[entry["loss"] for entry in state["log_history"] if "loss" in entry] for state in states]
    assert len(losses[0]) == 7
    assert losses[0] == losses[1]


def test_a_folder_that_is_only_named_like_a_checkpoint_is_none(tmp_path):
    for name in ("checkpoint-4", "checkpoint-20", "checkpoint-best"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "trainer_state.json").write_text("{}", encoding="utf-8")
    assert last_checkpoint(tmp_path).endswith("checkpoint-20")
    assert last_checkpoint(tmp_path / "missing") is None


def test_a_run_that_kept_the_model_alone_does_not_go_on_from_it(tmp_path):
    settings = {"save_strategy": "steps", "save_steps": 2, "save_only_model": True, "stages": [{"steps": 4}]}
    run_training(tiny_recipe(tmp_path, **settings))
    run_training(tiny_recipe(tmp_path, **settings))
    shutil.rmtree(tmp_path / "checkpoint-4")
    with pytest.raises(ValueError, match="checkpoint-2 was saved with save_only_model"):
        run_training(tiny_recipe(tmp_path, **settings))


@pytest.mark.parametrize("best", [False, True], ids=["last", "best"])
def test_a_run_that_has_taken_its_steps_takes_no_more_when_it_is_started_again(tmp_path, monkeypatch, best):
    """Neither when it is whole, nor when it was killed after its last checkpoint."""
    settings = {"save_strategy": "steps", "save_steps": 1, "learning_rate": 0.05, "stages": [{"steps": 4}]}
    settings["eval_sets"] = {"v": {"num_contexts": 4}}
    if best:  # the largest loss is that of the first step
        settings |= {"load_best_model_at_end": True, "metric_for_best_model": "eval_v_loss", "greater_is_better": True}
        settings |= {"eval_strategy": "steps", "eval_steps": 1}
    results = run_training(tiny_recipe(tmp_path, **settings))
    trained, card = weights(tmp_path), (tmp_path / "README.md").read_text(encoding="utf-8")
    assert_same_weights(trained, weights(tmp_path / ("checkpoint-1" if best else "checkpoint-4")))
    monkeypatch.setattr(Trainer, "training_step", lambda *_, **__: pytest.fail("a step was taken"))
    for missing in ([], ["model.safetensors", "results.json", "trainer_state.json", "README.md"]):
        for name in missing:
            (tmp_path / name).unlink()
        again = run_training(tiny_recipe(tmp_path, **settings))
        assert again["steps"] == 4
        assert again["metrics"]["eval_v_loss"] == results["metrics"]["eval_v_loss"]
        assert_same_weights(weights(tmp_path), trained)
        assert (tmp_path / "README.md").read_text(encoding="utf-8") == card


def test_checkpoints_of_another_recipe_are_not_gone_on_from(tmp_path):
    """Nor those of one that names another file of the same name, of which the published recipe shows nothing."""
    for folder in ("a", "b"):
        (tmp_path / folder).mkdir()
        row = {"context": f"!{folder}:1!", "question": f"?!{folder}:", "answer": "1"}
        (tmp_path / folder / "rows.jsonl").write_text(json.dumps(row), encoding="utf-8")

    def recipe(folder, **changes):
        held_out = {"task": "jsonl", "split": "test", "path": str(tmp_path / folder / "rows.jsonl")}
        settings = {"save_strategy": "steps", "save_steps": 2, "eval_sets": {"v": held_out}}
        return tiny_recipe(tmp_path / "run", **settings | changes)

    run_training(recipe("a"))
    with pytest.raises(ValueError, match="another recipe; learning_rate changed"):
        run_training(recipe("a", learning_rate=2e-3))
    with pytest.raises(ValueError, match="another recipe; eval_sets changed"):
        run_training(recipe("b"))
    (tmp_path / "run" / "_recipe.yaml").rename(tmp_path / "run" / "recipe.yaml")  # as runs of before have it
    with pytest.raises(ValueError, match="another recipe; eval_sets changed"):
        run_training(recipe("b"))
    run_training(recipe("a"))


def test_a_finished_run_without_checkpoints_is_not_written_over_by_another_recipe(tmp_path):
    run_training(tiny_recipe(tmp_path))
    assert last_checkpoint(tmp_path) is None
    trained = weights(tmp_path)
    with pytest.raises(ValueError, match="another recipe; seed changed"):
        run_training(tiny_recipe(tmp_path, seed=1))
    assert_same_weights(weights(tmp_path), trained)
    run_training(tiny_recipe(tmp_path))


def test_a_run_whose_folder_was_moved_is_the_same_run(tmp_path, monkeypatch):
    run_training(tiny_recipe(tmp_path / "run"))
    trained = weights(tmp_path / "run")
    (tmp_path / "run").rename(tmp_path / "moved")
    monkeypatch.chdir(tmp_path)
    run_training(tiny_recipe("moved"))
    assert_same_weights(weights("moved"), trained)
    with pytest.raises(ValueError, match="another recipe; seed changed"):
        run_training(tiny_recipe(tmp_path / "moved", seed=1))


def test_a_run_that_no_recipe_wrote_is_not_gone_on_from(tmp_path):
    run_training(tiny_recipe(tmp_path, save_strategy="steps", save_steps=6))
    for name in ("recipe.yaml", "_recipe.yaml"):
        (tmp_path / name).unlink()
    with pytest.raises(ValueError, match="holds a run that no recipe wrote"):
        run_training(tiny_recipe(tmp_path))


@pytest.mark.parametrize("train_base", [False, True])
def test_a_base_is_not_saved_over_by_what_is_trained_on_it(tmp_path, train_base):
    tiny_model().base_model.save_pretrained(tmp_path)
    build_tokenizer().save_pretrained(tmp_path)
    kept = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    recipe = tiny_recipe(tmp_path, base_model=str(tmp_path), base_config=None, train_base=train_base)
    with pytest.raises(ValueError, match="is where the base lies"):
        run_training(recipe)
    model = get_gradmem_model(AutoModelForCausalLM.from_pretrained(tmp_path), GradMemConfig())
    with pytest.raises(ValueError, match="is where the base lies"):
        model.save_pretrained(tmp_path)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == kept


def test_a_recipe_of_ones_own_in_the_runs_folder_is_not_written_over(tmp_path):
    own = "# mine\ntask: kv_retrieval\n"
    (tmp_path / "recipe.yaml").write_text(own, encoding="utf-8")
    with pytest.raises(ValueError, match=r"recipe\.yaml was written by no run"):
        run_training(tiny_recipe(tmp_path))
    assert (tmp_path / "recipe.yaml").read_text(encoding="utf-8") == own


def test_a_base_that_a_recipe_builds_has_the_precision_that_it_names(tmp_path):
    assert build_model(tiny_recipe(tmp_path, base_dtype="bfloat16").arguments).base_model.dtype == torch.bfloat16


def test_accumulated_batches_count_as_one(tmp_path):
    plain = {"optim": "sgd", "learning_rate": 0.1, "stages": [{"steps": 3}]}
    run_training(tiny_recipe(tmp_path / "whole", per_device_train_batch_size=8, **plain))
    run_training(tiny_recipe(tmp_path / "parts", per_device_train_batch_size=2, gradient_accumulation_steps=4, **plain))
    assert_same_weights(weights(tmp_path / "whole"), weights(tmp_path / "parts"), tolerance=1e-6)


def test_two_processes_have_the_gradients_of_one(tmp_path):
    plain = {"optim": "sgd", "learning_rate": 0.1, "stages": [{"steps": 2}, {"steps": 1, "write_steps": 1}]}
    plain["task_arguments"] = TINY["task_arguments"] | {"num_pairs": [1, 4]}  # batches of different widths
    plain["task_arguments"] |= {"queries_per_context": 1}  # as many labels in every batch
    run_training(tiny_recipe(tmp_path / "one", per_device_train_batch_size=4, **plain))
    values = TINY | plain | {"output_dir": str(tmp_path / "two"), "per_device_train_batch_size": 2}
    on_two_processes("train", json.dumps(values))
    assert_same_weights(weights(tmp_path / "one"), weights(tmp_path / "two"), tolerance=1e-6)


def test_two_processes_evaluate_ragged_rows_as_one_does(tmp_path):
    ragged = {"num_contexts": 9, "num_pairs": [1, 4], "seed": 1}
    values = TINY | {"stages": [{"steps": 1}], "per_device_eval_batch_size": 2, "eval_sets": {"ragged": ragged}}
    alone = run_training(make_recipe(values | {"output_dir": str(tmp_path / "one"), "per_device_train_batch_size": 8}))
    limits = {"max_query_length": 8, "queries_per_context": 4}
    on_two_processes("train", json.dumps(values | limits | {"output_dir": str(tmp_path / "two")}))
    together = json.loads((tmp_path / "two" / "results.json").read_text(encoding="utf-8"))["metrics"]
    for name in ("eval_ragged_exact_match", "eval_ragged_token_accuracy"):
        assert together[name] == pytest.approx(alone["metrics"][name], abs=1e-6)


def test_processes_that_evaluate_need_one_shape(tmp_path, monkeypatch):
    monkeypatch.setattr(TrainingArguments, "world_size", 2)
    with pytest.raises(ValueError, match="give the recipe max_query_length and queries_per_context"):
        build_trainer(tiny_recipe(tmp_path, eval_sets={"a": {"num_contexts": 2}}))


def test_training_goes_on_from_an_adapter(tmp_path):
    run_training(tiny_recipe(tmp_path / "first"))
    values = {name: value for name, value in TINY.items() if name not in ("base_config", "gradmem")}
    values |= {"adapter": str(tmp_path / "first"), "gradmem": {"reconstruction_loss_weight": 0.0}}
    trainer = build_trainer(make_recipe(values | {"output_dir": str(tmp_path / "second")}))
    before = {name: tensor.clone() for name, tensor in trainer.model.state_dict().items()}
    saved = weights(tmp_path / "first")
    assert all(torch.equal(before[name], tensor) for name, tensor in saved.items())
    assert trainer.model.config.reconstruction_loss_weight == 0.0
    assert trainer.model.config.write_head
    trainer.train()
    changed = {name for name, tensor in trainer.model.state_dict().items() if not torch.equal(before[name], tensor)}
    assert {"memory_init", "write_log_learning_rate", "write_head.weight"} <= changed
    assert any(name.startswith("base_model.") for name in changed)


def test_terms_made_from_the_steps_are_trained_and_may_be_given_to_an_adapter(tmp_path):
    both = {"reconstruction_loss_weight": 0, "alignment_loss_weight": 0.1, "intermediate_read_loss_weight": 0.2}
    recipe = tiny_recipe(tmp_path / "first", gradmem=TINY["gradmem"] | both, eval_sets={"a": {"num_contexts": 4}})
    results = run_training(recipe)
    assert all(math.isfinite(value) for value in results["metrics"].values())
    history = json.loads((tmp_path / "first" / "trainer_state.json").read_text())["log_history"]
    steps = [entry for entry in history if "loss" in entry]
    assert len(steps) == 6
    # The logged loss holds the terms, each of which is above 0.
    assert all(entry["loss"] > entry["read_loss"] for entry in steps)

    values = {name: value for name, value in TINY.items() if name not in ("base_config", "gradmem")}
    changes = {"alignment_loss_weight": 0.3, "intermediate_read_loss_weight": 0.0, "meta_gradient_steps": 1}
    values |= {"adapter": str(tmp_path / "first"), "gradmem": changes, "output_dir": str(tmp_path / "second")}
    trainer = build_trainer(make_recipe(values))
    config = trainer.model.config
    assert {name: getattr(config, name) for name in changes} == changes
    assert trainer.model.writer.meta_gradient.steps == 1
    before = trainer.model.memory_init.detach().clone()
    trainer.train()
    assert trainer.model.memory_init.isfinite().all()
    assert not torch.equal(trainer.model.memory_init, before)


def test_adapter_is_given_parts_that_change_nothing_until_they_are_trained(tmp_path):
    """A WRITE-LoRA and learned step sizes, after an adapter was trained without them."""
    tokenizer = build_tokenizer()
    small_llama(len(tokenizer), tokenizer).save_pretrained(tmp_path / "base")
    tokenizer.save_pretrained(tmp_path / "base")
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    before = get_gradmem_model(base, GradMemConfig(num_memory_tokens=2, read_lora=LORA), tokenizer=tokenizer)
    before.save_pretrained(tmp_path / "first")
    values = {name: value for name, value in TINY.items() if name not in ("base_config", "train_base")}
    values |= {"adapter": str(tmp_path / "first"), "base_model": str(tmp_path / "base")}
    values |= {"gradmem": {"write_lora": LORA, "learn_write_learning_rate": "per_step"}}
    trainer = build_trainer(make_recipe(values | {"output_dir": str(tmp_path / "second")}))
    context = torch.arange(4, 10)[None]
    memories = [model.write(input_ids=context).embeddings for model in (trainer.model, before)]
    torch.testing.assert_close(*memories)
    trainer.train()
    trainer.save_model()
    # What was trained is not begun anew.
    trained = GradMemForCausalLM.from_pretrained(tmp_path / "second", write_lora=LORA)
    assert all(weight.any() for name, weight in trained.named_parameters() if "lora_B" in name)
    assert len(set(trained.write_log_learning_rate.tolist())) == 2


def test_checkpoint_that_includes_its_base_is_given_no_further_parts(tmp_path):
    tiny_model(learn_write_learning_rate="none").save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="only an adapter on a frozen one can be given write_lora"):
        GradMemForCausalLM.from_pretrained(tmp_path, write_lora=LORA)
    GradMemForCausalLM.from_pretrained(tmp_path, write_lora=None)


def test_part_that_a_file_lacks_is_refused_unless_it_was_added(tmp_path):
    tiny_model(learn_write_learning_rate="none").save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text(encoding="utf-8"))
    (tmp_path / "config.json").write_text(json.dumps(config | {"learn_write_learning_rate": "per_step"}))
    with pytest.raises(ValueError, match="missing write_log_learning_rate"):
        GradMemForCausalLM.from_pretrained(tmp_path)


@pytest.mark.parametrize("written", [False, True])
def test_whether_targets_end_in_an_end_token_is_each_sets_own(tmp_path, written):
    """In training and in `evaluate_rows`, by whatever metric."""
    (tmp_path / "book.txt").write_text("It rained. " * 12, encoding="utf-8")
    text = {"task": "text", "path": str(tmp_path / "book.txt"), "context_sentences": 1, "target_sentences": 1}
    text |= {"validation_share": 0.5}
    pairs = {"task": "kv_retrieval", "num_contexts": 3} | TINY["task_arguments"]
    changes = {"eval_sets": {"text": text, "pairs": pairs, "both": {"task": "mixture", "parts": [text, pairs]}}}
    if written:
        changes |= {"memories": str(tmp_path / "memories"), "train_base": False}
        changes["gradmem"] = TINY["gradmem"] | {"read_lora": LORA, "meta_gradient": "first_order"}
        changes["task_arguments"] = TINY["task_arguments"] | {"num_contexts": 3}
    trainer = build_trainer(tiny_recipe(tmp_path / "run", **changes))
    end = trainer.processing_class.eos_token_id
    ends = {}
    for name, rows in trainer.eval_dataset.items():
        labels = trainer.data_collator([rows[index] for index in range(len(rows))])["labels"]
        ends[name] = (labels == end).any(-1).float().mean().item()
        found = list(load_set("kv_retrieval", {"split": "validation"} | changes["eval_sets"][name]))
        (record,) = evaluate_rows(trainer.model, found, [1], metric=None)
        unscored = sum(not query for row in found for query in row["queries"])
        assert record["num_answer_tokens"] == int((labels != -100).sum()) - unscored
    assert ends["text"] == 0
    assert ends["pairs"] == 1
    assert 0 < ends["both"] < 1


def test_whether_targets_end_is_each_stages_own(tmp_path):
    row = {"context": "!a:1!", "question": "?!a:", "answer": "1"}
    stages = []
    for name, own in (("open", {"add_end_token": False}), ("plain", {})):
        (tmp_path / f"{name}.jsonl").write_text(json.dumps(row | own) + "\n", encoding="utf-8")
        stages.append({"steps": 1, "task_arguments": {"path": {"train": str(tmp_path / f"{name}.jsonl")}}})
    tiny_model().base_model.save_pretrained(tmp_path / "base")
    build_tokenizer().save_pretrained(tmp_path / "base")
    base = {"base_model": str(tmp_path / "base"), "base_config": None}
    recipe = tiny_recipe(tmp_path / "run", task="jsonl", task_arguments={}, stages=stages, **base)
    assert [row["add_end_token"] for row in build_trainer(recipe).train_dataset] == [False] * 4 + [None] * 4


def test_streamed_set_on_two_processes_keeps_queries_with_their_contexts():
    on_two_processes("stream")


# ------------------------------------------------------------------------------------------------ stock Trainer


def test_stock_trainer_evaluates_and_predicts_every_row_of_a_ragged_set(tmp_path):
    rows = load_task("kv_retrieval", num_contexts=5, num_pairs=[1, 4], key_length=1, value_length=1, end_mark=False)
    trainer = stock_trainer(tmp_path, tiny_model(), rows, per_device_eval_batch_size=2)
    output = trainer.predict(rows)
    assert output.predictions.shape == output.label_ids.shape == (5, 4, 8)
    asked = [len(queries) for queries in rows["queries"]]
    assert (output.label_ids[..., 4] != -100).sum(1).tolist() == asked
    metrics = trainer.evaluate()
    assert metrics["eval_exact_match"] == output.metrics["test_exact_match"]
    batched = stock_trainer(tmp_path, trainer.model, rows, per_device_eval_batch_size=2, batch_eval_metrics=True)
    assert batched.evaluate()["eval_token_accuracy"] == metrics["eval_token_accuracy"]


def test_stock_trainer_runs_under_bf16_autocast_and_loads_the_best_model(tmp_path):
    rows = load_task("kv_retrieval", num_contexts=8, num_pairs=2, key_length=1, value_length=1)
    trainer = stock_trainer(
        tmp_path,
        tiny_model(),
        rows,
        bf16=True,
        max_steps=4,
        per_device_train_batch_size=4,
        learning_rate=1e-2,
        logging_steps=1,
        eval_strategy="steps",
        eval_steps=2,
        save_steps=2,
        load_best_model_at_end=True,
        metric_for_best_model="eval_loss",
    )
    log_writes(trainer)
    trainer.train()
    assert all(np.isfinite(loss) for loss in logged(trainer, "loss"))
    assert len(logged(trainer, "write_loss/1")) == 4
    best = GradMemForCausalLM.from_pretrained(trainer.state.best_model_checkpoint)
    for name, tensor in best.state_dict().items():
        torch.testing.assert_close(trainer.model.state_dict()[name], tensor, rtol=0, atol=0)


def test_text_columns_taken_away_by_trainer_are_missed_by_name(tmp_path):
    rows = load_task("kv_retrieval", num_contexts=2, num_pairs=2)
    trainer = stock_trainer(tmp_path, tiny_model(), rows, remove_unused_columns=True)
    with pytest.raises(ValueError, match=r"No columns in the dataset match|remove_unused_columns=False"):
        trainer.evaluate()
