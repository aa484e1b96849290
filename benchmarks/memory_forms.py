"""Keys and values as the memory beside input vectors, at equal length and at equal size (the paper's figure 11).

    python -m benchmarks.memory_forms                  # every arm that has no result yet
    python -m benchmarks.memory_forms vectors_8        # this one

An arm trains the recipe of `gradmem-kv` (4 layers, 128 wide, two WRITE steps) for as many outer steps as the others do,
at 8 pairs and then at 4 to 16, and answers fresh contexts of 8 and of 16 pairs. One position of keys and values in four
layers holds as many numbers as eight input vectors, one of values alone as many as four. Results go to
`benchmarks/results/memory_forms/<arm>.json`, the table to `benchmarks/results/memory_forms.md`.
"""

import json
import tempfile
from pathlib import Path

from transformers import TrainerCallback

from hf_gradmem.training.recipe import load_recipe
from hf_gradmem.training.run import build_trainer

from .arms import run_chosen, save_table

ROOT = Path(__file__).parent
RECIPE = ROOT.parent / "model_cards" / "gradmem-kv" / "recipe.yaml"
RESULTS = ROOT / "results" / "memory_forms"
TABLE = ROOT / "results" / "memory_forms.md"
STEPS, EVAL_EVERY = (300, 300), 50
SETS = ("n8", "n16")

COMMON = [
    f"stages=[{{steps: {STEPS[0]}}}, {{steps: {STEPS[1]}, task_arguments: {{num_pairs: [4, 16]}}}}]",
    "per_device_train_batch_size=16",
    "lr_scheduler_kwargs={num_decay_steps: 150, min_lr_ratio: 0.05}",
    f"eval_steps={EVAL_EVERY}",
    'save_strategy="no"',
]
# Step sizes are learned from a start: the recipe's for vectors, and for the other forms the best of .04, 1 and 20 by
# the loss after 40 outer steps (1.55 nats, against 2.18 and 2.19).
KEY_VALUES = ["gradmem.memory_form=key_values", "gradmem.write_learning_rate=20"]
VALUES = ["gradmem.memory_form={name: key_values, write: values}", "gradmem.write_learning_rate=20"]

# Positions, numbers in a memory, and the options of each arm.
ARMS = {
    "vectors_8": (8, 1024, "input vectors", []),
    "key_values_8": (8, 8192, "keys and values, equal length", KEY_VALUES),
    "key_values_1": (1, 1024, "keys and values, equal size", KEY_VALUES),
    "values_2": (2, 1024, "values alone, equal size", VALUES),
}


class Curve(TrainerCallback):
    """Keeps the exact match of each evaluation."""

    def __init__(self) -> None:
        self.points: list[dict[str, float]] = []

    def on_evaluate(self, args, state, control, metrics, **kwargs) -> None:
        if not self.points or self.points[-1]["step"] != state.global_step:
            self.points.append({"step": state.global_step})
        for name in SETS:
            if (value := metrics.get(f"eval_{name}_exact_match")) is not None:
                self.points[-1][name] = value


def run_arm(name: str) -> dict:
    """Train one arm and say how it went."""
    positions, numbers, description, overrides = ARMS[name]
    settings = [*COMMON, *overrides, f"gradmem.num_memory_tokens={positions}"]
    with tempfile.TemporaryDirectory() as directory:
        trainer = build_trainer(load_recipe(RECIPE, [*settings, f"output_dir={directory}"]))
        held = trainer.model.form.shape[0] * trainer.model.form.shape[1]
        if held != numbers:
            raise RuntimeError(f"A memory of {name} holds {held} numbers, not {numbers}.")
        curve = Curve()
        trainer.add_callback(curve)
        trainer.train()
    return {"arm": name, "form": description, "numbers": numbers, "overrides": settings, "curve": curve.points}


def write_table() -> None:
    """One row for each arm."""
    rows = []
    for name, (positions, numbers, description, _) in ARMS.items():
        path = RESULTS / f"{name}.json"
        scores = ["not run"] * 4
        if path.is_file():
            curve = json.loads(path.read_text(encoding="utf-8"))["curve"]
            middle = next(point for point in curve if point["step"] == STEPS[0])
            scores = [f"{point[set_name]:.3f}" for set_name in SETS for point in (middle, curve[-1])]
        rows.append(f"| {description} | {positions} | {numbers:,} | {' | '.join(scores)} |")
    save_table(
        TABLE,
        "Keys and values as the memory, beside input vectors",
        "Key-value retrieval at the paper's shape (4 layers, 128 wide; keys and values of two symbols out of 62), two "
        f"WRITE steps with learned sizes, {STEPS[0]} outer steps of 16 contexts at 8 pairs and {STEPS[1]} at 4 to 16. "
        "Teacher-forced exact match on fresh contexts (1,024 queries of 8 pairs and of 16), one seed. Command: "
        "`python -m benchmarks.memory_forms`.",
        f"| memory | positions | numbers | 8 pairs, {STEPS[0]} steps | 8 pairs, {sum(STEPS)} | 16 pairs, {STEPS[0]} | "
        f"16 pairs, {sum(STEPS)} |",
        rows,
    )


if __name__ == "__main__":
    run_chosen(__doc__, ARMS, RESULTS, run_arm, write_table)
