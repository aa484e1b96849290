"""Commands that train and measure: train, evaluate, calibrate, plot."""

import sys
from collections.abc import Iterable, Sequence
from contextlib import redirect_stdout
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from .app import command, manners, shows_progress
from .inputs import check_files
from .options import AsJson, BatchSize, Device, Overrides, Revision, Seed, Template, TrustRemoteCode, output_option
from .printing import print_json, print_reliability, print_results, report_done

if TYPE_CHECKING:
    from hf_gradmem import GradMemForCausalLM

Answers = Annotated[
    Path | None, output_option("Write each answer, with what would be right, to this file of JSON lines.", "--answers")
]
Baselines = Annotated[
    list[str] | None,
    typer.Option(
        help="prompt or none: the plain base, the context in its prompt or nowhere; other: another context's memory."
    ),
]
EvalSets = Annotated[
    list[str] | None, typer.Option("--set", help="Only this evaluation set of the recipe; may be repeated.")
]
Metric = Annotated[
    Literal["exact_match", "squad", "none"] | None,
    typer.Option(help="How answers are compared; none measures losses alone. That of each set's task when absent."),
]
Split = Annotated[
    str, typer.Option(help="Part of the task, where a set names none: validation, or test: all rows of a file.")
]
Sweeps = Annotated[
    list[str] | None,
    typer.Option(help="argument=value,value,...: measure each set at each of these values of a task argument."),
]


@command(
    "hf-gradmem train model_cards/gradmem-kv-tiny/recipe.yaml",
    "hf-gradmem train recipe.yaml --override seed=1 --override output_dir=runs/seed1",
)
def train(
    recipe: Annotated[Path, typer.Argument(help="A YAML file: task, base, memory, stages and training arguments.")],
    override: Overrides = None,
    trust_remote_code: TrustRemoteCode = False,
    as_json: AsJson = False,
) -> None:
    """Train an adapter as a recipe says.

    A run that was interrupted goes on from its last checkpoint when the command is given again. The seed, the device
    (use_cpu) and the directory (output_dir) are the recipe's.
    """
    from accelerate import PartialState

    from hf_gradmem.training.recipe import load_recipe
    from hf_gradmem.training.run import run_training

    loaded = load_recipe(recipe, override or ())
    with redirect_stdout(sys.stderr):  # Trainer prints its log there
        results = run_training(loaded, trust_remote_code=trust_remote_code, show_progress=not manners.quiet)
    state = PartialState()
    state.wait_for_everyone()
    state.destroy_process_group()  # its threads may abort an interpreter that ends before they do
    if not state.is_main_process:
        return
    if as_json:
        print_json(results)
    else:
        report_done(f"Trained: {loaded.training.output_dir} ({results['steps']} steps)")


