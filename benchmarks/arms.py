"""Arms of a study: run one after the other, each result in a file of its own, and a table of all of them."""

import argparse
import json
import time
from collections.abc import Callable, Collection, Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    TrainerCallback,
)

from hf_gradmem import GradMemForCausalLM
from hf_gradmem.base.precision import fastest_dtype
from hf_gradmem.commands.packaged import find_demo_model
from hf_gradmem.evaluation.results import Record, evaluate_model, evaluation_sets, load_sets, metrics_of_sets
from hf_gradmem.training.recipe import RecipeArguments


def run_chosen(
    description: str,
    arms: Collection[str],
    results: Path,
    run_arm: Callable[[str], dict],
    write_table: Callable[[], None],
) -> None:
    """Run the arms that the command line names, or all that have no result yet.

    Args:
        description: of the command, for its help.
        arms: their names.
        results: directory of the results; an arm that was interrupted has none.
        run_arm: from a name to what is kept of the arm.
        write_table: called after each arm, and where no arm is missing.
    """
    given = names_of(description, arms)
    chosen = given or [name for name in arms if not (results / f"{name}.json").is_file()]
    torch.set_num_threads(1)
    results.mkdir(parents=True, exist_ok=True)
    if not chosen:
        write_table()
    for name in chosen:
        result = run_arm(name)
        (results / f"{name}.json").write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
        write_table()


def names_of(description: str, known: Collection[str]) -> list[str]:
    """The names on the command line, each of which is known; none where all are meant."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", help=", ".join(known))
    given = parser.parse_args().names
    if unknown := [name for name in given if name not in known]:
        parser.error(f"there is no {', '.join(unknown)}. There is {', '.join(known)}.")
    return given


def demo_base() -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """The base of the demo, in the precision that is faster here, and its tokenizer."""
    name = find_demo_model(Console(stderr=True))
    base = AutoModelForCausalLM.from_pretrained(name, dtype=fastest_dtype(AutoConfig.from_pretrained(name)))
    return base, AutoTokenizer.from_pretrained(name)


def answer_sets(
    label: str,
    model: GradMemForCausalLM,
    arguments: RecipeArguments,
    split: str,
    write_steps: Sequence[int] = (),
    **options: Any,
) -> list[Record]:
    """The records of a recipe's evaluation sets, from contexts of this split; `options` are of `evaluate_rows`."""
    sets = evaluation_sets(arguments.eval_sets, arguments.task_arguments)
    rows, metrics = load_sets(arguments.task, sets, split), metrics_of_sets(arguments.task, sets)
    return evaluate_model(label, model, rows, sets, write_steps, metrics=metrics, split=split, **options)


def save_table(path: Path, title: str, text: str, header: str, rows: Iterable[str]) -> None:
    """A page of a title, a paragraph and a table; `header` and `rows` are lines of Markdown."""
    rule = "|" + "---|" * (header.count("|") - 1)
    path.write_text("\n".join([f"# {title}", "", text, "", header, rule, *rows]) + "\n", encoding="utf-8")


class StopWhenLearned(TrainerCallback):
    """Keeps the curve of exact match, and ends the run where every evaluation set is at `enough`.

    Attributes:
        curve: of each evaluation the outer step, the minutes so far, and the exact match of each set by its name.
    """

    def __init__(self, enough: float, num_sets: int = 1) -> None:
        self.enough, self.num_sets = enough, num_sets
        self.curve: list[dict[str, float]] = []
        self.start = time.perf_counter()

    def on_evaluate(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        suffix = "_exact_match"
        point = {
            name.removeprefix("eval_").removesuffix(suffix): value
            for name, value in kwargs["metrics"].items()
            if name.endswith(suffix)
        }
        minutes = round((time.perf_counter() - self.start) / 60, 2)
        # Trainer measures the sets one after the other, and tells of each.
        if self.curve and self.curve[-1]["step"] == state.global_step:
            self.curve[-1] |= point | {"minutes": minutes}
        else:
            self.curve.append({"step": state.global_step, "minutes": minutes} | point)
        values = [value for name, value in self.curve[-1].items() if name not in ("step", "minutes")]
        if len(values) == self.num_sets and min(values) >= self.enough:
            control.should_training_stop = True
