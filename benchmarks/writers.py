"""The forward-only writer (RMT) beside GradMem: the same recipe, base, steps and number of readings.

    python -m benchmarks.writers                       # what is missing
    python -m benchmarks.writers gradmem-kv-tiny       # of this one

Forward-only is trained at each of three learning rates, and the one with the best validation answers is shown.
GradMem's figures are those of its card (`model_cards/<name>/results.json`). Of `gradmem-kv-96` forward-only has the
stages of up to 48 pairs and the sets of up to 32. Results go to `benchmarks/results/writers/`, the table to
`benchmarks/results/writers.md`. A run that was interrupted goes on from its last checkpoint in `runs/`.
"""

import itertools
import json
from pathlib import Path

import torch

from hf_gradmem.commands.opening import load_model
from hf_gradmem.evaluation.results import load_records
from hf_gradmem.training.recipe import Recipe, load_recipe
from hf_gradmem.training.run import run_training

from .arms import answer_sets, names_of, save_table

ROOT = Path(__file__).parent
CARDS = ROOT.parent / "model_cards"
RESULTS = ROOT / "results" / "writers"
TABLE = ROOT / "results" / "writers.md"
# Of each recipe the stages that forward-only has, the sets that it answers, and the readings of each.
RECIPES: dict[str, tuple[int, tuple[str, ...], tuple[int, ...]]] = {
    "gradmem-kv-tiny": (2, ("n4", "n8"), (2,)),
    "gradmem-kv-96": (3, ("n8", "n16", "n32"), (1, 2, 5)),
}
LEARNING_RATES = ("3e-4", "1e-3", "3e-3")


def forward_recipe(name: str, learning_rate: str) -> Recipe:
    """A card's recipe with the forward-only writer in place of the gradient's."""
    given, (num_stages, sets, _) = load_recipe(CARDS / name / "recipe.yaml").arguments, RECIPES[name]
    kept = {key: given.gradmem[key] for key in ("num_memory_tokens", "write_steps", "checkpoint_write_steps")}
    overrides = [
        f"gradmem={json.dumps(kept | {'writer': 'forward'})}",
        f"stages={json.dumps(given.stages[:num_stages])}",
        f"learning_rate={learning_rate}",
        "step_size_learning_rate=null",  # it takes no steps
        f"output_dir=runs/{name}-forward-{learning_rate}",
    ]
    recipe = load_recipe(CARDS / name / "recipe.yaml", overrides)
    recipe.arguments.eval_sets = {set_name: given.eval_sets[set_name] for set_name in sets}
    return recipe


def run(name: str, learning_rate: str) -> dict[str, list[dict]]:
    """Train, and answer the validation and test sets: the records of each split."""
    recipe, readings = forward_recipe(name, learning_rate), RECIPES[name][2]
    run_training(recipe)
    model, label = load_model(recipe.training.output_dir), f"{name}, forward-only, {learning_rate}"
    return {split: answer_sets(label, model, recipe.arguments, split, readings) for split in ("validation", "test")}


def exact_match(records: list[dict], set_name: str, readings: int) -> float:
    (found,) = (each for each in records if (each["set"], each["write_steps"]) == (set_name, readings))
    return found["exact_match"]


def table_rows(name: str) -> list[str]:
    """A row for each evaluation set of a recipe and number of readings."""
    paths = {rate: RESULTS / f"{name}-{rate}.json" for rate in LEARNING_RATES}
    card = CARDS / name / "results.json"
    if not all(path.is_file() for path in [card, *paths.values()]):
        return [f"| {name} | not run | | | | | | |"]
    runs = {rate: json.loads(path.read_text(encoding="utf-8")) for rate, path in paths.items()}
    gradmem = load_records([card])
    rows = []
    for of in itertools.product(*RECIPES[name][1:]):
        best = max(runs, key=lambda rate, of=of: exact_match(runs[rate]["validation"], *of))
        own, forward = exact_match(gradmem, *of), exact_match(runs[best]["test"], *of)
        others = ", ".join(f"{exact_match(runs[rate]['test'], *of):.3f}" for rate in runs if rate != best)
        found = f"{own:.3f} | {forward:.3f} | {own - forward:.3f} | {best} | {others}"
        rows.append(f"| {name} | {of[0]} | {of[1]} | {found} |")
    return rows


def write_table() -> None:
    """Both writers side by side."""
    save_table(
        TABLE,
        "Forward-only beside GradMem",
        "Exact match of generated answers on fresh contexts of each set's N, one run each. Forward-only (RMT) has the "
        "base, data, outer steps and readings (K) of GradMem's recipe, and the best of three learning rates "
        f"({', '.join(LEARNING_RATES)}) by its validation answers. Of gradmem-kv-96, of 2,100 outer steps in two "
        "parts, it has the 700 of up to 48 pairs, and its memory is vectors. Command: `python -m benchmarks.writers`.",
        "| recipe | set | K | GradMem | forward-only | behind by | its learning rate | the others |",
        (row for name in RECIPES for row in table_rows(name)),
    )


def main() -> None:
    chosen = names_of(__doc__, RECIPES) or list(RECIPES)
    torch.set_num_threads(1)
    RESULTS.mkdir(parents=True, exist_ok=True)
    for name in chosen:
        for rate in LEARNING_RATES:
            path = RESULTS / f"{name}-{rate}.json"
            if not path.is_file():
                path.write_text(json.dumps(run(name, rate), indent=1) + "\n", encoding="utf-8")
            write_table()


if __name__ == "__main__":
    main()
