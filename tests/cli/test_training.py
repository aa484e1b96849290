"""`hf-gradmem train` and `hf-gradmem evaluate`."""

import json
from pathlib import Path

import pytest
import torch

from hf_gradmem.commands.packaged import RETRIEVAL_ADAPTER
from hf_gradmem.evaluation import results
from tests.support.command_line import mistake, run

RECIPE = """
task: kv_retrieval
task_arguments: {num_pairs: 2, key_length: 1, value_length: 1, seed: 0}
eval_sets: {two: {num_contexts: 3, seed: 1}}
stages: [{steps: 3}]
base_config: {model_type: llama, hidden_size: 16, intermediate_size: 32, num_hidden_layers: 1, num_attention_heads: 2}
train_base: true
gradmem: {num_memory_tokens: 2, write_steps: 1}
per_device_train_batch_size: 2
report_to: none
disable_tqdm: true
"""


def test_train_then_evaluate_an_adapter(tmp_path: Path) -> None:
    recipe, adapter = tmp_path / "recipe.yaml", tmp_path / "adapter"
    recipe.write_text(RECIPE, encoding="utf-8")
    trained = run("train", recipe, "--override", f"output_dir={adapter}", "--override", "stages.0.steps=2")
    assert trained.exit_code == 0, trained.stderr
    assert f"{adapter} (2 steps)" in trained.stdout
    report = tmp_path / "results.json"
    evaluated = run("evaluate", adapter, "--recipe", recipe, "--steps", 0, "--steps", 2, "--output", report, "--json")
    assert evaluated.exit_code == 0, evaluated.stderr
    assert json.loads(evaluated.stdout) == json.loads(report.read_text(encoding="utf-8"))
    start, written = json.loads(evaluated.stdout)["results"]
    assert [record["write_steps"] for record in (start, written)] == [0, 2]
    assert written["num_answers"] == 6
    assert written["write_loss"] < start["write_loss"]


def test_answers_that_are_not_generated_are_not_written(tmp_path: Path) -> None:
    recipe, answers = tmp_path / "recipe.yaml", tmp_path / "answers.jsonl"
    recipe.write_text(RECIPE, encoding="utf-8")
    answers.write_text("of before\n", encoding="utf-8")
    asked = run("evaluate", "nobody", "--recipe", recipe, "--metric", "none", "--answers", answers)
    assert "--answers has nothing to write" in mistake(asked)
    assert answers.read_text(encoding="utf-8") == "of before\n"


@pytest.mark.parametrize(("config", "message"), [("{", "config.json is not JSON"), ("[]", "holds no GradMem adapter")])
def test_a_broken_adapter_is_not_calibrated(tmp_path: Path, config: str, message: str) -> None:
    (tmp_path / "config.json").write_text(config, encoding="utf-8")
    (tmp_path / "recipe.yaml").write_text(RECIPE, encoding="utf-8")
    assert message in mistake(run("calibrate", tmp_path, "--recipe", tmp_path / "recipe.yaml"))


@pytest.mark.parametrize("bars", ["true", "false"])
def test_training_prints_its_result_alone_and_quietly_nothing(tmp_path: Path, bars: str) -> None:
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(RECIPE, encoding="utf-8")
    options = ["stages.0.steps=1", "logging_steps=1", f"disable_tqdm={bars}"]
    options = [part for option in options for part in ("--override", option)]
    told = run("train", recipe, *options, "--override", f"output_dir={tmp_path / 'told'}", "--json")
    assert told.exit_code == 0, told.stderr
    assert json.loads(told.stdout)["steps"] == 1
    assert "'loss'" in told.stderr
    quiet = run("--quiet", "train", recipe, *options, "--override", f"output_dir={tmp_path / 'quiet'}")
    assert (quiet.exit_code, quiet.stdout, quiet.stderr) == (0, "", "")


def test_results_are_not_written_over_what_is_evaluated(base: str, tmp_path: Path) -> None:
    (tmp_path / "rows.jsonl").write_text('{"context": "c", "question": "q", "answer": "a"}\n', encoding="utf-8")
    recipe = tmp_path / "recipe.yaml"
    own = f"own: {{task: jsonl, path: {tmp_path / 'rows.jsonl'}}}, two: {{"
    recipe.write_text(RECIPE.replace("two: {", own), encoding="utf-8")
    for place in (Path(base) / "config.json", Path(base) / "model.safetensors", tmp_path / "rows.jsonl"):
        for option in ("--output", "--answers"):
            message = mistake(run("evaluate", base, "--recipe", recipe, option, place))
            assert f"{place.name} is another file of this command" in message


