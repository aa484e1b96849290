"""Results files, the curves drawn from them, the tokens that a memory holds, and the commands that make all three."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import ByT5Tokenizer, PreTrainedTokenizerFast
from typer.testing import CliRunner, Result

from hf_gradmem import DataCollatorForGradMem, GradMemForCausalLM
from hf_gradmem.commands.packaged import RETRIEVAL_ADAPTER
from hf_gradmem.evaluation.heat_map import heat_map, save_heat_map
from hf_gradmem.evaluation.limits import limited_rows
from hf_gradmem.evaluation.plots import plot_results, save_picture
from hf_gradmem.evaluation.results import evaluate_model, evaluation_sets, load_records, load_sets, save_results
from hf_gradmem.evaluation.tokens import TokenLosses, token_texts
from hf_gradmem.tasks import kv_retrieval, load_task
from hf_gradmem.training.recipe import RecipeArguments
from hf_gradmem_cli import app

RECIPE = """
task: kv_retrieval
task_arguments: {num_pairs: 4, key_length: 1, value_length: 1, end_mark: false, seed: 1}
eval_sets: {n4: {num_contexts: 4}, n8: {num_contexts: 2, num_pairs: 8}}
stages: [{steps: 1}]
base_config: {model_type: llama}
"""


def run(*arguments: object) -> Result:
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


@pytest.fixture
def recipe(tmp_path: Path) -> Path:
    (tmp_path / "recipe.yaml").write_text(RECIPE, encoding="utf-8")
    return tmp_path / "recipe.yaml"


def record(exact_match: float, **changes) -> dict:
    conditions = {"model": "a", "writer": "gradient", "num_memory_tokens": 8, "write_steps_trained": 2}
    conditions |= {"set": "n4", "arguments": {"num_pairs": 4, "seed": 0}, "context": "memory", "write_steps": 2}
    return conditions | {"exact_match": exact_match} | changes


def baseline(exact_match: float, context: str, **changes) -> dict:
    nothing = dict.fromkeys(("writer", "num_memory_tokens", "write_steps_trained", "write_steps"))
    return record(exact_match, context=context, **nothing | changes)


# ------------------------------------------------------------------------------------------------ evaluate


def test_evaluate_measures_sets_sweeps_and_baselines_and_plot_draws_them(recipe: Path, tmp_path: Path) -> None:
    report, picture = tmp_path / "new" / "results.json", tmp_path / "curve.png"
    arguments = ("--set", "n4", "--sweep", "num_pairs=2,4", "--steps", 1, "--steps", 2, "--baseline", "none")
    shown = run("evaluate", RETRIEVAL_ADAPTER, "--recipe", recipe, *arguments, "--output", report)
    assert shown.exit_code == 0, shown.stderr
    assert "n4 num_pairs=4" in shown.stdout
    assert [path.name for path in report.parent.iterdir()] == ["results.json"]
    records = load_records([report])
    assert [(entry["arguments"]["num_pairs"], entry["context"], entry["write_steps"]) for entry in records] == [
        (pairs, *condition) for pairs in (2, 4) for condition in (("memory", 1), ("memory", 2), ("none", None))
    ]
    assert all(entry["exact_match"] > 0.9 for entry in records if entry["write_steps"] == 2)
    assert records[0]["num_answers"] == 8
    assert {(entry["split"], entry["template"], entry["metric"]) for entry in records} == {
        ("test", "plain", "exact_match")
    }
    drawn = run("plot", report, "--x", "num_pairs", "--output", picture)
    assert drawn.exit_code == 0, drawn.stderr
    assert picture.read_bytes().startswith(b"\x89PNG")


def test_evaluate_keeps_each_answer_beside_what_would_be_right(recipe: Path, tmp_path: Path) -> None:
    answers, report = tmp_path / "answers.jsonl", tmp_path / "results.json"
    arguments = ("--set", "n4", "--steps", 2, "--baseline", "other", "--answers", answers, "--output", report)
    shown = run("evaluate", RETRIEVAL_ADAPTER, "--recipe", recipe, *arguments)
    assert shown.exit_code == 0, shown.stderr
    lines = [json.loads(line) for line in answers.read_text(encoding="utf-8").splitlines()]
    for measured in load_records([report]):
        assert "answers" not in measured
        read = [line for line in lines if line["context"] == measured["context"]]
        assert len(read) == measured["num_answers"]
        assert {line["row"] for line in read} == set(range(measured["num_contexts"]))
        right = [line["answer"].strip() in [each.strip() for each in line["references"]] for line in read]
        assert sum(right) / len(right) == pytest.approx(measured["exact_match"])
        assert all(line["query"] and line["set"] == "n4" and line["write_steps"] == 2 for line in read)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--set", "n16"], "no evaluation set 'n16'"),
        (["--sweep", "num_pairs"], "argument=value"),
        (["--sweep", "num_pair=2"], "num_pair"),
        (["--sweep", "num_pairs=0"], "num_pairs"),
        (["--override", "eval_sets={}"], "no eval_sets"),
        (["--override", "task=poetry"], "poetry"),
        (["--baseline", "rag"], "'rag'"),
        (["--split", "dev"], "'dev'"),
        (["--output", "."], "is a directory"),
        (["--output", "new/x.json", "--answers", "new/../new/x.json"], "another file of this command"),
        (["--metric", "bleu"], "bleu"),
        (["--steps", "-1"], "equal to 0"),
    ],
)
def test_what_cannot_be_evaluated_is_said_before_a_model_is_loaded(recipe, arguments, message, monkeypatch) -> None:
    monkeypatch.setattr("hf_gradmem.commands.opening.load_model", lambda *_, **__: pytest.fail("a model was loaded"))
    result = run("evaluate", RETRIEVAL_ADAPTER, "--recipe", recipe, *arguments)
    assert result.exit_code == 2
    assert message in result.stderr


def test_evaluate_does_not_write_over_its_recipe(recipe: Path) -> None:
    result = run("evaluate", RETRIEVAL_ADAPTER, "--recipe", recipe, "--output", recipe)
    assert result.exit_code == 2
    assert "recipe.yaml is another file of this command" in result.stderr
    assert recipe.read_text(encoding="utf-8") == RECIPE


def test_sweeps_multiply() -> None:
    arguments = RecipeArguments(
        task="kv_retrieval",
        task_arguments={"seed": 1},
        eval_sets={"a": {}, "b": {"seed": 2}},
        stages=[{"steps": 1}],
        base_config={"model_type": "llama"},
    )
    given = arguments.eval_sets, arguments.task_arguments
    sets = evaluation_sets(*given, ["b"], ["num_pairs=2,[2, 8]", "key_length=1"])
    assert sets == {
        "b num_pairs=2 key_length=1": {"seed": 2, "num_pairs": 2, "key_length": 1},
        "b num_pairs=[2, 8] key_length=1": {"seed": 2, "num_pairs": [2, 8], "key_length": 1},
    }
    of_numbers = evaluation_sets(*given, ["a"], ["not_told=1e-1,.5"])  # as a recipe reads them
    assert [of_set["not_told"] for of_set in of_numbers.values()] == [0.1, 0.5]
    assert evaluation_sets(*given) == {"a": {"seed": 1}, "b": {"seed": 2}}


def test_a_set_with_a_task_of_its_own_has_the_rows_of_that_task() -> None:
    own = {"task": "facts", "num_contexts": 3}
    sets = evaluation_sets({"a": {"num_contexts": 2}, "b": own}, {"num_pairs": 4}, sweeps=["seed=5"])
    assert sets["b seed=5"] == own | {"seed": 5}
    rows = load_sets("kv_retrieval", sets, "test")
    assert list(rows["b seed=5"]) == list(load_task("facts", "test", num_contexts=3, seed=5))
    assert list(rows["a seed=5"]) == list(load_task("kv_retrieval", "test", num_pairs=4, num_contexts=2, seed=5))


def test_a_set_with_a_task_of_its_own_is_measured_by_the_metric_of_that_task(recipe: Path, tmp_path: Path) -> None:
    rows, book = tmp_path / "rows.jsonl", tmp_path / "book.txt"
    rows.write_text('{"context": "!a:7!", "question": "?!a:", "answer": "7"}', encoding="utf-8")
    book.write_text("One day it rained. Two days it did not. Then came three. " * 6, encoding="utf-8")
    sets = f"{{own: {{task: jsonl, path: {rows}}}, book: {{task: text, path: {book}, num_contexts: 1}}, n4: {{}}}}"
    options = ["--recipe", recipe, "--override", f"eval_sets={sets}", "--override", "task_arguments.num_contexts=2"]
    for asked, expected in (
        ([], {"own": "squad", "book": None, "n4": "exact_match"}),
        (["--set", "own", "--set", "n4", "--metric", "squad"], {"own": "squad", "n4": "squad"}),
    ):
        shown = run("evaluate", RETRIEVAL_ADAPTER, *options, *asked, "--json")
        assert shown.exit_code == 0, shown.stderr
        records = json.loads(shown.stdout)["results"]
        assert {record["set"]: record["metric"] for record in records} == expected
        for record in records:
            measured = {name for name in ("exact_match", "f1") if name in record}
            assert (
                measured
                == {None: set(), "exact_match": {"exact_match"}, "squad": {"exact_match", "f1"}}[record["metric"]]
            )


def test_a_mixture_with_running_text_is_measured_by_losses_or_in_sets_of_their_own(
    recipe: Path, tmp_path: Path
) -> None:
    (tmp_path / "book.txt").write_text("One day it rained. Two days it did not. " * 6, encoding="utf-8")
    pairs = "{task: kv_retrieval, num_pairs: 4, num_contexts: 1}"
    parts = f"[{{task: text, path: {tmp_path / 'book.txt'}, num_contexts: 1}}, {pairs}]"
    options = ["--recipe", recipe, "--override", f"eval_sets={{both: {{task: mixture, parts: {parts}}}}}"]
    refused = run("evaluate", RETRIEVAL_ADAPTER, *options)
    assert refused.exit_code == 2
    assert (
        "A query of row 0 is empty: there is nothing to answer. Measure losses alone (--metric none" in refused.stderr
    )
    measured = run("evaluate", RETRIEVAL_ADAPTER, *options, "--metric", "none", "--json")
    assert measured.exit_code == 0, measured.stderr
    assert json.loads(measured.stdout)["results"][0]["num_contexts"] == 2


def test_a_set_keeps_a_split_of_its_own() -> None:
    """As in training: `--split` is of the sets that name none."""
    sets = evaluation_sets({"seen": {"split": "train"}, "held_out": {}}, {"num_contexts": 2, "num_pairs": 4})
    rows = load_sets("kv_retrieval", sets, "test")
    for name, split in (("seen", "train"), ("held_out", "test")):
        assert list(rows[name]) == list(load_task("kv_retrieval", split, num_contexts=2, num_pairs=4))


def test_evaluate_and_calibrate_measure_the_contexts_and_questions_that_training_sees(
    recipe: Path, tmp_path: Path
) -> None:
    limits = {"max_context_length": 10, "queries_per_context": 1}
    options = ["--recipe", recipe, "--set", "n4"]
    limited = [*options, *(part for name in limits for part in ("--override", f"{name}={limits[name]}"))]
    adapter = shutil.copytree(RETRIEVAL_ADAPTER, tmp_path / "adapter")
    shown = run("evaluate", adapter, *limited, "--baseline", "prompt", "--json")
    assert shown.exit_code == 0, shown.stderr
    for measured in json.loads(shown.stdout)["results"]:
        assert measured["num_answers"] == measured["num_contexts"] == 4
        assert measured.get("num_context_tokens") == {"memory": 40, "prompt": None}[measured["context"]]
    shown = run("calibrate", adapter, *limited, "--override", "max_context_length=5", "--json")
    assert shown.exit_code == 0, shown.stderr
    assert json.loads(shown.stdout)["sets"]["n4"]["num_answers"] == 8  # of its own memory and of another's
    too_long = run("evaluate", adapter, *options, "--override", "max_query_length=5")
    assert too_long.exit_code == 2
    assert "A query of row 0 takes 7 tokens with its answer, and max_query_length is 5" in too_long.stderr


def test_what_limits_leave_of_rows_is_what_the_collator_leaves() -> None:
    model = GradMemForCausalLM.from_pretrained(RETRIEVAL_ADAPTER)
    rows = load_task("kv_retrieval", num_contexts=3, num_pairs=4, key_length=1, value_length=1)
    whole = [row | {"context": "".join(row["context"])} for row in rows]
    for given in (list(rows), whole):
        assert limited_rows(model, given, {}) == given
        for length in (1, 5, 7, 20):
            limits = {"max_context_length": length, "queries_per_context": 2, "max_query_length": 7}
            found = DataCollatorForGradMem(model.tokenizer)(limited_rows(model, given, limits))
            with pytest.warns(UserWarning, match="Cut in this batch of 3 contexts"):
                expected = DataCollatorForGradMem(model.tokenizer, **limits)(given)
            segments = expected.pop("context_segment_ids", None)
            if segments is not None and segments.any():
                assert torch.equal(found.pop("context_segment_ids"), segments)
            assert all(torch.equal(found[name], expected[name]) for name in expected)


def test_what_limits_leave_of_a_context_is_cut_into_the_segments_that_training_cuts_it_into() -> None:
    """Of the first of two segments ten tokens are left, which training wrote as one segment and evaluation as four."""
    model = GradMemForCausalLM.from_pretrained(RETRIEVAL_ADAPTER, write_segment_length=3)
    row = {"context": ["!a:1!!b:2!!c:3!", "!d:4!|"], "queries": ["?!a:"], "targets": ["1!|"]}
    with pytest.warns(UserWarning, match="1 contexts"):
        trained = DataCollatorForGradMem(model.tokenizer, max_context_length=10, **model.writer.cutting)([row])
    measured = DataCollatorForGradMem(model.tokenizer, **model.writer.cutting)(
        limited_rows(model, [row], {"max_context_length": 10})
    )
    for batch in (trained, measured):
        parts = {name: batch.get(f"context_{name}") for name in ("input_ids", "attention_mask", "segment_ids")}
        assert model.write(**parts).segment_lengths.tolist() == [[3, 3, 3, 1]]


def test_a_record_names_the_template_that_was_measured_under_and_limits_count_its_words() -> None:
    model = GradMemForCausalLM.from_pretrained(RETRIEVAL_ADAPTER)
    rows = {"a": load_task("kv_retrieval", num_contexts=2, num_pairs=2, key_length=1, value_length=1)}
    recited = {"context": "{context}", "query": "{context}{query}"}
    options = {"sets": {"a": {}}, "metrics": {"a": None}, "split": "train", "template": recited}
    limits = {"max_context_length": 5, "max_query_length": 12}
    (measured,) = evaluate_model("it", model, rows, limits=limits, **options)
    assert measured["template"] == recited
    with pytest.raises(
        ValueError, match="A query of row 0 takes 12 tokens with its answer, and max_query_length is 11"
    ):
        evaluate_model("it", model, rows, limits=limits | {"max_query_length": 11}, **options)


def test_a_context_is_cut_also_where_the_tokenizer_does_not_tell_where_its_tokens_lie() -> None:
    model = GradMemForCausalLM.from_pretrained(RETRIEVAL_ADAPTER)
    model.tokenizer = ByT5Tokenizer(extra_ids=0)  # a token for each byte
    row = {"context": ["Zoë sits", " in Trieste."], "queries": ["Where?"], "targets": ["in Trieste"]}
    for limit, left in ((3, ["Zo"]), (4, ["Zoë"]), (11, ["Zoë sits", " i"]), (21, row["context"])):
        assert limited_rows(model, [row], {"max_context_length": limit}) == [row | {"context": left}]


def test_a_letter_of_several_tokens_is_cut_off_whole() -> None:
    model = GradMemForCausalLM.from_pretrained(RETRIEVAL_ADAPTER)
    letters = {letter: number for number, letter in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    of_bytes = Tokenizer(models.BPE(letters, []))
    of_bytes.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    model.tokenizer = PreTrainedTokenizerFast(tokenizer_object=of_bytes)
    for text, limit, left in (("日本語", 4, "日"), ("ab😀cd", 3, "ab"), ("ab😀cd", 7, "ab😀c")):
        row = {"context": text, "queries": ["?"], "targets": ["!"]}
        assert limited_rows(model, [row], {"max_context_length": limit})[0]["context"] == left


# ------------------------------------------------------------------------------------------------ pictures


def drawn_lines(figure) -> dict[str, tuple[list, list]]:
    lines = figure.axes[0].get_lines()
    return {line.get_label(): (list(line.get_xdata()), list(line.get_ydata())) for line in lines}


def test_curves_over_steps_have_a_line_for_each_number_of_pairs_and_level_baselines() -> None:
    eight = {"arguments": {"num_pairs": 8, "seed": 0}, "set": "n8"}
    records = [record(0.9, write_steps=4), record(0.5), record(0.3, **eight), record(0.6, write_steps=4, **eight)]
    records.append(baseline(0.1, "none"))
    lines = drawn_lines(plot_results(records))
    assert lines == {
        "N=4": ([2, 4], [0.5, 0.9]),
        "N=8": ([2, 4], [0.3, 0.6]),
        "N=4, no context": ([0, 1], [0.1, 0.1]),
    }


def test_how_much_was_measured_is_said_only_where_nothing_else_tells_lines_apart() -> None:
    few, many = ({"num_contexts": count, "queries_per_context": 4} for count in (16, 64))
    told = [record(0.5, arguments=few | {"num_pairs": 4}), record(0.3, arguments=many | {"num_pairs": 8})]
    assert set(drawn_lines(plot_results(told))) == {"N=4", "N=8"}
    alone = [record(0.5, arguments=few | {"num_pairs": 4}), record(0.3, arguments=many | {"num_pairs": 4})]
    assert set(drawn_lines(plot_results(alone))) == {"num contexts=16", "num contexts=64"}


def test_how_much_was_measured_parts_a_curve_only_where_it_differs_at_one_place() -> None:
    few, many = {"num_contexts": 16, "seed": 0}, {"num_contexts": 64, "seed": 1}
    told = [record(0.5, arguments=many | {"num_pairs": 4}), record(0.3, arguments=few | {"num_pairs": 8})]
    assert drawn_lines(plot_results(told, x="num_pairs")) == {"_child0": ([4, 8], [0.5, 0.3])}
    told.append(record(0.4, arguments=few | {"num_pairs": 4}))
    assert set(drawn_lines(plot_results(told, x="num_pairs"))) == {
        "num contexts=16, seed=0",
        "num contexts=64, seed=1",
    }


@pytest.mark.parametrize("how", ["split", "template", "metric"])
def test_what_was_measured_in_another_way_is_another_line(how: str) -> None:
    told = [record(0.5, **{how: "one"}), record(0.3, **{how: "two"})]
    assert drawn_lines(plot_results(told)) == {f"{how}=one": ([2], [0.5]), f"{how}=two": ([2], [0.3])}
    of_before = [record(0.5, **{how: "one"}), record(0.3, write_steps=4)]  # which does not say
    assert drawn_lines(plot_results(of_before)) == {"_child0": ([2, 4], [0.5, 0.3])}


def test_curves_over_pairs_have_a_line_for_each_number_of_steps_and_for_a_baseline() -> None:
    records = [
        entry
        for pairs in (8, 4)
        for changes in [{"arguments": {"num_pairs": pairs, "seed": 0}}]
        for entry in (
            record(1 / pairs, **changes),
            record(2 / pairs, write_steps=4, **changes),
            baseline(0.0, "prompt", **changes),
        )
    ]
    assert drawn_lines(plot_results(records, x="num_pairs")) == {
        "K=2": ([4, 8], [0.25, 0.125]),
        "K=4": ([4, 8], [0.5, 0.25]),
        "context in the prompt": ([4, 8], [0.0, 0.0]),
    }


def test_adapters_of_one_size_are_a_mean_in_their_band() -> None:
    records = [record(0.5, model="a"), record(0.7, model="b"), record(0.9, model="c", num_memory_tokens=16)]
    records.append(record(0.1, model="d", writer="forward"))
    figure = plot_results(records, x="num_memory_tokens")
    lines = drawn_lines(figure)
    assert lines["writer=gradient"] == ([8, 16], [pytest.approx(0.6), 0.9])
    assert lines["writer=forward"] == ([8], [0.1])
    (band,) = figure.axes[0].collections
    assert sorted({y for x, y in band.get_paths()[0].vertices if x == 8}) == [0.5, 0.7]


@pytest.mark.parametrize(
    ("x", "y", "message"),
    [
        ("num_pair", "exact_match", "'num_pair'.*num_pairs"),
        ("write_steps", "f1", "Measured were.*exact_match"),
    ],
)
def test_nothing_to_draw_says_what_there_is(x: str, y: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        plot_results([record(0.5)], x, y)


def test_a_picture_of_no_known_format_leaves_no_file(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"no ending of a picture.*png"):
        save_picture(plot_results([record(0.5)]), tmp_path / "curve.txt")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("text", ["{", "[]", '{"sets": {}}', '{"results": []}', '{"results": [1]}'])
def test_another_file_is_no_results_file(text: str, tmp_path: Path) -> None:
    (tmp_path / "results.json").write_text(text, encoding="utf-8")
    result = run("plot", tmp_path / "results.json", "--output", tmp_path / "curve.png")
    assert result.exit_code == 2
    assert "results.json" in result.stderr
    assert result.stderr.count("\n") == 1


def test_a_results_file_below_a_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(NotADirectoryError, match="is a file"):
        save_results({}, tmp_path / "file" / "results.json")


# ------------------------------------------------------------------------------------------------ tokens


def test_heat_map_is_deeper_where_the_loss_is_larger_and_dim_where_there_is_none(tmp_path: Path) -> None:
    losses = TokenLosses(
        tokens=["<a>", " b\n"],
        base=torch.tensor([torch.nan, 9.0]),
        start=torch.tensor([4.0, 8.0]),
        memory=torch.tensor([0.0, 0.5]),
    )
    (_, base), (start_title, start), (memory_title, memory) = heat_map(losses)
    assert base.plain == start.plain == memory.plain == "<a> b⏎\n"
    assert [str(span.style) for span in base.spans] == ["dim", "black on rgb(214,39,40)"]
    assert str(memory.spans[0].style) == "black on rgb(255,255,255)"
    assert "0 of 2 tokens more likely than not" in start_title
    assert "2 of 2 tokens" in memory_title
    save_heat_map([losses], tmp_path / "tokens.html")
    page = (tmp_path / "tokens.html").read_text(encoding="utf-8")
    assert '<span title="nothing before it">&lt;a&gt;</span>' in page
    assert '<span title="8.00 nats" style="background: rgb(214, 39, 40)"> b⏎' in page
    assert [path.name for path in tmp_path.iterdir()] == ["tokens.html"]


def test_token_texts_put_together_are_the_text() -> None:
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    of_bytes = Tokenizer(models.BPE(vocab={symbol: index for index, symbol in enumerate(alphabet)}, merges=[]))
    of_bytes.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    of_bytes.decoder = decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=of_bytes)
    text = "Über 7 €: ok, and some more ordinary words.\n\n“é”"
    texts = token_texts(tokenizer, tokenizer(text).input_ids)
    assert "".join(texts) == text
    assert texts[:2] == ["", "Ü"]
    letters = kv_retrieval.build_tokenizer()
    assert token_texts(letters, letters("!a:7!").input_ids) == list("!a:7!")


def test_inspect_shows_which_tokens_of_a_text_the_memory_holds(tmp_path: Path) -> None:
    (tmp_path / "context.txt").write_text("!a:7!\n", encoding="utf-8")
    memory, model = tmp_path / "memory", ("--model", RETRIEVAL_ADAPTER)
    context = ("--context-file", tmp_path / "context.txt")
    written = run("write", "--file", tmp_path / "context.txt", *model, "--output", memory)
    assert written.exit_code == 0, written.stderr
    shown = run("inspect", memory, *model, *context, "--html", tmp_path / "tokens.html")
    assert shown.exit_code == 0, shown.stderr
    assert "from the memory, after WRITE (5 of 5 tokens more likely than not)" in shown.stdout
    assert (tmp_path / "tokens.html").stat().st_size
    told = json.loads(run("inspect", memory, *model, *context, "--json").stdout)["token_losses"]
    assert told["tokens"] == list("!a:7!")
    assert told["base"][0] is None
    assert told["memory"][3] < 0.1 < told["start"][3]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--html", "tokens.html"], "--context-file"),
        (["--context-file", "context.txt"], "--model"),
    ],
)
def test_inspect_says_what_token_losses_need(tmp_path: Path, arguments: list[str], message: str) -> None:
    result = run("inspect", tmp_path, *arguments)
    assert result.exit_code == 2
    assert message in result.stderr
