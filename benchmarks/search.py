"""Which memory is a question about, and how long does it take to say? Likelihood, words, and both joined.

    python -m benchmarks.search hits [--adapter ADAPTER]
    python -m benchmarks.search time --threads 2
    python -m benchmarks.search table

`hits`: unseen contexts of Short SQuAD are written, and a question about each is searched for among all
of them; the ranks of the right memory by each method go to `benchmarks/results/search/hits.json`. `time`: one question
among 1,000 memories of 8 × the base's width, with the short list of BM25 and without. Eight are written; the others are
copies of them with noise of a tenth of their spread, which costs a search as much, and their texts are contexts of
Short SQuAD. The time of the generic questions, which a store needs once, is told apart. `table` writes
`benchmarks/results/search.md` from both, as the other two do.
"""

import argparse
import json
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from rich.console import Console
from tqdm.auto import tqdm
from transformers import AutoModelForCausalLM, AutoTokenizer

from hf_gradmem import GradMemConfig, GradMemForCausalLM, GradMemMemory, MemoryStore, get_gradmem_model
from hf_gradmem.commands.asking import SHORTLIST
from hf_gradmem.commands.packaged import LANGUAGE_ADAPTER, find_demo_model
from hf_gradmem.commands.write_dataset import write_dataset
from hf_gradmem.memory.search import SearchResult
from hf_gradmem.memory.shards import as_columns, features_of
from hf_gradmem.tasks import load_task

ROOT = Path(__file__).parent
RESULTS, TABLE = ROOT / "results" / "search", ROOT / "results" / "search.md"
DATA = Path("../shared/data/squad/train_subset_800.json")
QUESTIONS_OF_A_CONTEXT = 1
Ranking = Sequence[SearchResult]


def reciprocal_ranks(rankings: Sequence[Ranking], constant: float = 60) -> dict[str, float]:
    """Reciprocal rank fusion (Cormack et al., 2009): the sum of 1 / (constant + rank)."""
    scores: dict[str, float] = {}
    for ranking in rankings:
        for rank, result in enumerate(ranking, 1):
            scores[result.id] = scores.get(result.id, 0.0) + 1 / (constant + rank)
    return scores


def standardised_sum(rankings: Sequence[Ranking]) -> dict[str, float]:
    """The sum of scores, each method's brought to mean 0 and spread 1 over the memories."""
    scores: dict[str, float] = {}
    for ranking in rankings:
        values = [result.score for result in ranking]
        mean, spread = statistics.fmean(values), statistics.pstdev(values) or 1.0
        for result in ranking:
            scores[result.id] = scores.get(result.id, 0.0) + (result.score - mean) / spread
    return scores


FUSIONS: dict[str, Callable[[Sequence[Ranking]], dict[str, float]]] = {
    "reciprocal ranks": reciprocal_ranks,
    "standardised sum": standardised_sum,
}


def orders(likely: Ranking, words: Ranking) -> dict[str, list[str]]:
    """Ids, best first, by each method: among all memories, and among those that BM25 puts first."""
    first = {result.id for result in words[:SHORTLIST]}
    found = {}
    for where, parts in (
        ("", [likely, words]),
        (f", of BM25's first {SHORTLIST}", [[each for each in part if each.id in first] for part in (likely, words)]),
    ):
        found |= {
            name + where: [each.id for each in part] for name, part in zip(("likelihood", "BM25"), parts, strict=True)
        }
        for name, fuse in FUSIONS.items():
            scores = fuse(parts)
            found[name + where] = sorted(scores, key=scores.__getitem__, reverse=True)
    del found[f"BM25, of BM25's first {SHORTLIST}"]
    return found


def squad(split: str, count: int, data: Path) -> list[dict[str, Any]]:
    """So many contexts of Short SQuAD, each in one piece."""
    return list(load_task("squad", split, path=str(data), short=True, segmented=False, num_contexts=count))