def test_an_adapter_is_evaluated_in_the_precision_of_the_recipe(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe, adapter, seen = tmp_path / "recipe.yaml", tmp_path / "adapter", []
    recipe.write_text(RECIPE, encoding="utf-8")
    assert run("train", recipe, "--override", f"output_dir={adapter}", "--override", "stages.0.steps=1").exit_code == 0
    monkeypatch.setattr(results, "evaluate_model", lambda _, model, *__, **___: seen.append(model.dtype) or [])
    for dtype in ("float32", "bfloat16"):
        evaluated = run("evaluate", adapter, "--recipe", recipe, "--override", f"base_dtype={dtype}")
        assert evaluated.exit_code == 0, evaluated.stderr
    assert seen == [torch.float32, torch.bfloat16]


def test_options_of_the_memory_are_an_adapters_own_and_those_of_a_plain_base(base: str, tmp_path: Path) -> None:
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(RECIPE, encoding="utf-8")
    for override in ("gradmem.write_steps=7", "gradmem={write_steps: 7}"):
        refused = run("evaluate", RETRIEVAL_ADAPTER, "--recipe", recipe, "--override", override)
        assert refused.exit_code == 2
        assert f"{override} would do nothing" in refused.stderr
    plain = run("evaluate", base, "--recipe", recipe, "--override", "gradmem.writer=forward", "--json")
    assert plain.exit_code == 0, plain.stderr
    (record,) = json.loads(plain.stdout)["results"]
    assert (record["writer"], record["num_memory_tokens"], record["write_steps"]) == ("forward", 2, 1)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("task=poetry", "poetry"),
        ("gradmem.write_step=3", "write_steps"),
        ("nothing", "key=value"),
        ("stages=[]", "stages"),
        ("queries_per_context=-1", "queries_per_context must be at least 0, got -1"),
        ("max_context_length=0", "max_context_length must be at least 1, got 0"),
        ("base_config.num_hidden_layer=3", "base_config has 'num_hidden_layer', which llama has not. Is it 'num_hid"),
        ('stages.0.steps="100"', "steps of a stage must be a number of at least 1, got '100'"),
    ],
)
def test_a_wrong_recipe_is_one_line_and_nothing_is_written(tmp_path: Path, override: str, message: str) -> None:
    recipe, adapter = tmp_path / "recipe.yaml", tmp_path / "adapter"
    recipe.write_text(RECIPE, encoding="utf-8")
    result = run("train", recipe, "--override", f"output_dir={adapter}", "--override", override)
    assert result.exit_code == 2
    assert message in result.stderr
    assert result.stderr.count("\n") == 1
    assert not adapter.exists()


def test_rows_of_ones_own_train_evaluate_and_are_written_as_memories(base: str, tmp_path: Path) -> None:
    rows = tmp_path / "secret" / "rows.jsonl"
    rows.parent.mkdir()
    given = [{"context": f"Gate {n}.", "question": "Which?", "answers": [str(n), f"gate {n}"]} for n in range(6)]
    rows.write_text("\n".join(map(json.dumps, given)), encoding="utf-8")
    recipe, adapter = tmp_path / "recipe.yaml", tmp_path / "adapter"
    lines = RECIPE.strip().splitlines()[3:]
    kept = [line for line in lines if not line.startswith(("base_config", "train_base"))]
    own = ["task: jsonl", f"task_arguments: {{path: {rows}, validation_share: 0.5}}", f"base_model: {base}"]
    recipe.write_text("\n".join([*own, "eval_sets: {held out: {}}", *kept]), encoding="utf-8")
    options = ["--override", f"output_dir={adapter}", "--override", "stages=[{steps: 1}]"]
    trained = run("train", recipe, *options)
    assert trained.exit_code == 0, trained.stderr
    assert "secret" not in (adapter / "README.md").read_text(encoding="utf-8")
    evaluated = run("evaluate", adapter, "--recipe", recipe, "--split", "validation", "--json")
    assert evaluated.exit_code == 0, evaluated.stderr
    report = json.loads(evaluated.stdout)
    (record,) = report["results"]
    assert (record["metric"], record["num_answers"]) == ("squad", 3)
    assert "f1" in record
    written = run("write-dataset", rows, "--model", adapter, "--output", tmp_path / "memories", "--json")
    assert written.exit_code == 0, written.stderr
    assert json.loads(written.stdout)["num_rows"] == 6
