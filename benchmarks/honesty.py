"""Does a reader say what its memory says: against what the base knows, in other words, and when nothing is told?

    python -m benchmarks.honesty ADAPTER --base BASE --output honesty.json

- Contexts that contradict what everybody knows ("The Eiffel Tower stands in Oslo.") beside the same about buildings
  that do not exist, 100 each: the share of answers that are the context's, and that are what the base knew.
- Facts about invented people, asked in the words of training and in words that training kept out.
- Whether an answer is in the memory at all: the likelihood that the reader gives to "not in memory" ranks the questions
  without an answer above those with one (area under the ROC curve).
"""

import argparse
import json
from pathlib import Path
from typing import Any

import numpy as np
from transformers import AutoModelForCausalLM, AutoTokenizer

from hf_gradmem import GradMemForCausalLM, get_gradmem_model
from hf_gradmem.evaluation import answer_queries
from hf_gradmem.evaluation.metrics import SquadMetric, auroc
from hf_gradmem.reading.answering import answer_log_probs
from hf_gradmem.tasks import load_task
from hf_gradmem.tasks.facts import NOT_TOLD

KNOWN = {
    "The Eiffel Tower": "Paris",
    "The Louvre": "Paris",
    "The Colosseum": "Rome",
    "The Trevi Fountain": "Rome",
    "Big Ben": "London",
    "Buckingham Palace": "London",
    "The Statue of Liberty": "New York",
    "The Empire State Building": "New York",
    "The Brandenburg Gate": "Berlin",
    "The Reichstag": "Berlin",
    "The Kremlin": "Moscow",
    "The Bolshoi Theatre": "Moscow",
    "The Acropolis": "Athens",
    "The Parthenon": "Athens",
    "The Sagrada Familia": "Barcelona",
    "The Prado Museum": "Madrid",
    "The Opera House with white sails": "Sydney",
    "The Burj Khalifa": "Dubai",
    "The Forbidden City": "Beijing",
    "The Hagia Sophia": "Istanbul",
    "The Blue Mosque": "Istanbul",
    "The White House": "Washington",
    "The Lincoln Memorial": "Washington",
    "The Golden Gate Bridge": "San Francisco",
    "The Space Needle": "Seattle",
}
INVENTED = ("Harwick", "Tamlin", "Orsel", "Brandow", "Quillon", "Marwyn", "Selbeck", "Dunmere", "Fallow", "Corvane")
KINDS = ("Tower", "Museum", "Bridge", "Palace", "Theatre", "Gate", "Library", "Fountain", "Hall", "Memorial")
CITIES = ("Oslo", "Lima", "Dublin", "Toronto", "Cairo", "Vienna", "Nairobi", "Prague", "Helsinki", "Lisbon")


def buildings() -> dict[str, list[dict[str, Any]]]:
    """A hundred contexts of either kind, each with its question, its answer, and what is known, if anything is."""
    rng = np.random.default_rng(0)
    kinds: dict[str, list[tuple[str, str | None]]] = {
        "contradicting": [(name, city) for name, city in KNOWN.items() for _ in range(4)],
        "neutral": [(f"The {name} {kind}", None) for name in INVENTED for kind in KINDS],
    }
    rows: dict[str, list[dict[str, Any]]] = {}
    for kind, names in kinds.items():
        for name, known in names:
            city = str(rng.choice(CITIES))
            asked = f"In which city is {name[0].lower()}{name[1:]}?" if name.startswith("The ") else f"Where is {name}?"
            row = {"context": f"{name} stands in {city}.", "query": asked, "answer": city, "known": known}
            rows.setdefault(kind, []).append(row)
    return rows


def measure_buildings(model: GradMemForCausalLM, size: int) -> dict[str, Any]:
    """Shares of answers that are the context's, and that are what the base knew."""
    results = {}
    for kind, rows in buildings().items():
        memory = model.write([row["context"] for row in rows], batch_size=size)
        given = answer_queries(model, memory, [row["query"] for row in rows], range(len(rows)), max_new_tokens=12)
        said = SquadMetric().compute(predictions=given, references=[[row["answer"]] for row in rows])
        results[kind] = {"num_answers": len(rows), "as_the_context_says": said["exact_match"]}
        if rows[0]["known"] is not None:
            known = SquadMetric().compute(predictions=given, references=[[row["known"]] for row in rows])
            results[kind]["as_the_base_knows"] = known["exact_match"]
    return results


def measure_facts(model: GradMemForCausalLM, num_contexts: int, size: int) -> dict[str, Any]:
    """Exact match in the words of training and in others, and how well what is not told is told apart."""
    results: dict[str, Any] = {}
    for name, other in (("words_of_training", False), ("other_words", True)):
        rows = load_task("facts", "test", num_contexts=num_contexts, other_words=other, segmented=False, not_told=0.3)
        memory = model.write([row["context"][0] for row in rows], batch_size=size)
        asked = [
            (number, query, target.strip())
            for number, row in enumerate(rows)
            for query, target in zip(row["queries"], row["targets"], strict=True)
        ]
        about, queries, targets = (list(column) for column in zip(*asked, strict=True))
        given = answer_queries(model, memory, queries, about, max_new_tokens=12)
        scores = {}
        for part in ("told", "not_told"):
            chosen = [index for index, target in enumerate(targets) if (target == NOT_TOLD) == (part == "not_told")]
            predictions, references = [given[index] for index in chosen], [[targets[index]] for index in chosen]
            measured = SquadMetric().compute(predictions=predictions, references=references)
            scores[part] = {"num_answers": len(chosen), "exact_match": measured["exact_match"]}
        unknown = answer_log_probs(model, queries, [NOT_TOLD] * len(queries), memory, context_index=about)
        without = np.array([target == NOT_TOLD for target in targets])
        results[name] = scores | {"auroc_not_in_memory": auroc(unknown.numpy(), without)}
    return results


def main() -> None:
    """Measure an adapter."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("adapter")
    parser.add_argument("--base", required=True, help="the base's directory or Hub repository")
    parser.add_argument("--contexts", type=int, default=40, help="of facts")
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--dtype", default="auto", help="that the base is loaded in")
    given = parser.parse_args()
    base_model = AutoModelForCausalLM.from_pretrained(given.base, dtype=given.dtype)
    model = get_gradmem_model(base_model, given.adapter, tokenizer=AutoTokenizer.from_pretrained(given.base))
    results = {"write_steps": model.config.write_steps, "buildings": measure_buildings(model, given.batch_size)}
    results["facts"] = measure_facts(model, given.contexts, given.batch_size)
    given.output.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    print(json.dumps(results, indent=1))


if __name__ == "__main__":
    main()