def open_base(name: str, dtype: str) -> tuple[Any, Any]:
    """A base and its tokenizer."""
    return AutoModelForCausalLM.from_pretrained(name, dtype=dtype), AutoTokenizer.from_pretrained(name)


def measure_hits(given: argparse.Namespace) -> dict[str, Any]:
    """The rank of the right memory of each question, by each method."""
    base_model, tokenizer = open_base(given.base or find_demo_model(Console(stderr=True)), given.dtype)
    model = get_gradmem_model(base_model, given.adapter, tokenizer=tokenizer)
    rows = squad("validation", given.contexts, given.data)
    contexts = Dataset.from_dict({"id": list(map(str, range(len(rows)))), "context": [row["context"] for row in rows]})
    asked = [
        (str(number), query) for number, row in enumerate(rows) for query in row["queries"][:QUESTIONS_OF_A_CONTEXT]
    ]
    asked = asked[: given.questions]
    write_dataset(model, contexts, given.store, write_steps=given.steps, keep_text=True, show_progress=True)
    store = MemoryStore.from_pretrained(given.store)
    ranks: dict[str, list[int]] = {}
    for right, query in tqdm(asked, desc="Searching", unit="question"):
        likely = store.search(model, query, k=len(store), method="likelihood")
        words = store.search(None, query, k=len(store), method="bm25")
        for name, order in orders(likely, words).items():
            ranks.setdefault(name, []).append(order.index(right) + 1 if right in order else len(store) + 1)
    losses = store[store.ids].final_write_loss
    assert losses is not None
    facts = {"contexts": len(rows), "questions": len(asked), "write_steps": given.steps, "dtype": str(model.dtype)}
    return facts | {"final_write_loss": float(losses.mean()), "ranks": ranks}


def measure_time(given: argparse.Namespace) -> dict[str, Any]:
    """Seconds of a search over many memories, with and without a short list."""
    base_model, tokenizer = open_base(given.base or find_demo_model(Console(stderr=True)), given.dtype)
    torch.manual_seed(0)
    config = GradMemConfig(num_memory_tokens=8, write_learning_rate=0.05, write_optimizer="adam", template="question")
    model = get_gradmem_model(base_model, config, tokenizer=tokenizer)
    rows = squad("train", given.memories + 4, given.data)
    queries = [row["queries"][0] for row in rows[:4]]
    store = noisy_copies(model, [row["context"][0] for row in rows[: given.memories]])
    seconds: dict[str, list[dict[str, float]]] = {}

    def search(name: str, query: str, **options: Any) -> None:
        begin = time.perf_counter(), time.process_time()
        store.search(model, query, method="likelihood", **options)
        took = {"wall": time.perf_counter() - begin[0], "cpu": time.process_time() - begin[1]}
        seconds.setdefault(name, []).append(took)

    search("short list, first", queries[0], shortlist=20)  # with the index of words, and twenty memories' means
    for query in queries[: given.questions]:
        search("all, without the means", query, calibration=())
    for query in queries[1:]:
        search("short list, without the means", query, shortlist=20, calibration=())
        search("short list, new memories", query, shortlist=20)
        search("short list, again", query, shortlist=20)
    tokens = [len(tokenizer(query).input_ids) for query in queries]
    facts = {"memories": len(store), "threads": torch.get_num_threads(), "dtype": str(model.dtype)}
    return facts | {"question_tokens": tokens, "seconds": seconds}


