"""Whole paragraphs in the English adapter that recites: in one memory, or in pieces, a memory each, that are searched.

    python -m benchmarks.paragraphs            # every arm that has no result yet
    python -m benchmarks.paragraphs pieces     # this one

Paragraphs of SQuAD's development half, two to four times as long as the texts that the adapter was trained on. `whole`
writes each into one memory and asks it, and another paragraph's. `pieces` cuts them at their sentences into pieces as
long as the texts of training, writes a memory for each into a store, and asks the piece that holds the answer, the best
one of the paragraph, and the best one of all paragraphs, as `hf-gradmem ask` finds it. Results go to
`benchmarks/results/paragraphs/<arm>.json`, the table to `benchmarks/results/paragraphs.md`.
"""

import itertools
import json
import tempfile
from pathlib import Path
from typing import Any

from datasets import Dataset

from hf_gradmem import GradMemForCausalLM, MemoryStore, cut_text
from hf_gradmem.commands.packaged import LANGUAGE_ADAPTER
from hf_gradmem.commands.write_dataset import write_dataset
from hf_gradmem.evaluation import evaluate_rows
from hf_gradmem.evaluation.metrics import SquadMetric
from hf_gradmem.evaluation.readers import OTHER
from hf_gradmem.tasks import load_task

from .arms import run_chosen, save_table
from .positions import build_model

ROOT = Path(__file__).parent
RESULTS, TABLE = ROOT / "results" / "paragraphs", ROOT / "results" / "paragraphs.md"
DATA = "../shared/data/squad/dev_visible_half.json"
PARAGRAPHS, BATCH, PIECE = 16, 8, 64
STEPS, MORE_STEPS = 8, (20, 40)  # the adapter's own, and what a longer text may need
# Which memory of a question is asked, and how that is said.
ASKED = {
    "own": "the piece that holds the answer",
    "paragraph": "the best piece of the paragraph",
    "all": "the best piece of all paragraphs",
}
ARMS = ("whole", "pieces")


def paragraphs() -> Dataset:
    return load_task("squad", "test", path=DATA, segmented=False, num_contexts=PARAGRAPHS)


def measure_whole() -> dict[str, Any]:
    """Each paragraph in one memory, its own and another's, and its own after more steps."""
    model, rows = build_model(LANGUAGE_ADAPTER), paragraphs()
    records = evaluate_rows(model, rows, [STEPS], "squad", baselines=[OTHER], batch_size=BATCH)
    return {"records": records + evaluate_rows(model, rows, MORE_STEPS, "squad", batch_size=BATCH)}


def pieces_of(model: GradMemForCausalLM, rows: Dataset) -> dict[str, str]:
    """The pieces of the paragraphs by their ids, `paragraph/piece`."""
    return {
        f"{number}/{place}": piece
        for number, row in enumerate(rows)
        for place, piece in enumerate(cut_text("".join(row["context"]), model.tokenizer, PIECE))
    }


def holder(pieces: dict[str, str], number: int, quote: str, answer: str) -> str:
    """The piece of a paragraph that an answer begins in, where it stands in the sentence that it is quoted from."""
    of_paragraph = {name: piece for name, piece in pieces.items() if name.startswith(f"{number}/")}
    text = "".join(of_paragraph.values())
    begins = text.index(answer.strip(), max(text.find(quote.strip()), 0))
    ends = itertools.accumulate(map(len, of_paragraph.values()))
    return next(name for name, end in zip(of_paragraph, ends, strict=True) if begins < end)


def measure_pieces() -> dict[str, Any]:
    """Answers from the piece that holds them, and from those that a search finds."""
    model, rows = build_model(LANGUAGE_ADAPTER), paragraphs()
    pieces = pieces_of(model, rows)
    asked = [
        (number, query, answers, holder(pieces, number, quote, target))
        for number, row in enumerate(rows)
        for query, answers, quote, target in zip(
            row["queries"], row["answers"], row["quotes"], row["targets"], strict=True
        )
    ]
    numbers, queries, references, own = (list(column) for column in zip(*asked, strict=True))
    contexts = Dataset.from_dict({"id": list(pieces), "context": list(pieces.values())})
    with tempfile.TemporaryDirectory() as directory:
        folder = Path(directory) / "store"
        write_dataset(model, contexts, folder, batch_size=BATCH, keep_text=True, show_progress=True)
        store = MemoryStore.from_pretrained(folder)
        ranked = [
            [result.id for result in results]
            for results in store.search(model, queries, k=len(store), method="joint", show_progress=True)
        ]
        chosen = {
            "own": own,
            "paragraph": [
                next(name for name in ranking if name.startswith(f"{number}/"))
                for number, ranking in zip(numbers, ranked, strict=True)
            ],
            "all": [ranking[0] for ranking in ranked],
        }
        told = {name: place for place, name in enumerate(store.ids)}
        memory = store[store.ids]
        results: dict[str, Any] = {"pieces": len(pieces), "questions": len(queries), "asked": {}}
        for which, names in chosen.items():
            answers = model.answer(queries, memory, context_index=[told[name] for name in names], batch_size=BATCH)
            scores = SquadMetric().compute(predictions=[each.text for each in answers], references=references)
            found = sum(name == right for name, right in zip(names, own, strict=True)) / len(own)
            results["asked"][which] = {"found": found} | scores
    return results


def run_arm(name: str) -> dict[str, Any]:
    return measure_whole() if name == "whole" else measure_pieces()


def table_rows() -> list[str]:
    rows = []
    if (path := RESULTS / "whole.json").is_file():
        for record in json.loads(path.read_text(encoding="utf-8"))["records"]:
            memory = "another paragraph's memory" if record["context"] == OTHER else "one memory"
            recited = f"{record['recited_verbatim']:.3f}" if "recited_verbatim" in record else ""
            figures = f"{record['exact_match']:.3f} | {record['f1']:.3f}"
            rows.append(f"| {memory} | {record['write_steps']} | {recited} | {figures} |")
    if (path := RESULTS / "pieces.json").is_file():
        for which, found in json.loads(path.read_text(encoding="utf-8"))["asked"].items():
            told = "" if which == "own" else f", which is the right one in {found['found']:.3f}"
            rows.append(f"| {ASKED[which]}{told} | {STEPS} | | {found['exact_match']:.3f} | {found['f1']:.3f} |")
    return rows


def write_table() -> None:
    """A row for each number of steps of the one, and for each way to choose a piece of the other."""
    save_table(
        TABLE,
        "Whole paragraphs",
        f"`python -m benchmarks.paragraphs`: {PARAGRAPHS} paragraphs of SQuAD's development half in "
        "gradmem-smollm2-135m-recite, with all their questions; each in one memory of 16 positions, or cut at their "
        f"sentences into pieces of {PIECE} tokens at most, a memory each, found by likelihood and words together. "
        "Generated answers, SQuAD's metric, all references; the share of paragraphs recited to the letter.",
        "| asked | steps | recited to the letter | EM | F1 |",
        table_rows(),
    )


if __name__ == "__main__":
    run_chosen(__doc__, ARMS, RESULTS, run_arm, write_table)
