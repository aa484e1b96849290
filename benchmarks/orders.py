"""Contexts of both orders: does a memory answer forward and backward, and what do two further losses change?

    python -m benchmarks.orders                 # every arm that has no result yet
    python -m benchmarks.orders plain_seed_1    # this one

An arm trains `benchmarks/orders.yaml` with one thing changed, until exact match is .99 forward and backward on 128
contexts each, or the steps are used up; then it answers 128 others. Results go to
`benchmarks/results/orders/<arm>.json`, the table to `benchmarks/results/orders.md`. An arm that was interrupted starts
again; one that has a result is kept.
"""

import json
import tempfile
from pathlib import Path
from typing import Any

from hf_gradmem.training.recipe import load_recipe
from hf_gradmem.training.run import build_trainer

from .arms import StopWhenLearned, answer_sets, run_chosen, save_table

ROOT = Path(__file__).parent
RECIPE = ROOT / "orders.yaml"
RESULTS, TABLE = ROOT / "results" / "orders", ROOT / "results" / "orders.md"
ENOUGH = 0.99
SETS = ("forward", "backward")

LOSSES: dict[str, tuple[str, list[str]]] = {
    "plain": ("the answers alone", []),
    "alignment": ("`alignment_loss_weight` 0.1", ["gradmem.alignment_loss_weight=0.1"]),
    "intermediate": ("`intermediate_read_loss_weight` 0.1", ["gradmem.intermediate_read_loss_weight=0.1"]),
    "both": ("both", ["gradmem.alignment_loss_weight=0.1", "gradmem.intermediate_read_loss_weight=0.1"]),
}
CONTROL = ["task_arguments.shared_first_symbol=true"]

# What each arm changes: a description, and overrides of the recipe.
ARMS = {
    name + suffix: (f"{description}{words}", overrides + more)
    for suffix, words, more in (
        ("", "", []),
        ("_seed_1", ", seed 1", ["seed=1", "task_arguments.seed=2"]),
        ("_control", "; all values of a context begin with one symbol", CONTROL),
    )
    for name, (description, overrides) in LOSSES.items()
}
ARMS |= {
    f"plain_{steps}": (
        f"the answers alone, {steps:,} steps, of which the rates fall in the last {fall}",
        [f'stages=[{{"steps": {steps}}}]', f'lr_scheduler_kwargs={{"num_decay_steps": {fall}, "min_lr_ratio": 0.05}}'],
    )
    for steps, fall in ((600, 200), (1500, 400))
}


def run_arm(name: str) -> dict[str, Any]:
    """Train one arm and say how it went."""
    description, overrides = ARMS[name]
    with tempfile.TemporaryDirectory() as directory:
        recipe = load_recipe(RECIPE, [*overrides, f"output_dir={directory}"])
        trainer = build_trainer(recipe)
        watch = StopWhenLearned(ENOUGH, len(SETS))
        trainer.add_callback(watch)
        trainer.train()
        records = answer_sets(name, trainer.model, recipe.arguments, "test")
    generated = {record["set"]: record["exact_match"] for record in records}
    return {
        "arm": name,
        "change": description,
        "overrides": overrides,
        "curve": watch.curve,
        "generated": generated,
    }


def row_of(name: str) -> str:
    """A row of the table: the exact match at the end, and the outer steps and minutes to it."""
    path = RESULTS / f"{name}.json"
    if not path.is_file():
        return f"| {name} | {ARMS[name][0]} | not run | | | | | |"
    result = json.loads(path.read_text(encoding="utf-8"))
    last, generated = result["curve"][-1], result.get("generated", {})
    figures = [f"{values[each]:.3f}" if each in values else "" for values in (generated, last) for each in SETS]
    return f"| {name} | {ARMS[name][0]} | {' | '.join(figures)} | {last['step']} | {last['minutes']:.0f} |"


def write_table() -> None:
    """One row for each arm."""
    save_table(
        TABLE,
        "Contexts of both orders",
        "Eight pairs, each once, as `K:V` or `V:K`, and asked by what stands first; keys and values of two symbols out "
        "of 62; the paper's shape, m = 8, K = 2, 16 contexts in an outer step, Muon for the base's matrices. "
        "Exact match of generated answers on 128 contexts that no run looked at; beside it the teacher-forced one on "
        f"128 others: an arm ends where both orders are at {ENOUGH} there, or its steps are used up. "
        "One run for each row; the minutes are of one thread of a machine that did other work as well, for which "
        "alignment_seed_1 stood still most of its time. "
        "Command: `python -m benchmarks.orders`; recipe: `benchmarks/orders.yaml`.",
        "| arm | trained on | forward | backward | forward, forced | backward, forced | outer steps | minutes |",
        map(row_of, ARMS),
    )


if __name__ == "__main__":
    run_chosen(__doc__, ARMS, RESULTS, run_arm, write_table)
