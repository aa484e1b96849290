"""More questions on the texts of a reader, by the base itself: `few_self_study` of benchmarks/readers.py.

    python -m benchmarks.self_study

Self-study (Eyuboglu et al., arXiv 2506.06266): SmolLM2-135M-Instruct is shown three texts with a question and its
answer, then each text that the arms `few` train on, and goes on with a question and an answer of its own, several
times. Those are kept whose answer stands in the text, and that were not asked before. The rows, own questions first,
go to `runs/readers/self_study.jsonl`; how many were made and kept is printed.
"""

import json
import random
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from tqdm.auto import tqdm

from hf_gradmem.tasks import load_task
from hf_gradmem.tasks.rows import context_text

from .arms import demo_base
from .readers import SELF_STUDY_ROWS, arm_recipe

SAMPLES, BATCH, MOST_WORDS, SEED = 6, 8, 8, 0
_PARTS = re.compile(r"\s*(?P<question>[^\n]+\?)\s*\nAnswer:[ ]*(?P<answer>[^\n]+?)\.?[ ]*\n")


def texts_of(rows: Iterable[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """The rows, each context as one text."""
    return [{**row, "context": context_text(row["context"])} for row in rows]


def shown(row: Mapping[str, Any], query: int) -> str:
    """A text with one of its questions, as the base is shown it."""
    return f"Text: {row['context']}\nQuestion: {row['queries'][query]}\nAnswer:{row['targets'][query]}\n\n"


def prompt(rows: Sequence[Mapping[str, Any]], number: int, rng: random.Random) -> str:
    """Three other texts of the same kind, long or short, with a question whose answer is in the text; then this one."""
    place = range(max(0, number - 20), min(len(rows), number + 20))
    told = [
        (rows[other], query)
        for other in place
        for query, target in enumerate(rows[other]["targets"])
        if rows[other]["context"] != rows[number]["context"] and target.strip() in rows[other]["context"]
    ]
    examples = "".join(shown(row, query) for row, query in rng.sample(told, 3))
    return f"{examples}Text: {rows[number]['context']}\nQuestion:"


def questions_of(texts: Sequence[str], row: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Question and answer of each continuation whose answer stands in the row's text, once each."""
    known, found = set(row["queries"]), []
    for match in filter(None, map(_PARTS.match, texts)):
        question, answer = match["question"].strip(), match["answer"]
        in_text = re.search(rf"(?<!\w){re.escape(answer)}(?!\w)", row["context"])
        if in_text and len(answer.split()) <= MOST_WORDS and question not in known:
            known.add(question)
            found.append((question, answer))
    return found


@torch.inference_mode()
def continuations(model: Any, tokenizer: Any, prompts: Sequence[str]) -> list[list[str]]:
    """What the base goes on with behind each prompt, `SAMPLES` times."""
    inputs = tokenizer(list(prompts), padding=True, padding_side="left", return_tensors="pt")
    output = model.generate(
        **inputs,
        do_sample=True,
        temperature=0.8,
        top_p=0.95,
        top_k=0,
        max_new_tokens=40,
        num_return_sequences=SAMPLES,
        pad_token_id=tokenizer.pad_token_id,
    )
    # An answer that the limit cut off has no end of line, which would let it pass.
    texts = tokenizer.batch_decode(output[:, inputs.input_ids.shape[1] :], skip_special_tokens=True)
    return [texts[start : start + SAMPLES] for start in range(0, len(texts), SAMPLES)]


def study(rows: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """The rows with the base's own questions behind theirs."""
    model, tokenizer = demo_base()
    rng = random.Random(SEED)
    torch.manual_seed(SEED)
    prompts = [prompt(rows, number, rng) for number in range(len(rows))]
    found = []
    for start in tqdm(range(0, len(rows), BATCH), unit="batch"):
        for number, texts in enumerate(continuations(model, tokenizer, prompts[start : start + BATCH]), start):
            row, more = rows[number], questions_of(texts, rows[number])
            found.append(
                {
                    "context": row["context"],
                    "queries": [*row["queries"], *(question for question, _ in more)],
                    "targets": [*row["targets"], *(f" {answer}" for _, answer in more)],
                }
            )
    return found


if __name__ == "__main__":
    arguments = arm_recipe("few").arguments
    asked = texts_of(load_task(arguments.task, "train", **arguments.task_arguments))
    torch.set_num_threads(1)
    studied = study(asked)
    SELF_STUDY_ROWS.parent.mkdir(parents=True, exist_ok=True)
    SELF_STUDY_ROWS.write_text("".join(json.dumps(row) + "\n" for row in studied), encoding="utf-8")
    before, after = (sum(len(row["queries"]) for row in of) for of in (asked, studied))
    print(f"{len(asked)} texts, {before} questions; the base made {len(asked) * SAMPLES}, {after - before} are kept.")
