"""How many positions an English memory has, and how many steps write it: one reader, m = 8, 16 and 32.

    python -m benchmarks.positions                 # every size that has no result yet
    python -m benchmarks.positions eight           # this one

The reader is gradmem-smollm2-135m-recite's, which has 16 positions: its figures are those of its card. Eight begin as
its first ones and 32 as all of them twice, and have then a start learned for them alone: eight rounds of Reptile, of
five steps and 48 training texts each. The texts of that card are written, recited and asked. Results go to
`benchmarks/results/positions/<arm>.json`, the table to `benchmarks/results/positions.md`; a learned start is kept in
`runs/positions`.
"""

import json
import shutil
from pathlib import Path
from typing import Any

from hf_gradmem import GradMemForCausalLM, get_gradmem_model
from hf_gradmem.commands.packaged import LANGUAGE_ADAPTER
from hf_gradmem.tasks import load_task
from hf_gradmem.training.recipe import load_recipe
from hf_gradmem.training.start import Start, learn_start

from .arms import answer_sets, demo_base, run_chosen, save_table
from .memory_size import with_positions

ROOT = Path(__file__).parent
RESULTS, TABLE = ROOT / "results" / "positions", ROOT / "results" / "positions.md"
RECIPE = ROOT.parent / "model_cards" / "gradmem-smollm2-135m" / "evaluation.yaml"
RUNS = Path("runs") / "positions"
PUBLISHED = ROOT.parent / "model_cards" / "gradmem-smollm2-135m-recite" / "results.json"
ARMS = {"eight": 8, "thirty_two": 32}
# Nothing changes any more after twenty, but perhaps with the fewest positions.
STEPS = {"eight": (5, 10, 20, 40), "thirty_two": (5, 10, 20)}
SETS, BATCH = ("short_squad", "facts"), 8
START = Start("reptile", contexts=48, rounds=8, write_steps=5)


def training_texts() -> list[list[str]]:
    """For each round as many texts of facts as of SQuAD."""
    count = START.contexts * START.rounds // 2
    squad = {"path": "../shared/data/squad/train_subset_800.json", "short": True, "validation_share": 0.04}
    facts = {"num_facts": [4, 8], "not_told": 0.25, "queries_per_context": 8, "seed": 45}
    kinds = [
        load_task(task, "train", num_contexts=count, segmented=False, **arguments)
        for task, arguments in (("squad", squad), ("facts", facts))
    ]
    return [row["context"] for together in zip(*kinds, strict=True) for row in together]


def build_model(adapter: str | Path) -> GradMemForCausalLM:
    """The demo's base with an adapter, in the precision that is faster."""
    base, tokenizer = demo_base()
    return get_gradmem_model(base, adapter, tokenizer=tokenizer)


def model_of_size(name: str) -> GradMemForCausalLM:
    """The reader with so many positions, whose start is learned, or was by a run before."""
    learned = RUNS / name
    if not learned.is_dir():
        before = RUNS / f"{name}-before"
        with_positions(LANGUAGE_ADAPTER, before, ARMS[name])
        model = build_model(before)
        learn_start(model, training_texts(), START, batch_size=BATCH, show_progress=True)
        model.save_pretrained(learned)
        shutil.rmtree(before)
    return build_model(learned)


def run_arm(name: str) -> dict[str, Any]:
    """Write, recite and ask the test texts."""
    arguments = load_recipe(RECIPE).arguments
    arguments.eval_sets = {each: arguments.eval_sets[each] for each in SETS}
    records = answer_sets(name, model_of_size(name), arguments, "test", STEPS[name], batch_size=BATCH)
    return {"arm": name, "results": records}


def rows_of(count: int, path: Path) -> list[str]:
    """A row for each number of steps that a file has figures of."""
    if not path.is_file():
        return [f"| {count} | not run | | |"]
    records = json.loads(path.read_text(encoding="utf-8"))["results"]
    found = {(record["set"], record["write_steps"]): record for record in records}
    rows = []
    for steps in dict.fromkeys(record["write_steps"] for record in records):
        cells = [
            f"{record['exact_match']:.3f} / {record['f1']:.3f} ({record['recited_verbatim']:.3f})"
            for record in (found[each, steps] for each in SETS)
        ]
        rows.append(f"| {count} | {steps} | {' | '.join(cells)} |")
    return rows


def write_table() -> None:
    """A row for each size and number of steps."""
    sizes = {16: PUBLISHED} | {count: RESULTS / f"{name}.json" for name, count in ARMS.items()}
    save_table(
        TABLE,
        "Positions of an English memory, and the steps that write it",
        "`python -m benchmarks.positions`: the reader of gradmem-smollm2-135m-recite, for 16 positions as its card has "
        "it, for 8 and 32 with a start that was learned for them alone, in eight rounds of 48 texts; no reader was "
        "trained. Exact match / F1 of generated answers, and the share of texts recited to the letter, on the texts of "
        "that adapter's card (48 spans with 86 questions, 16 contexts of facts with 93). One seed.",
        "| positions | steps | Short SQuAD | facts |",
        [row for count, path in sorted(sizes.items()) for row in rows_of(count, path)],
    )


if __name__ == "__main__":
    run_chosen(__doc__, ARMS, RESULTS, run_arm, write_table)