@command(
    "hf-gradmem evaluate ./adapter --recipe recipe.yaml",
    "hf-gradmem evaluate ./adapter --recipe recipe.yaml --steps 1 --steps 2 --output results.json",
    "hf-gradmem evaluate ./m4 ./m8 --recipe recipe.yaml --set n4 --sweep num_pairs=4,8,16 --baseline prompt",
)
def evaluate(
    models: Annotated[list[str], typer.Argument(help="Directories or Hub repositories: adapters, or any decoder.")],
    recipe: Annotated[Path, typer.Option(help="The recipe whose evaluation sets are answered.")],
    steps: Annotated[
        list[int] | None, typer.Option(min=0, help="Steps of WRITE to measure at; the model's own when absent.")
    ] = None,
    baseline: Baselines = None,
    eval_set: EvalSets = None,
    sweep: Sweeps = None,
    split: Split = "test",
    metric: Metric = None,
    template: Template = None,
    override: Overrides = None,
    batch_size: BatchSize = 64,
    output: Annotated[Path | None, output_option("Write the results to this JSON file.")] = None,
    answers: Answers = None,
    revision: Revision = None,
    seed: Seed = 0,
    device: Device = "auto",
    trust_remote_code: TrustRemoteCode = False,
    as_json: AsJson = False,
) -> None:
    """Answer a recipe's evaluation sets from memory, and compare with their reference answers.

    Answers are generated; the share right token by token behind the right ones is given beside it. Running text is not
    answered: its loss is that of the continuation. What the memories hold is given in bits.
    A base without an adapter is given the untrained memory that the recipe's gradmem options describe.
    """
    from hf_gradmem.commands.opening import checkpoint_files, load_model
    from hf_gradmem.evaluation import results
    from hf_gradmem.evaluation.limits import limits_of
    from hf_gradmem.training.recipe import load_recipe

    _check_evaluation(models, revision, baseline or (), template, override or (), trust_remote_code)
    arguments = load_recipe(recipe, override or ()).arguments
    sets = results.evaluation_sets(arguments.eval_sets, arguments.task_arguments, eval_set or (), sweep or ())
    check_files(output, answers, beside=[recipe, *checkpoint_files(models), *results.read_files(sets)])
    rows = results.load_sets(arguments.task, sets, split)
    report: dict[str, Any] = {"task": arguments.task, "split": split, "results": []}
    how: dict[str, Any] = {"revision": revision, "seed": seed, "device": device, "trust_remote_code": trust_remote_code}
    options: dict[str, Any] = {
        "split": split,
        "metrics": _metrics(results.metrics_of_sets(arguments.task, sets, metric), answers),
        "limits": limits_of(arguments),
        "baselines": baseline or (),
        "batch_size": batch_size,
        "keep_answers": answers is not None,
        "show_progress": shows_progress(as_json),
    }
    for model in dict.fromkeys(models):
        loaded = _with_template(load_model(model, arguments.gradmem, dtype=arguments.base_dtype, **how), template)
        report["results"] += results.evaluate_model(model, loaded, rows, sets, steps or (), **options)
        if answers is not None:
            results.save_answers(report["results"], answers)
        if output is not None:
            results.save_results(results.without_answers(report), output)
    if as_json:
        print_json(results.without_answers(report))
    else:
        print_results(report["results"])


def _with_template(model: "GradMemForCausalLM", template: str | None) -> "GradMemForCausalLM":
    """The model with other words around queries, which also say what stands before the memory."""
    if template is not None:
        model.config.template = template
    return model


def _metrics(of_sets: dict[str, Any], answers: Path | None) -> dict[str, Any]:
    """The metrics themselves, if answers are generated for one of them wherever they are to be kept."""
    if answers is not None and not any(of_sets.values()):
        raise ValueError("--answers has nothing to write: no set has a metric, and so no answer is generated.")
    return of_sets


def _check_evaluation(
    models: list[str],
    revision: str | None,
    baselines: Sequence[str],
    template: str | None,
    override: Sequence[str],
    trusted: bool,
) -> None:
    """Refuse what would otherwise fail after minutes, or do nothing."""
    from hf_gradmem.commands.opening import is_adapter
    from hf_gradmem.evaluation.readers import check_baselines
    from hf_gradmem.template import check_template

    if revision is not None and len(models) > 1:
        raise ValueError("--revision is of one model. Evaluate models of different revisions one at a time.")
    check_baselines(baselines)
    if template is not None:
        check_template(template)
    adapters = (model for model in models if is_adapter(model, revision=revision, trust_remote_code=trusted))
    _check_memory_options(adapters, override)


def _check_memory_options(adapters: Iterable[str], override: Sequence[str]) -> None:
    """Refuse options of the memory for an adapter; which of the models are adapters is asked only if there are some."""
    of_memory = [change for change in override if change.partition("=")[0].partition(".")[0] == "gradmem"]
    if of_memory and (adapter := next(iter(adapters), None)) is not None:
        raise ValueError(
            f"--override {of_memory[0]} would do nothing: the adapter {adapter} has its own options. --steps and "
            "--template are given to the command; other options to an adapter that is trained with them."
        )


