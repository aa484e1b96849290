"""Evaluation of adapters on the sets of a recipe, and the file that its records are kept in.

A results file is JSON: `task`, `split` and `results`, a list of flat records. A record is one of [`evaluate_rows`] and
says what it was measured on: `model`, `writer`, `num_memory_tokens` and `write_steps_trained` (the last three `None`
for a baseline), `set`, `arguments`, those of the task, and `split`; the words around its queries, `template`, and by
which `metric` its answers were compared. Files of several runs can be read together.
"""

import json
import os
from collections.abc import Iterator, Mapping, Sequence
from itertools import product
from pathlib import Path
from typing import Any

import yaml
from datasets import Dataset

from ..checkpoint.run_facts import arguments_of_set
from ..files import save_text
from ..modeling_gradmem import GradMemForCausalLM
from ..tasks import get_task, load_set
from ..template import template_in_use
from ..training.yaml_values import read_yaml
from .limits import limited_rows
from .measure import evaluate_rows

Record = dict[str, Any]


def evaluation_sets(
    eval_sets: Mapping[str, dict[str, Any]],
    task_arguments: Mapping[str, Any],
    names: Sequence[str] = (),
    sweeps: Sequence[str] = (),
) -> dict[str, dict[str, Any]]:
    """The task arguments of the sets to evaluate, by their names.

    Args:
        eval_sets: the recipe's evaluation sets: the task arguments of each, over `task_arguments`, or a task of its own
            with all of its arguments.
        task_arguments: those of the whole recipe.
        names: which of the evaluation sets; all by default.
        sweeps: `argument=value,value,...` each, the values in YAML: every set in each of these variants, named
            `n4 num_pairs=16`.

    Raises:
        ValueError: the recipe has no evaluation set, or none of a name; a sweep that cannot be read.
    """
    if not eval_sets:
        raise ValueError("The recipe names no eval_sets: there is nothing to evaluate.")
    for name in names:
        if name not in eval_sets:
            raise ValueError(f"There is no evaluation set {name!r}. The recipe's are {', '.join(eval_sets)}.")
    variants = list(product(*map(_parse_sweep, sweeps)))
    return {
        " ".join([name, *(f"{key}={json.dumps(value)}" for key, value in variant)]): {
            **arguments_of_set(task_arguments, eval_sets[name]),
            **dict(variant),
        }
        for name in names or eval_sets
        for variant in variants
    }


def read_files(values: Any) -> Iterator[Path]:
    """The files that the arguments of sets name by `path`, in a mixture's parts too."""
    if isinstance(values, Mapping):
        yield from map(Path, _texts_in(values.get("path")))
        values = list(values.values())
    for value in values if isinstance(values, list) else ():
        yield from read_files(value)


def _texts_in(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, Mapping | list):
        for each in value.values() if isinstance(value, Mapping) else value:
            yield from _texts_in(each)


def _parse_sweep(sweep: str) -> list[tuple[str, Any]]:
    key, _, text = sweep.partition("=")
    try:
        values = read_yaml(f"[{text}]")
    except yaml.YAMLError as error:
        raise ValueError(f"The sweep {sweep!r} is not argument=value,value,...: {error}") from error
    if not key or not values:
        raise ValueError(f"A sweep is argument=value,value,..., got {sweep!r}.")
    return [(key, value) for value in values]


def load_sets(task: str, sets: dict[str, dict[str, Any]], split: str) -> dict[str, Dataset]:
    """The rows of each set, of this split unless the set names its own.

    Raises:
        OSError, ValueError: as of [`~hf_gradmem.tasks.load_set`].
    """
    return {name: load_set(task, {"split": split} | given) for name, given in sets.items()}


