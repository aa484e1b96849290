"""What makes a memory learn to be read: one arm for each change of a recipe, to the outer steps it takes.

    python -m benchmarks.study                 # every arm that has no result yet
    python -m benchmarks.study whole_context   # this one

An arm trains the recipe of `gradmem-kv-tiny` at N = 4 with one thing changed, until exact match on 256 fresh contexts
(1,024 queries) is .99 or the steps are used up. Results go to `benchmarks/results/study/<arm>.json`, the table to
`benchmarks/results/study.md`. An arm that was interrupted starts again; one that has a result is kept.
"""

import json
import tempfile
from pathlib import Path

from hf_gradmem.training.recipe import load_recipe
from hf_gradmem.training.run import build_trainer

from .arms import StopWhenLearned, run_chosen

ROOT = Path(__file__).parent
RECIPE = ROOT.parent / "model_cards" / "gradmem-kv-tiny" / "recipe.yaml"
RESULTS = ROOT / "results" / "study"
TABLE = ROOT / "results" / "study.md"
STEPS, EVAL_EVERY, ENOUGH = 400, 50, 0.99

COMMON = [
    "task_arguments={num_pairs: 4, key_length: 1, value_length: 1, end_mark: false, seed: 0}",
    "eval_sets={n4: {num_contexts: 256, seed: 1}}",
    f"stages=[{{steps: {STEPS}}}]",
    f"eval_steps={EVAL_EVERY}",
    'save_strategy="no"',
    "lr_scheduler_type=constant_with_warmup",
    "lr_scheduler_kwargs={}",
]

PLAIN = "gradmem.reconstruction_loss_weight=0"
IN_TURN = [PLAIN, "gradmem.write_segments_in_turn=true", "gradmem.write_steps=1"]
SHORT_WARMUP = "warmup_steps=50"
SEED_1 = ["seed=1", "task_arguments.seed=1"]

# What each arm changes: a description, and overrides of the recipe.
ARMS = {
    "recipe": ("each pair a segment, no prefix; initializer_range 0.1, about 1/√width; reconstruction weight 1", []),
    "recipe_seed_1": ("the same, seed 1", SEED_1),
    "small_init": ("initializer_range 0.02, the default of Transformers", ["base_config.initializer_range=0.02"]),
    "whole_context": ("the whole context at once, as in the paper", ["task_arguments.segmented=false"]),
    "first_order": ("meta-gradient without second-order terms", ["gradmem.meta_gradient=first_order"]),
    "finite_difference": ("meta-gradient by finite differences", ["gradmem.meta_gradient=finite_difference"]),
    "last_step": ("second-order term in the last step alone", ["gradmem.meta_gradient_steps=1"]),
    "plain": ("reconstruction weight 0: the answers alone are trained on", [PLAIN]),
    "plain_seed_1": ("the same, seed 1", [PLAIN, *SEED_1]),
    "plain_last_step": (
        "weight 0, second-order term in the last step alone",
        [PLAIN, "gradmem.meta_gradient_steps=1"],
    ),
    "plain_whole": (
        "weight 0, whole context: the paper's objective as it stands",
        [PLAIN, "task_arguments.segmented=false"],
    ),
    "plain_prefix": ("weight 0, the pair before as an unscored prefix", [PLAIN, "gradmem.write_prefix_segments=1"]),
    "in_turn": ("weight 0, pair after pair in turn, one step each", IN_TURN),
    "in_turn_seed_1": ("the same, seed 1", [*IN_TURN, *SEED_1]),
    "plain_one_query": (
        "weight 0, one query on each context in place of four",
        [PLAIN, "task_arguments.queries_per_context=1"],
    ),
    "plain_fixed_steps": ("weight 0, step size fixed at 0.04", [PLAIN, "gradmem.learn_write_learning_rate=none"]),
    "plain_momentum": ("weight 0, momentum in WRITE", [PLAIN, "gradmem.write_optimizer=momentum"]),
    "plain_short_warmup": (
        "weight 0, AdamW at 3e-3 in place of 1e-3, 50 steps of warm-up in place of 200",
        [PLAIN, "learning_rate=3e-3", SHORT_WARMUP],
    ),
    "plain_muon": (
        "weight 0, the base's matrices by Muon at 8e-3, 50 steps of warm-up",
        [PLAIN, "muon_learning_rate=8e-3", SHORT_WARMUP],
    ),
    "plain_muon_seed_1": ("the same, seed 1", [PLAIN, "muon_learning_rate=8e-3", SHORT_WARMUP, *SEED_1]),
    "mirrored": (
        "weight 0, half the queries backward, each pair written in both orders",
        [PLAIN, "task_arguments.backward=0.5", "task_arguments.mirrored=true", "stages=[{steps: 700}]"],
    ),
    "backward": ("weight 0, half the queries backward, pairs as they are", [PLAIN, "task_arguments.backward=0.5"]),
}


def run_arm(name: str) -> dict:
    """Train one arm and say how it went."""
    description, overrides = ARMS[name]
    with tempfile.TemporaryDirectory() as directory:
        trainer = build_trainer(load_recipe(RECIPE, [*COMMON, *overrides, f"output_dir={directory}"]))
        watch = StopWhenLearned(ENOUGH)
        trainer.add_callback(watch)
        trainer.train()
    curve = [{"step": point["step"], "exact_match": point["n4"], "minutes": point["minutes"]} for point in watch.curve]
    return {"arm": name, "change": description, "overrides": overrides, "curve": curve}


def first_at(curve: list[dict], exact_match: float) -> dict | None:
    return next((point for point in curve if point["exact_match"] >= exact_match), None)


def write_table() -> None:
    """One row for each arm that has a result."""
    rows = []
    for name in ARMS:
        path = RESULTS / f"{name}.json"
        if not path.is_file():
            rows.append(f"| {name} | {ARMS[name][0]} | not run | | | |")
            continue
        curve = json.loads(path.read_text(encoding="utf-8"))["curve"]
        reached = [first_at(curve, level) for level in (0.9, 0.99)]
        cells = [f"{point['step']} ({point['minutes']:.1f} min)" if point else "–" for point in reached]
        rows.append(
            f"| {name} | {ARMS[name][0]} | {cells[0]} | {cells[1]} | {curve[-1]['exact_match']:.3f} | "
            f"{curve[-1]['step']} |"
        )
    text = [
        "# What makes a memory learn to be read",
        "",
        "Key-value retrieval, N = 4, one-symbol keys and values out of 62, m = 8, K = 2, 3 layers, 64 wide, batch 64. "
        f"Outer steps (and minutes of one busy CPU thread) to exact match .9 and .99 on fresh contexts, measured every "
        f"{EVAL_EVERY} steps; an arm ends there or after {STEPS} (mirrored: 700). Chance is .25. One run for each row. "
        "The minutes are those of a clock on a machine that did other work as well, and compare roughly. Command: "
        "`python -m benchmarks.study`.",
        "",
        "| arm | change | to .9 | to .99 | EM at the end | steps |",
        "|---|---|---|---|---|---|",
        *rows,
        "",
        "The prefix stands before the memory. Between memory and segment, where it stood at commit 78a4c51, the "
        "same arm was at .272 after 400 steps with weight 1.",
    ]
    TABLE.write_text("\n".join(text) + "\n", encoding="utf-8")


if __name__ == "__main__":
    run_chosen(__doc__, ARMS, RESULTS, run_arm, write_table)
