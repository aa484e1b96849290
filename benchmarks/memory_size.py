"""How many memory vectors are needed: the first ones of gradmem-kv-32, trained on, at eight and sixteen pairs.

    python -m benchmarks.memory_size               # every size that has no result yet
    python -m benchmarks.memory_size four          # this one

`model_cards/gradmem-kv-32` keeps its first vectors and their step sizes, and goes on training by `memory_size.yaml`.
Results go to `benchmarks/results/memory_size/<arm>.json`, the table to `benchmarks/results/memory_size.md`. A run that
was interrupted goes on from its last checkpoint in `runs/`.
"""

import json
import shutil
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from hf_gradmem.commands.opening import load_model
from hf_gradmem.training.recipe import load_recipe
from hf_gradmem.training.run import run_training

from .arms import answer_sets, run_chosen, save_table

ROOT = Path(__file__).parent
RECIPE = ROOT / "memory_size.yaml"
RESULTS = ROOT / "results" / "memory_size"
TABLE = RESULTS.with_suffix(".md")
SOURCE = ROOT.parent / "model_cards" / "gradmem-kv-32"
# Vectors, and outer steps.
ARMS = {"four": (4, 600), "two": (2, 600), "one": (1, 600), "eight": (8, 600), "four_longer": (4, 1500)}
STEPS = (1, 2)
SETS = ("n8", "n16")


def with_positions(source: str | Path, directory: Path, count: int) -> None:
    """A copy of an adapter that has so many positions: its first ones, or, past its last, these once more."""
    shutil.copytree(source, directory, dirs_exist_ok=True)
    weights = load_file(directory / "model.safetensors")
    config = json.loads((directory / "config.json").read_text(encoding="utf-8"))
    taken = torch.arange(count) % config["num_memory_tokens"]
    for name, axis in (("memory_init", 0), ("memory_start", 0), ("write_log_learning_rate", 1)):
        if name in weights:
            weights[name] = weights[name].index_select(axis, taken)
    save_file(weights, directory / "model.safetensors", metadata={"format": "pt"})
    text = json.dumps(config | {"num_memory_tokens": count}, indent=2)
    (directory / "config.json").write_text(text + "\n", encoding="utf-8")


def run_arm(name: str) -> dict[str, Any]:
    """Train on from so many vectors, and answer contexts that no run looked at."""
    directory, (count, steps) = Path("runs") / "memory_size" / name, ARMS[name]
    with_positions(SOURCE, directory / "start", count)
    where = [f"adapter={directory / 'start'}", f"output_dir={directory / 'run'}"]
    recipe = load_recipe(RECIPE, [*where, f"stages.0.steps={steps}"])
    run_training(recipe)
    model = load_model(recipe.training.output_dir)
    return {"arm": name, "results": answer_sets(f"m = {count}", model, recipe.arguments, "test", STEPS)}


def row_of(name: str) -> str:
    path = RESULTS / f"{name}.json"
    if not path.is_file():
        return f"| {ARMS[name][0]} | not run | | | | |"
    records = json.loads(path.read_text(encoding="utf-8"))["results"]
    found = {(record["set"], record["write_steps"]): record["exact_match"] for record in records}
    cells = [f"{found[each, steps]:.3f}" for each in SETS for steps in STEPS]
    return f"| {' | '.join([str(ARMS[name][0]), f'{ARMS[name][1]:,}', *cells])} |"


def write_table() -> None:
    """One row for each size."""
    save_table(
        TABLE,
        "Memory vectors and what they hold",
        "The first m vectors of gradmem-kv-32, which has eight, trained on with Muon for the base's matrices; keys and "
        "values of two symbols out of 62. Exact match of generated answers on contexts that no run looked at. One run "
        "for each row. Command: `python -m benchmarks.memory_size`; recipe: `benchmarks/memory_size.yaml`.",
        "| m | outer steps | 8 pairs, K = 1 | 8 pairs, K = 2 | 16 pairs, K = 1 | 16 pairs, K = 2 |",
        map(row_of, sorted(ARMS, key=ARMS.__getitem__)),
    )


if __name__ == "__main__":
    run_chosen(__doc__, ARMS, RESULTS, run_arm, write_table)