@command(
    "hf-gradmem calibrate ./adapter --recipe recipe.yaml",
    "hf-gradmem calibrate ./adapter --recipe recipe.yaml --contexts 200 --report calibration.json",
    "hf-gradmem calibrate ./adapter --recipe recipe.yaml --split test --check",
)
def calibrate(
    model: Annotated[str, typer.Argument(help="Directory of the adapter, whose config.json gets the coefficients.")],
    recipe: Annotated[Path, typer.Option(help="The recipe whose evaluation sets are asked.")],
    eval_set: EvalSets = None,
    split: Split = "validation",
    check: Annotated[
        bool, typer.Option("--check", help="Measure the confidence that the adapter has, and write nothing into it.")
    ] = False,
    contexts: Annotated[int | None, typer.Option(min=2, help="At most so many contexts of each set.")] = None,
    metric: Metric = None,
    override: Overrides = None,
    batch_size: BatchSize = 64,
    report: Annotated[Path | None, output_option("Also write the results to this JSON file.", "--report")] = None,
    device: Device = "auto",
    trust_remote_code: TrustRemoteCode = False,
    as_json: AsJson = False,
) -> None:
    """Fit how sure an adapter is of its answers, on questions that it was not trained on.

    Each question is asked of its own context's memory and of another's. What tells right answers from wrong ones goes
    into the adapter's config.json: answers then come with a confidence. What is printed is measured on contexts that
    the coefficients were not fitted on.
    """
    from hf_gradmem.commands import calibrate as calibration
    from hf_gradmem.commands.opening import checkpoint_files, load_model
    from hf_gradmem.evaluation import results
    from hf_gradmem.evaluation.limits import limits_of
    from hf_gradmem.training.recipe import load_recipe

    directory = calibration.check_adapter_directory(model)
    _check_memory_options([model], override or ())
    check_files(None if check else directory / "config.json")
    check_files(report, beside=[recipe, *checkpoint_files([str(directory)])])
    arguments = load_recipe(recipe, override or ()).arguments
    sets = results.evaluation_sets(arguments.eval_sets, arguments.task_arguments, eval_set or ())
    rows = results.load_sets(arguments.task, sets, split)
    if contexts is not None:
        rows = {name: calibration.first_contexts(part, contexts) for name, part in rows.items()}
    result = calibration.run_calibration(
        load_model(model, device=device, dtype=arguments.base_dtype, trust_remote_code=trust_remote_code),
        rows,
        results.metrics_of_sets(arguments.task, sets, metric),
        f"{arguments.task} {split}: {calibration.count_contexts(rows)}",
        fit=not check,
        limits=limits_of(arguments),
        batch_size=batch_size,
        show_progress=shows_progress(as_json),
    )
    whole = {"model": model, "task": arguments.task, "split": split, **result}
    if not check:
        calibration.save_confidence(directory, result["confidence"])
    if report is not None:
        results.save_results(whole, report)
    if as_json:
        print_json(whole)
    else:
        print_reliability(whole["sets"])


@command(
    "hf-gradmem plot results.json --output curve.png",
    "hf-gradmem plot results.json --x num_pairs --output capacity.svg",
    "hf-gradmem plot m2.json m4.json m8.json --x num_memory_tokens --y f1 --output size.png",
)
def plot(
    results: Annotated[list[Path], typer.Argument(help="Results files of evaluate, drawn together.")],
    output: Annotated[Path, output_option("The picture to write: .png, .svg, .pdf, ...")],
    x: Annotated[
        str, typer.Option(help="write_steps, num_memory_tokens, or an argument of the task, as num_pairs.")
    ] = "write_steps",
    y: Annotated[str, typer.Option(help="Which measure: exact_match, f1, answer_loss, ...")] = "exact_match",
    as_json: AsJson = False,
) -> None:
    """Draw a measure over the number of WRITE steps, the size of the memory, or an argument of the task."""
    from hf_gradmem.evaluation.plots import plot_results, save_picture
    from hf_gradmem.evaluation.results import load_records

    check_files(output)
    records = load_records(results)
    save_picture(plot_results(records, x, y), output)
    if as_json:
        print_json({"picture": str(output), "x": x, "y": y, "num_results": len(records)})
    else:
        report_done(f"Drawn: {output}")
