"""What a memory of plain gradient descent tells of a text's sentences, by how it was written and where it is asked.

    python -m benchmarks.recall                 # every arm that has no result yet
    python -m benchmarks.recall sentences       # this one

SmolLM2-135M, frozen, 16 positions of values, plain Adam, no reader trained. Contexts of four to eight facts about
invented people are written whole (the paper's method), in sentences with the one before shown to each, in sentences
alone, in sentences behind a question that says nothing, and behind one that names some of the sentence's words, drawn
anew at each step (`write_prompt`). Then the base goes on, greedily, from a memory and the beginning of one of its
sentences ("Ada Holm lives in"): right is what begins with the value that the context has there. The floor is the memory
of the next context, right behind it. A reader has words of its own between the memory and what it recalls, so the same
is counted with a question there. Last, the base is asked real questions with no beginning: right is a quote that holds
the value. Results go to `benchmarks/results/recall/<arm>.json`, the table to `benchmarks/results/recall.md`.
"""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from transformers import AutoModelForCausalLM, AutoTokenizer

from hf_gradmem import GradMemConfig, GradMemForCausalLM, get_gradmem_model
from hf_gradmem.commands.packaged import find_demo_model
from hf_gradmem.evaluation import answer_queries
from hf_gradmem.memory.written import GradMemMemory
from hf_gradmem.tasks import load_task
from hf_gradmem.template import get_template
from hf_gradmem.writing.write import write_at_steps

from .arms import run_chosen

ROOT = Path(__file__).parent
RESULTS, TABLE = ROOT / "results" / "recall", ROOT / "results" / "recall.md"
STEPS, CONTEXTS, NEW_TOKENS = [8, 12, 20], 8, 10
QUOTED = 20
SHORT = "Question: Which one?"
ARMS: dict[str, tuple[str, dict[str, Any]]] = {
    "whole": ("whole", {}),
    "one_before": (
        "in sentences, each with the one before",
        {"write_sentence_segments": True, "write_prefix_segments": 1},
    ),
    "sentences": ("in sentences, each alone", {"write_sentence_segments": True, "write_prefix_segments": 0}),
    "prompted": (
        "in sentences, each alone, behind a short question",
        {"write_sentence_segments": True, "write_prefix_segments": 0, "write_prompt": f"{SHORT}\nQuote:"},
    ),
    "drawn": (
        "in sentences, each alone, behind some of its words",
        {"write_sentence_segments": True, "write_prefix_segments": 0, "write_prompt": "Question: {words}?\nQuote:"},
    ),
}
BETWEEN = {
    "short": f"{SHORT}\nQuote: ",
    "long": "Question: What does the text say about this person, as far as you know?\nQuote: ",
}
"""Words between a memory and the beginning of a sentence, which say nothing of what follows."""
Asked = tuple[int, str, str]


def beginnings(rows: list[dict[str, Any]]) -> list[Asked]:
    """Which context, how one of its sentences begins, and the value that ends it."""
    return [
        (number, sentence.strip()[: -len(f"{value}.")], value)
        for number, row in enumerate(rows)
        for sentence in row["context"]
        for value in sorted(set(row["targets"]))
        if sentence.endswith(f"{value}.")
    ]


def measure(name: str) -> dict[str, Any]:
    """Write the contexts in one way, and count what the base goes on with."""
    _, options = ARMS[name]
    torch.manual_seed(0)
    base = find_demo_model(Console(stderr=True))
    config = GradMemConfig(
        num_memory_tokens=16,
        memory_form={"name": "key_values", "write": "values"},
        write_optimizer="adam",
        write_betas=(0.9, 0.9),
        write_learning_rate=0.1,
        write_steps=max(STEPS),
        meta_gradient="first_order",
        **options,
    )
    base_model = AutoModelForCausalLM.from_pretrained(base, dtype="float32")
    model = get_gradmem_model(base_model, config, tokenizer=AutoTokenizer.from_pretrained(base))
    rows = list(load_task("facts", "test", num_contexts=CONTEXTS, not_told=0))
    contexts = model.tokenize(["".join(row["context"]) for row in rows])
    memories = write_at_steps(model.writer, contexts, STEPS, identity=model.identity())
    asked, questions = beginnings(rows), real_questions(model, rows)
    last, floor = memories[max(STEPS)], memories[max(STEPS)][[*range(1, CONTEXTS), 0]]
    return {
        "beginnings": len(asked),
        "recalled": {steps: recalled(model, memory, asked) for steps, memory in memories.items()},
        "behind": {
            name: recalled(model, last, [(number, words + text, value) for number, text, value in asked])
            for name, words in BETWEEN.items()
        },
        "floor": recalled(model, floor, asked),
        "quoted": recalled(model, last, questions, says, QUOTED),
        "quoted_floor": recalled(model, floor, questions, says, QUOTED),
    }


def real_questions(model: GradMemForCausalLM, rows: list[dict[str, Any]]) -> list[Asked]:
    """Which context, a question on it in words that ask for a quote, and the value that answers it."""
    words = get_template("quote", model.tokenizer)
    return [
        (number, words.question(query), target.strip())
        for number, row in enumerate(rows)
        for query, target in zip(row["queries"], row["targets"], strict=True)
    ]


def says(answer: str, value: str) -> bool:
    """Whether the first sentence of an answer holds the value."""
    return value in answer.strip().split("\n")[0].split(". ")[0]


def recalled(
    model: GradMemForCausalLM,
    memory: GradMemMemory,
    asked: list[Asked],
    is_right: Callable[[str, str], bool] = str.startswith,
    new_tokens: int = NEW_TOKENS,
) -> float:
    """The share of the beginnings, or questions, that the base goes on from with the right value."""
    of_context, texts, values = zip(*asked, strict=True)
    found = answer_queries(model, memory, list(texts), list(of_context), max_new_tokens=new_tokens)
    return sum(is_right(answer, value) for answer, value in zip(found, values, strict=True)) / len(asked)


def write_table() -> None:
    """The table of all arms that have a result."""
    headings = [f"{max(STEPS)}, {name} question between" for name in BETWEEN]
    headings += [f"another's memory, {max(STEPS)}", f"asked, {max(STEPS)}", "asked, another's memory"]
    lines = [
        "# Recall from the middle, by how a text was written",
        "",
        "`python -m benchmarks.recall`: SmolLM2-135M-Instruct, frozen, 16 positions of values, Adam; "
        f"{CONTEXTS} contexts of",
        "four to eight facts. The share of sentences that the base, given a memory and how the sentence begins, ends",
        "with the value that the context has there; on the right with a short or a long question between memory and",
        "beginning, as a reader has one there. Asked: the share of real questions upon which the base says a sentence",
        "with the right value. No reader is trained.",
        "",
        f"| written | {' | '.join(f'{steps} steps' for steps in STEPS)} | {' | '.join(headings)} |",
        f"|---|{'---|' * (len(STEPS) + len(headings))}",
    ]
    for name, (title, _) in ARMS.items():
        path = RESULTS / f"{name}.json"
        if path.is_file():
            found = json.loads(path.read_text(encoding="utf-8"))
            rest = (found[name] for name in ("floor", "quoted", "quoted_floor"))
            shares = [*found["recalled"].values(), *found["behind"].values(), *rest]
            lines.append(f"| {title} | {' | '.join(f'{share:.2f}' for share in shares)} |")
    TABLE.write_text("\n".join(lines) + "\n", encoding="utf-8")


if __name__ == "__main__":
    run_chosen(__doc__, ARMS, RESULTS, measure, write_table)
