"""How many WRITE steps a text takes, by the form and the start of the memory: SmolLM2-135M, frozen, Adam.

    python -m benchmarks.starts                 # every arm that has no result yet
    python -m benchmarks.starts values_16       # this one

Held-out texts of three kinds (sentences of SQuAD, of a novel, and facts about invented people), eight each, are written
from a random start (mean embedding and noise, or what the base makes of that), and after one round and more of Reptile:
the mean of 96 memories of other texts that were written from the start before. Forms: 16 input vectors, and 16
positions of keys and values, or of values alone, also with steps relative to the start, which shrink; and the published
adapter. In bfloat16 where that is faster. Results go to `benchmarks/results/starts/<arm>.json`, the table to
`benchmarks/results/starts.md`: at which step the mean loss is first below 1.0 and .3 nats a token, and how many of the
eight are recited to the letter.
"""

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from hf_gradmem import GradMemConfig, GradMemForCausalLM, get_gradmem_model
from hf_gradmem.commands.packaged import LANGUAGE_ADAPTER
from hf_gradmem.reading.reciting import recite
from hf_gradmem.tasks import load_task
from hf_gradmem.training.start import Start, learn_start
from hf_gradmem.writing.write import write_at_steps

from .arms import demo_base, run_chosen

ROOT = Path(__file__).parent
RESULTS, TABLE = ROOT / "results" / "starts", ROOT / "results" / "starts.md"
DATA = Path("../shared/data")
AT, ROUND_TEXTS, HELD_OUT = (5, 10, 20, 40), 96, 8
VALUES = {"name": "key_values", "write": "values"}
RELATIVE = {"write_relative_step_size": True, "write_step_decay": 0.86, "write_betas": (0.5, 0.9)}


@dataclass(frozen=True)
class Arm:
    """A form of memory with its steps, and how often its start becomes the mean of memories of so many steps."""

    title: str
    options: dict[str, Any] = field(default_factory=dict)
    rounds: int = 0
    round_steps: int = 20
    published: bool = False


ARMS = {
    "values_16_relative": Arm(
        "16 positions of values, relative steps",
        {"write_learning_rate": 0.234, "memory_form": VALUES} | RELATIVE,
        rounds=3,
        round_steps=8,
    ),
    "published": Arm("… the start and WRITE's LoRA of gradmem-smollm2-135m-recite", published=True),
    "values_16": Arm("16 positions of values", {"write_learning_rate": 0.1, "memory_form": VALUES}),
    "key_values_16": Arm("16 positions of keys and values", {"write_learning_rate": 0.1, "memory_form": "key_values"}),
    "vectors_16": Arm("16 input vectors", {"write_learning_rate": 0.05}, rounds=3),
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


def build_model(arm: Arm) -> GradMemForCausalLM:
    """The demo's base with a memory that nothing was learned for, or the published adapter."""
    torch.manual_seed(0)
    base, tokenizer = demo_base()
    if arm.published:
        return get_gradmem_model(base, LANGUAGE_ADAPTER, tokenizer=tokenizer)
    settings = {"write_optimizer": "adam", "meta_gradient": "first_order", "num_memory_tokens": 16} | arm.options
    return get_gradmem_model(base, GradMemConfig(**settings), tokenizer=tokenizer)


def measure(name: str) -> dict[str, Any]:
    """Write the held-out texts from the start of an arm, and again after each round."""
    arm = ARMS[name]
    model, held_out = build_model(arm), texts("validation", HELD_OUT)
    kinds = texts("train", max(arm.rounds, 1) * ROUND_TEXTS // 3).values()
    mixed = [[text] for together in zip(*kinds, strict=True) for text in together]
    found, learned = [written(model, held_out)], []
    for number in range(arm.rounds):
        start = Start("reptile", contexts=ROUND_TEXTS, write_steps=arm.round_steps)
        learned += learn_start(model, mixed[number * ROUND_TEXTS :][:ROUND_TEXTS], start, batch_size=8)
        found.append(written(model, held_out))
    return {"after_rounds": found, "rounds": learned}


def written(model: GradMemForCausalLM, held_out: dict[str, list[str]]) -> dict[str, dict[str, Any]]:
    """Of each kind the mean loss before each step and after the last, and how many texts are recited to the letter."""
    found = {}
    for kind, contexts in held_out.items():
        # One step further than is looked at, which tells the loss after the one before.
        memories = write_at_steps(model.writer, model.tokenize(contexts), [*AT, AT[-1] + 1], identity=model.identity())
        verbatim = [sum(map(str.__eq__, recite(model, memories[steps]), contexts)) for steps in AT]
        found[kind] = {"losses": memories[AT[-1] + 1].write_losses.mean(0).tolist(), "verbatim": verbatim}
    return found


def row(title: str, kind: str, found: dict[str, Any]) -> str:
    """A row of the table."""
    losses = found["losses"]
    first = [next((str(step) for step, loss in enumerate(losses) if loss < bound), "–") for bound in (1.0, 0.3)]
    at = [f"{losses[steps]:.2f} ({right})" for steps, right in zip(AT, found["verbatim"], strict=True)]
    return f"| {title} | {kind} | {' | '.join([*first, *at])} |"


def write_table() -> None:
    """The table of all arms that have a result."""
    lines = [
        "# Steps of WRITE, by form and start",
        "",
        f"`python -m benchmarks.starts`: SmolLM2-135M-Instruct, frozen, Adam; {HELD_OUT} held-out texts of each kind,",
        f"one seed; {ROUND_TEXTS} other texts in a round of Reptile. Steps until the mean loss is below 1.0 and .3",
        f"nats a token (– : not in {AT[-1]}); the loss after so many steps, and in parentheses how many of them are",
        "recited to the letter.",
        "",
        f"| memory | start | texts | to 1.0 | to .3 | {' | '.join(map(str, AT))} |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for name, arm in ARMS.items():
        path = RESULTS / f"{name}.json"
        for number, found in enumerate(json.loads(path.read_text("utf-8"))["after_rounds"] if path.is_file() else []):
            rounds = f"{number} round" + "s" * (number > 1)
            start = "published" if arm.published else rounds if number else "random"
            lines += [row(f"{arm.title} | {start}", kind, of_kind) for kind, of_kind in found.items()]
    TABLE.write_text("\n".join(lines) + "\n", encoding="utf-8")


if __name__ == "__main__":
    run_chosen(__doc__, ARMS, RESULTS, measure, write_table)