def noisy_copies(model: GradMemForCausalLM, texts: Sequence[str]) -> MemoryStore:
    """A memory for each text, of which all but the first eight are copies of these with noise."""
    ids = list(map(str, range(len(texts))))
    with tempfile.TemporaryDirectory() as folder:
        first = Dataset.from_dict({"id": ids[:8], "context": list(texts[:8])})
        write_dataset(model, first, Path(folder) / "store", write_steps=4, keep_text=True)
        written = MemoryStore.from_pretrained(Path(folder) / "store")
        memory, facts = written[written.ids], written.facts
    every = GradMemMemory.cat([memory] * -(-len(texts) // 8))[: len(texts)]
    every.embeddings[8:] += 0.1 * memory.embeddings.std() * torch.randn_like(every.embeddings[8:])
    columns = as_columns(ids, every, list(texts))
    return MemoryStore(Dataset.from_dict(columns, features=features_of(facts)), facts | {"num_rows": len(ids)})


def hit_line(name: str, ranks: Sequence[int]) -> str:
    """A row of the table: the share in the first place, and among the first five."""
    shares = [sum(rank <= most for rank in ranks) / len(ranks) for most in (1, 5)]
    return f"| {name} | {shares[0]:.1%} | {shares[1]:.1%} |"


def time_line(name: str, values: Sequence[dict[str, float]]) -> str:
    """A row of the table: seconds by the clock, and of processors, which other work on the machine slows less."""
    wall, cpu = ([each[kind] for each in values] for kind in ("wall", "cpu"))
    median = statistics.median
    return f"| {name} | {median(wall):.2f} | {min(wall):.2f} | {max(wall):.2f} | {median(cpu):.2f} |"


def write_table() -> None:
    """The tables of what was measured."""
    lines = ["# Finding the memory of a question", ""]
    path = RESULTS / "hits.json"
    if path.is_file():
        hits = json.loads(path.read_text(encoding="utf-8"))
        lines += [
            f"`python -m benchmarks.search hits --adapter hf_gradmem/pretrained/{hits['adapter']} "
            f"--dtype {hits['dtype'].removeprefix('torch.')}`: "
            f"{hits['contexts']} unseen contexts of Short SQuAD written in {hits['write_steps']} steps, "
            f"{hits['questions']} questions. How often "
            "the right memory comes first, and among the first five.",
            "",
            "| search | first | first five |",
            "|---|---|---|",
            *(hit_line(name, ranks) for name, ranks in hits["ranks"].items()),
            "",
        ]
    for path in sorted(RESULTS.glob("time*.json")):
        times = json.loads(path.read_text(encoding="utf-8"))
        lines += [
            f"`python -m benchmarks.search time --threads {times['threads']}`: {times['memories']:,} memories of 8 "
            "input vectors on SmolLM2-135M (all but eight are copies with noise), "
            f"questions of {min(times['question_tokens'])} to {max(times['question_tokens'])} tokens, "
            f"{times['dtype']}. {times['note']}".strip(),
            "",
            "| search | seconds, median | from | to | CPU seconds, median |",
            "|---|---|---|---|---|",
            *(time_line(name, values) for name, values in times["seconds"].items()),
            "",
        ]
    TABLE.write_text("\n".join(lines).rstrip() + "\n", encoding="utf-8")


def main() -> None:
    """Measure, and write the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["hits", "time", "table"])
    parser.add_argument("--base", help="directory or Hub repository of the base; the demo's by default")
    parser.add_argument("--adapter", default=str(LANGUAGE_ADAPTER))
    parser.add_argument("--data", type=Path, default=DATA, help="SQuAD's JSON")
    parser.add_argument("--store", type=Path, default=Path("runs/search"), help="where the memories of hits are kept")
    parser.add_argument("--contexts", type=int, default=64)
    parser.add_argument("--questions", type=int, help="at most so many")
    parser.add_argument("--memories", type=int, default=1000)
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--note", default="", help="what else the machine did, for the table")
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    RESULTS.mkdir(parents=True, exist_ok=True)
    if given.what != "table":
        measured = (measure_hits if given.what == "hits" else measure_time)(given)
        told = measured | {"adapter": Path(given.adapter).name, "note": given.note}
        (RESULTS / f"{given.what}.json").write_text(json.dumps(told, indent=1) + "\n", encoding="utf-8")
    write_table()


if __name__ == "__main__":
    main()
