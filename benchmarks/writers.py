"""The forward-only writer (RMT) beside GradMem: the same recipe, base, steps and number of readings.

    python -m benchmarks.writers                       # what is missing of both recipes
    python -m benchmarks.writers gradmem-kv-tiny       # of this one

Forward-only is trained at each of three learning rates, and the one with the best validation answers is shown.
GradMem's figures are those of its card (`model_cards/<name>/results.json`). Results go to
`benchmarks/results/writers/`, the table to `benchmarks/results/writers.md`. A run that was interrupted goes on from its
last checkpoint in `runs/`.
"""

import argparse
import json
from pathlib import Path

import torch

from hf_gradmem.evaluation import evaluate_rows
from hf_gradmem.loading import load_model
from hf_gradmem.tasks import load_task
from hf_gradmem.training.recipe import Recipe, load_recipe
from hf_gradmem.training.run import run_training

ROOT = Path(__file__).parent
CARDS = ROOT.parent / "model_cards"
RESULTS = ROOT / "results" / "writers"
TABLE = ROOT / "results" / "writers.md"
RECIPES = ("gradmem-kv-tiny", "gradmem-kv")
LEARNING_RATES = ("3e-4", "1e-3", "3e-3")


def forward_recipe(name: str, learning_rate: str) -> Recipe:
    """A card's recipe with the forward-only writer in place of the gradient's."""
    gradient = load_recipe(CARDS / name / "recipe.yaml").arguments.gradmem
    kept = {key: gradient[key] for key in ("num_memory_tokens", "write_steps", "checkpoint_write_steps")}
    overrides = [
        f"gradmem={json.dumps(kept | {'writer': 'forward'})}",
        f"learning_rate={learning_rate}",
        f"output_dir=runs/{name}-forward-{learning_rate}",
    ]
    return load_recipe(CARDS / name / "recipe.yaml", overrides)


def run(name: str, learning_rate: str) -> dict:
    """Train, and answer the validation and test sets."""
    recipe = forward_recipe(name, learning_rate)
    trained = run_training(recipe)
    model, arguments = load_model(recipe.training.output_dir), recipe.arguments
    result = {"recipe": name, "learning_rate": learning_rate, "steps": trained["steps"], "seed": trained["seed"]}
    for split in ("validation", "test"):
        result[split] = {
            set_name: evaluate_rows(
                model,
                load_task(arguments.task, **arguments.task_arguments | given | {"split": split}),
                [model.config.write_steps],
            )[model.config.write_steps]
            for set_name, given in arguments.eval_sets.items()
        }
    return result


def write_table() -> None:
    """Both writers, a row for each evaluation set."""
    lines = [
        "# Forward-only beside GradMem",
        "",
        "Exact match of generated answers on fresh contexts of each set's N, one run each. Forward-only (RMT) has the "
        "base, data, outer steps and readings (K) of GradMem's recipe, and the best of three learning rates "
        f"({', '.join(LEARNING_RATES)}) by its validation answers. Command: `python -m benchmarks.writers`.",
        "",
        "| recipe | set | GradMem | forward-only | behind by | its learning rate | others |",
        "|---|---|---|---|---|---|---|",
    ]
    for name in RECIPES:
        paths = [RESULTS / f"{name}-{rate}.json" for rate in LEARNING_RATES]
        runs = [json.loads(path.read_text(encoding="utf-8")) for path in paths if path.is_file()]
        card = CARDS / name / "results.json"
        if len(runs) < len(LEARNING_RATES) or not card.is_file():
            lines.append(f"| {name} | not run | | | | | |")
            continue
        gradmem = json.loads(card.read_text(encoding="utf-8"))
        for set_name, by_steps in gradmem["sets"].items():
            best = max(runs, key=lambda each: each["validation"][set_name]["exact_match"])
            own = by_steps[str(gradmem["write_steps_trained"])]["exact_match"]
            forward = best["test"][set_name]["exact_match"]
            others = ", ".join(f"{each['test'][set_name]['exact_match']:.3f}" for each in runs if each is not best)
            lines.append(
                f"| {name} | {set_name} | {own:.3f} | {forward:.3f} | {own - forward:.3f} | {best['learning_rate']} | "
                f"{others} |"
            )
    TABLE.write_text("\n".join(lines) + "\n", encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("recipes", nargs="*", help=", ".join(RECIPES))
    torch.set_num_threads(1)
    RESULTS.mkdir(parents=True, exist_ok=True)
    for name in parser.parse_args().recipes or RECIPES:
        for rate in LEARNING_RATES:
            path = RESULTS / f"{name}-{rate}.json"
            if not path.is_file():
                path.write_text(json.dumps(run(name, rate), indent=1) + "\n", encoding="utf-8")
            write_table()


if __name__ == "__main__":
    main()
