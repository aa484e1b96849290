"""What is known of a training run beside the configuration: how it went, and what was measured."""

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

RECIPE_FILE, RESULTS_FILE = "recipe.yaml", "results.json"
# What a card shows of an evaluation, where it was measured.
_METRICS = ("exact_match", "f1", "teacher_forced_exact_match", "token_accuracy", "answer_loss", "write_loss")


@dataclass
class Result:
    """Metrics of one evaluation set.

    Attributes:
        task: name of the task or data set.
        dataset: name of the evaluation set.
        metrics: by their names in `evaluate`.
        split: which part of the task.
        write_steps: steps of WRITE that they were measured with; the configuration's when `None`.
    """

    task: str
    dataset: str
    metrics: dict[str, float]
    split: str = "validation"
    write_steps: int | None = None


@dataclass
class CardFacts:
    """What a card says beside the configuration. A training callback fills it, or the files of a run do.

    Attributes:
        training: what the run was, for a list: steps, seed, hardware, ...
        recipe: the recipe it followed, as YAML.
        results: what was measured.
        example: a context (text, or segments) and a query of the training data, for the card's code.
        metadata: further fields of `ModelCardData`: `license`, `language`, `datasets`, ...
    """

    training: dict[str, Any] = field(default_factory=dict)
    recipe: str | None = None
    results: list[Result] = field(default_factory=list)
    example: tuple[str | list[str], str] | None = None
    metadata: dict[str, Any] = field(default_factory=dict)


def facts_of_directory(directory: str | os.PathLike) -> CardFacts:
    """What `recipe.yaml` and `results.json` of a training run or a published adapter say.

    Raises:
        ValueError: one of them cannot be read.
    """
    directory, facts = Path(directory), CardFacts()
    recipe, results = {}, {}
    try:
        if (directory / RECIPE_FILE).is_file():
            facts.recipe = (directory / RECIPE_FILE).read_text(encoding="utf-8").strip()
            recipe = yaml.safe_load(facts.recipe)
        if (directory / RESULTS_FILE).is_file():
            results = json.loads((directory / RESULTS_FILE).read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise ValueError(f"{directory} has an unreadable {RECIPE_FILE} or {RESULTS_FILE}: {error}") from error
    task = results.get("task", recipe.get("task"))
    steps = results.get("steps", sum(stage["steps"] for stage in recipe.get("stages", [])) or None)
    given = {"task": task, "outer steps": steps, "seed": results.get("seed", recipe.get("seed"))}
    facts.training = {name: value for name, value in given.items() if value is not None}
    facts.results = [
        Result(task or "unknown", record["set"], _shown(record), results["split"], record["write_steps"])
        for record in results.get("results", [])
        if record["context"] == "memory" and Path(record["model"]).name == directory.resolve().name
    ]
    facts.results += trainer_results(results.get("metrics", {}), list(recipe.get("eval_sets", {})), task)
    return facts


def trainer_results(metrics: Mapping[str, Any], set_names: Sequence[str], task: str | None) -> list[Result]:
    """The metrics of `Trainer.evaluate` by evaluation set; `set_names` is empty where there is one without a name."""
    results = []
    names: Sequence[str | None] = set_names or [None]
    for name in names:
        prefix = "eval_" if name is None else f"eval_{name}_"
        of_set = {key.removeprefix(prefix): value for key, value in metrics.items() if key.startswith(prefix)}
        if shown := _shown(of_set):
            results.append(Result(task or "unknown", name or "evaluation set", shown))
    return results


def _shown(metrics: Mapping[str, Any]) -> dict[str, float]:
    return {name: float(metrics[name]) for name in _METRICS if metrics.get(name) is not None}
