"""How many memory positions are needed: the first ones of an adapter, trained on, at eight and sixteen pairs.

    python -m benchmarks.memory_size               # every size that has no result yet
    python -m benchmarks.memory_size four          # this one

`model_cards/gradmem-kv-32` keeps its first vectors and their step sizes, `model_cards/gradmem-kv-96` its first
positions of keys and values, and goes on training by `memory_size.yaml`. Results go to
`benchmarks/results/memory_size/<arm>.json`, the table to `benchmarks/results/memory_size.md`. A run that was
interrupted goes on from its last checkpoint in `runs/`.
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
CARDS = ROOT.parent / "model_cards"
VECTORS, KEYS_AND_VALUES = "gradmem-kv-32", "gradmem-kv-96"
FORMS = {VECTORS: "vectors", KEYS_AND_VALUES: "keys and values"}
# The adapter that it goes on from, its positions, and outer steps.
ARMS = {
    "four": (VECTORS, 4, 600),
    "two": (VECTORS, 2, 600),
    "one": (VECTORS, 1, 600),
    "eight": (VECTORS, 8, 600),
    "four_longer": (VECTORS, 4, 1500),
    "four_cached": (KEYS_AND_VALUES, 4, 300),
    "four_cached_longer": (KEYS_AND_VALUES, 4, 900),
    "two_cached": (KEYS_AND_VALUES, 2, 300),
    "one_cached": (KEYS_AND_VALUES, 1, 300),
}
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
    """Train on from so many positions, and answer contexts that no run looked at."""
    directory, (source, count, steps) = Path("runs") / "memory_size" / name, ARMS[name]
    with_positions(CARDS / source, directory / "start", count)
    overrides = [f"adapter={directory / 'start'}", f"output_dir={directory / 'run'}", f"stages.0.steps={steps}"]
    if source == KEYS_AND_VALUES:  # which was trained by AdamW alone
        falling = f"lr_scheduler_kwargs={{num_decay_steps: {steps * 2 // 3}, min_lr_ratio: 0.05}}"
        overrides += ["muon_learning_rate=null", falling]
    recipe = load_recipe(RECIPE, overrides)
    run_training(recipe)
    model = load_model(recipe.training.output_dir)
    return {"arm": name, "results": answer_sets(f"m = {count}", model, recipe.arguments, "test", STEPS)}


def row_of(name: str) -> str:
    path, (source, count, steps) = RESULTS / f"{name}.json", ARMS[name]
    row = f"| {FORMS[source]} | {count} |"
    if not path.is_file():
        return f"{row} not run | | | | |"
    records = json.loads(path.read_text(encoding="utf-8"))["results"]
    found = {(record["set"], record["write_steps"]): record["exact_match"] for record in records}
    cells = [f"{found[each, write_steps]:.3f}" for each in SETS for write_steps in STEPS]
    return f"{row} {' | '.join([f'{steps:,}', *cells])} |"


def write_table() -> None:
    """One row for each size."""
    save_table(
        TABLE,
        "Memory positions and what they hold",
        "The first m vectors of gradmem-kv-32, which has eight, trained on with Muon for the base's matrices, and the "
        "first m positions of keys and values of gradmem-kv-96, of 1,024 numbers each in place of 128, with AdamW; "
        "pairs of two symbols out of 62. Exact match of generated answers on contexts that no run looked at. One run "
        "for each row. Command: `python -m benchmarks.memory_size`; recipe: `benchmarks/memory_size.yaml`.",
        "| memory | m | outer steps | 8 pairs, K = 1 | 8 pairs, K = 2 | 16 pairs, K = 1 | 16 pairs, K = 2 |",
        map(row_of, sorted(ARMS, key=ARMS.__getitem__)),
    )


if __name__ == "__main__":
    run_chosen(__doc__, ARMS, RESULTS, run_arm, write_table)