def metrics_of_sets(
    task: str, sets: Mapping[str, Mapping[str, Any]], asked: str | None = None
) -> dict[str, str | None]:
    """Which metric of [`evaluate_rows`] each set is measured by: that of its own task, or of the recipe's.

    Args:
        task: of the recipe.
        sets: of [`evaluation_sets`].
        asked: a metric for all of them, or `"none"`: losses alone.

    Raises:
        ValueError: there is no such task.
    """
    if asked is not None:
        return dict.fromkeys(sets, None if asked == "none" else asked)
    return {name: get_task(given.get("task", task)).metric for name, given in sets.items()}


def evaluate_model(
    name: str,
    model: GradMemForCausalLM,
    rows: dict[str, Dataset],
    sets: dict[str, dict[str, Any]],
    write_steps: Sequence[int] = (),
    *,
    metrics: Mapping[str, str | None],
    split: str,
    limits: Mapping[str, int | None] | None = None,
    template: str | Mapping[str, str] | None = None,
    **options: Any,
) -> list[Record]:
    """Evaluate one model on several sets.

    Args:
        name: of the model, for the records.
        model: adapter and base.
        rows: of [`load_sets`].
        sets: of [`evaluation_sets`].
        write_steps: the model's own number by default.
        metrics: of [`metrics_of_sets`].
        split: which part of the task a set is that names none.
        limits: of [`~hf_gradmem.evaluation.limits.limited_rows`]; none by default.
        template: the words around queries and contexts; the adapter's by default.
        options: the others of [`evaluate_rows`].
    """
    config = model.config
    of_memory = {
        "writer": config.writer,
        "num_memory_tokens": config.num_memory_tokens,
        "write_steps_trained": model.writer.write_steps,
    }
    words = template_in_use(template, config.template, model.tokenizer)
    records = []
    for set_name, set_rows in rows.items():
        steps, metric = list(write_steps) or [model.writer.write_steps], metrics[set_name]
        limited = limited_rows(model, set_rows, limits or {}, words)
        for measured in evaluate_rows(model, limited, steps, metric, template=words, **options):
            known = of_memory if measured["context"] == "memory" else dict.fromkeys(of_memory)
            of_set = {"set": set_name, "arguments": sets[set_name], "split": sets[set_name].get("split", split)}
            records.append({"model": name} | of_set | {"metric": metric, "template": words} | known | measured)
    return records


def save_answers(records: Sequence[Record], path: str | os.PathLike) -> None:
    """Write the answers that records were kept with to a file of JSON lines, whole or not at all.

    A line has `model`, `set`, `context` and `write_steps` of its record, and `row`, `query`, `answer` and `references`.
    """
    lines = [
        json.dumps({name: record[name] for name in ("model", "set", "context", "write_steps")} | answer)
        for record in records
        for answer in record["answers"]
    ]
    save_text("".join(f"{line}\n" for line in lines), path)


def without_answers(report: dict[str, Any]) -> dict[str, Any]:
    """A report of results alone, as they are kept in a results file."""
    results = [{name: value for name, value in record.items() if name != "answers"} for record in report["results"]]
    return report | {"results": results}


def save_results(report: dict[str, Any], path: str | os.PathLike) -> None:
    """Write a results file, whole or not at all."""
    save_text(json.dumps(report, indent=2) + "\n", path)


def load_records(paths: Sequence[str | os.PathLike]) -> list[Record]:
    """The records of one or several results files.

    Raises:
        OSError: a file cannot be read.
        ValueError: it holds no results.
    """
    return [record for path in paths for record in _load(Path(path))]


def _load(path: Path) -> list[Record]:
    try:
        records = json.loads(path.read_text(encoding="utf-8")).get("results")
    except (ValueError, AttributeError) as error:
        raise ValueError(f"{path} is not a results file: {error}") from error
    if not isinstance(records, list) or not all(isinstance(record, dict) for record in records):
        raise ValueError(f"{path} is not a results file: it has no list of results, as hf-gradmem evaluate writes it.")
    if not records:
        raise ValueError(f"{path} holds no result.")
    return records
