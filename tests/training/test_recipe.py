"""Recipes: what a file may say, and what is refused before training."""

import pytest
import yaml

from hf_gradmem.training.recipe import load_recipe, make_recipe
from hf_gradmem.training.run import build_trainer
from tests.support.tiny_training import TINY, tiny_recipe


def test_recipe_file_and_overrides(tmp_path):
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump(TINY | {"output_dir": str(tmp_path)}) + "adam_epsilon: 1e-9\n", encoding="utf-8")
    overrides = [
        "gradmem.write_steps=5",
        "stages.0.steps=7",
        "learning_rate=2e-4",
        "eval_sets.long={num_pairs: 6}",
        "task_arguments.seed=3",
    ]
    recipe = load_recipe(path, overrides)
    assert recipe.arguments.config.write_steps == 5
    assert recipe.arguments.curriculum[0].steps == recipe.training.max_steps == 7
    assert recipe.training.learning_rate == 2e-4
    assert recipe.training.adam_epsilon == 1e-9
    assert recipe.arguments.eval_sets == {"long": {"num_pairs": 6}}
    assert recipe.arguments.task_arguments["seed"] == 3


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a: [", "not a readable recipe"),
        ("- a", "holds list"),
        ("", "holds NoneType"),
        ("seed: 1\nlearning_rate: 1\nseed: 2", "seed is given twice"),
        ("gradmem: {write_steps: 1, write_steps: 2}", "write_steps is given twice"),
    ],
)
def test_unreadable_recipe_is_named(text, message, tmp_path):
    path = tmp_path / "recipe.yaml"
    path.write_text(text, encoding="utf-8")
    with pytest.raises(ValueError, match=rf"(?s)recipe\.yaml.*{message}"):
        load_recipe(path)
    with pytest.raises(OSError, match=r"missing\.yaml"):
        load_recipe(tmp_path / "missing.yaml")


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("task=kv", "no task 'kv'"),
        ("stages=[]", "needs stages"),
        ("stages.0.steps=0", "steps of a stage .* 0"),
        ("stages.0.write_steps=-1", "write_steps of a stage must be at least 0, or a list of such, got -1"),
        ("stages.0.write_steps=[]", "write_steps of a stage must be at least 0"),
        ("stages.0.steps=true", "steps of a stage must be a number of at least 1, got True"),
        ("stages.0.write_steps=true", "write_steps of a stage must be at least 0, or a list of such, got True"),
        ("stages.0.task_arguments=null", "task_arguments of a stage must be a mapping of names to values, got None"),
        ("start={method: reptile, contexts: true}", "contexts of a start must be a number of at least 1, got True"),
        (
            "start={method: reptile, contexts: 2, write_learning_rates: 0.4}",
            "write_learning_rates of a start must be a list of numbers above 0, got 0.4",
        ),
        ("stages.1.steps=3", "override 'stages.1.steps=3'"),
        ("stages.0.pairs=3", "Stage 0 .*pairs"),
        ("base_model=name", "either a base_model or a base_config"),
        ("adapter=name", "The adapter name brings base and options"),
        ("base_config={hidden_size: 3}", "needs a model_type"),
        ("gradmem.write_stps=3", "nearest is 'write_steps'"),
        ("max_steps=3", "set by its stages: it is 6, not 3"),
        ("num_train_epochs=3", "num_train_epochs in .* would do nothing: the steps of its stages"),
        ("dataloader_drop_last=true", "dataloader_drop_last: True in .* leaves rows out"),
        ("ignore_data_skip=true", "ignore_data_skip: True in .* begins the stages anew"),
        ("train_sampling_strategy=group_by_length", "group_by_length in .* by a length that they do not have"),
        ("resume_from_checkpoint=runs/a", "resume_from_checkpoint in .* would do nothing: it goes on"),
        ('gradmem.num_memory_tokens="4"', "gradmem holds a value of another kind: .*'num_memory_tokens' expected int"),
        ("step_size_learning_rate=0", "step_size_learning_rate .* 0"),
        ("muon_learning_rate=-1", "muon_learning_rate .* -1"),
        ("learning_rat=1", "learning_rat"),
        ("eval_sets.a=3", "evaluation set 'a'"),
        ("eval_sets={4: {num_pairs: 4}}", "name of an evaluation set must be a text, got 4: put it in quotes"),
        ("learning_rate", "key=value"),
        ("eval_sets=[1]", r"eval_sets must be a mapping of names to values, got \[1\]"),
        ("task_arguments=3", "task_arguments must be a mapping of names to values, got 3"),
        ("gradmem=[write_steps]", "gradmem must be a mapping"),
        ("stages=3", "stages must be a list, got 3"),
        ("stages={steps: 3}", "stages must be a list"),
        ("task=[kv_retrieval]", "task must be a text"),
        ("base_config=llama", "base_config must be a mapping"),
        ("learning_rate=abc", "learning_rate in .* must be a number, got 'abc'"),
        ("seed=1.5", "seed in .* must be a whole number, got 1.5"),
        ("seed=null", "seed in .* must be a whole number, got None. Leave the line out for the default"),
        ("distractors=null", "distractors in .* must be a whole number, got None"),
        ("learning_rate=null", "learning_rate in .* must be a number, got None"),
        ("gradmem.write_betas=[a, b]", r"write_betas must be two numbers in \[0, 1\), got \('a', 'b'\)"),
        ("gradmem.reconstruction_loss_weight=.nan", "reconstruction_loss_weight must be at least 0, got nan"),
        ("max_context_length=true", "max_context_length in .* must be a whole number, got True"),
        ("auto_find_batch_size=true", "auto_find_batch_size in .* would do nothing: the stages are cut"),
        ('train_base="false"', "train_base in .* must be true or false, without quotes, got 'false'"),
        ("frozen=[1]", r"frozen must be a list of names, texts each, got \[1\]"),
        ("label_smoothing_factor=0.1", "label_smoothing_factor=0.1 makes Trainer compute a loss of its own"),
    ],
)
def test_wrong_recipe_is_refused_before_training(override, message, tmp_path):
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump(TINY | {"output_dir": str(tmp_path)}), encoding="utf-8")
    with pytest.raises(ValueError, match=message):
        load_recipe(path, [override])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"hidden_size": "a"}, r"base_config makes no base: Field 'hidden_size' expected int, got str \(value: 'a'\)"),
        ({"num_attention_heads": 3}, r"base_config makes no base: The hidden size \(16\) is not a multiple"),
    ],
)
def test_a_base_that_cannot_be_is_refused_by_what_is_wrong_with_it(options, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        build_trainer(tiny_recipe(tmp_path, base_config=TINY["base_config"] | options))


def test_wrong_task_arguments_are_refused_before_training(tmp_path):
    with pytest.raises(ValueError, match=r"kv_retrieval.*pairs"):
        build_trainer(tiny_recipe(tmp_path, stages=[{"steps": 2, "task_arguments": {"pairs": 3}}]))


@pytest.mark.parametrize(
    ("asked", "named"),
    [
        (
            {"load_best_model_at_end": True, "eval_strategy": "steps", "save_strategy": "steps"},
            "load_best_model_at_end",
        ),
        ({"save_strategy": "best", "eval_strategy": "steps"}, "save_strategy: best"),
        ({"lr_scheduler_type": "reduce_lr_on_plateau", "eval_strategy": "steps"}, "reduce_lr_on_plateau"),
    ],
)
def test_the_best_is_looked_for_by_the_metric_of_an_evaluation_set(asked, named):
    sets = {"eval_sets": {"few": {}, "many": {"num_pairs": 4}}}
    for metric in ({}, {"metric_for_best_model": "exact_match"}):
        message = rf"{named}.* in .* goes by metric_for_best_model, .*: give few_loss or many_loss"
        with pytest.raises(ValueError, match=message):
            make_recipe(TINY | sets | {"output_dir": "unused"} | asked | metric)
    own = {"metric_for_best_model": "eval_many_exact_match"}
    assert make_recipe(TINY | sets | {"output_dir": "unused"} | asked | own).training.metric_for_best_model


def test_noise_on_the_vectors_of_a_base_that_does_not_train_is_refused():
    with pytest.raises(ValueError, match=r"neftune_noise_alpha in .* would do nothing: the base does not train"):
        make_recipe(TINY | {"train_base": False, "neftune_noise_alpha": 5})
