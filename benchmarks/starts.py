"""How many WRITE steps a text takes, by form and start of the memory: SmolLM2-135M, frozen, plain Adam.

    python -m benchmarks.starts                 # every arm that has no result yet
    python -m benchmarks.starts values_16       # this one

Held-out texts of three kinds (sentences of SQuAD, of a novel, and facts about invented people), eight each, are written
for 40 steps. Starts: random (mean embedding and noise), and the mean of memories written from it, after one round and
after two (Reptile; 96 texts and 20 steps a round). Forms: 16 input vectors, and 16 positions of keys and values, or of
values alone, which start from a forward pass. Results go to `benchmarks/results/starts/<arm>.json`, the table to
`benchmarks/results/starts.md`: at which step the mean loss is first below 1.0 and .3 nats a token.
"""

import json
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from transformers import AutoModelForCausalLM, AutoTokenizer

from hf_gradmem import GradMemConfig, GradMemForCausalLM, get_gradmem_model
from hf_gradmem.commands.packaged import find_demo_model
from hf_gradmem.tasks import load_task
from hf_gradmem.training.start import Start, learn_start

from .arms import run_chosen

ROOT = Path(__file__).parent
RESULTS, TABLE = ROOT / "results" / "starts", ROOT / "results" / "starts.md"
DATA = Path("../shared/data")
STEPS, ROUND_TEXTS, ROUND_STEPS, HELD_OUT = 40, 96, 20, 8
VECTORS = {"num_memory_tokens": 16, "write_learning_rate": 0.05}
# Options of the adapter, and rounds of Reptile.
ARMS: dict[str, tuple[str, dict[str, Any], int]] = {
    "vectors_16": ("16 input vectors, random start", VECTORS, 0),
    "vectors_16_round_1": ("16 input vectors, Reptile, 1 round", VECTORS, 1),
    "vectors_16_round_2": ("16 input vectors, Reptile, 2 rounds", VECTORS, 2),
    "values_16": (
        "16 positions of values",
        {
            "num_memory_tokens": 16,
            "write_learning_rate": 0.1,
            "memory_form": {"name": "key_values", "write": "values"},
        },
        0,
    ),
    "key_values_16": (
        "16 positions of keys and values",
        {"num_memory_tokens": 16, "write_learning_rate": 0.1, "memory_form": "key_values"},
        0,
    ),
}


def texts(split: str, count: int) -> dict[str, list[str]]:
    """So many texts of each kind."""
    squad = {"path": str(DATA / "squad" / "train_subset_800.json"), "short": True, "num_contexts": count}
    novel = {
        "path": str(DATA / "books" / "1342_pride_and_prejudice.txt"),
        "context_sentences": 1,
        "target_sentences": 1,
        "num_contexts": count,
    }
    rows = {
        "squad": load_task("squad", split, **squad),
        "novel": load_task("text", split, **novel),
        "facts": load_task("facts", split, num_contexts=count, num_facts=[2, 4]),
    }
    return {kind: ["".join(row["context"]).strip() for row in found] for kind, found in rows.items()}


def measure(name: str) -> dict[str, Any]:
    """Learn the start of an arm, and write the held-out texts from it."""
    _, options, rounds = ARMS[name]
    torch.manual_seed(0)
    base = find_demo_model(Console(stderr=True))
    base_model = AutoModelForCausalLM.from_pretrained(base)
    config = GradMemConfig(write_optimizer="adam", meta_gradient="first_order", write_steps=STEPS, **options)
    model = get_gradmem_model(base_model, config, tokenizer=AutoTokenizer.from_pretrained(base))
    report = []
    if rounds:
        kinds = texts("train", rounds * ROUND_TEXTS // 3).values()
        mixed = [[text] for together in zip(*kinds, strict=True) for text in together]
        start = Start("reptile", contexts=ROUND_TEXTS, rounds=rounds, write_steps=ROUND_STEPS)
        report = learn_start(model, mixed, start, batch_size=8)
    curves = {kind: curve(model, held_out) for kind, held_out in texts("validation", HELD_OUT).items()}
    return {"rounds": report, "losses": curves}


def curve(model: GradMemForCausalLM, contexts: list[str]) -> list[float]:
    """Mean loss before each step, and after the last."""
    memory = model.write(contexts, measure_final_loss=True)
    assert memory.final_write_loss is not None
    return [*memory.write_losses.mean(0).tolist(), float(memory.final_write_loss.mean())]


def write_table() -> None:
    """The table of all arms that have a result."""
    lines = [
        "# Steps of WRITE, by form and start",
        "",
        "`python -m benchmarks.starts`: SmolLM2-135M-Instruct, frozen, Adam; eight held-out texts of",
        "each kind, one seed. Steps until the mean loss is first below 1.0 and .3 nats a token (– : not in 40), and",
        "the loss after 5, 10, 20 and 40 steps.",
        "",
        "| memory and start | texts | to 1.0 | to .3 | 5 | 10 | 20 | 40 |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for name, (title, _, _) in ARMS.items():
        path = RESULTS / f"{name}.json"
        if path.is_file():
            for kind, losses in json.loads(path.read_text(encoding="utf-8"))["losses"].items():
                first = [
                    next((str(step) for step, loss in enumerate(losses) if loss < bound), "–") for bound in (1.0, 0.3)
                ]
                at = [f"{losses[step]:.2f}" for step in (5, 10, 20, 40)]
                lines.append(f"| {title} | {kind} | {' | '.join([*first, *at])} |")
    TABLE.write_text("\n".join(lines) + "\n", encoding="utf-8")


if __name__ == "__main__":
    run_chosen(__doc__, ARMS, RESULTS, measure, write_table)
