"""How long a text a memory recites, by its positions and the steps of WRITE (the paper's appendix I).

    python -m benchmarks.recitation                                        # what has no result yet, on SmolLM2-135M
    python -m benchmarks.recitation --form values --output values.json     # positions of values in place of vectors
    python -m benchmarks.recitation --adapter ADAPTER --output adapter.json  # from its start, by its rule
    python -m benchmarks.recitation --texts 2 --memory-sizes 1 2 --steps 5 10 --lengths 8 16 32

Passages of two novels are written into memories from a random start, or from an adapter's (`--adapter`), by a frozen
base. After each of the steps it is counted how many of a passage's tokens are the likeliest ones, given the memory and
the right tokens before them. What is told is the longest passage, on a grid of lengths, of which 95 and 99 % are, and
of every shorter one as well. Beside it: the cross-entropy of the 128 tokens after a passage of 128, given its memory,
given the passage itself, and given nothing. Results go to `benchmarks/results/recitation.json`, cell by cell, so that a
run that was interrupted goes on, and the tables to `benchmarks/results/recitation.md`.
"""

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from torch.nn import functional
from tqdm.auto import tqdm
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from hf_gradmem import GradMemConfig, GradMemForCausalLM, get_gradmem_model
from hf_gradmem.base.modes import evaluating
from hf_gradmem.commands.packaged import find_demo_model
from hf_gradmem.files import whole_file
from hf_gradmem.tasks.text import sentences, strip_gutenberg
from hf_gradmem.texts.reading import read_text
from hf_gradmem.writing.contexts import Contexts
from hf_gradmem.writing.objectives.reconstruction import write_inputs
from hf_gradmem.writing.write import write_at_steps

RESULTS = Path(__file__).parent / "results" / "recitation.json"
BOOKS = [Path("../shared/data/books") / name for name in ("1342_pride_and_prejudice.txt", "2701_moby_dick.txt")]
LENGTHS, MEMORY_SIZES, STEPS = (8, 16, 24, 32, 48, 64, 96, 128), (1, 2, 8), (1, 2, 5, 10, 20)
BOUNDS = (0.95, 0.99)
DTYPES = ("float32", "bfloat16")
WRITTEN, CONTINUED = 128, 128  # tokens of a passage, and of what follows it
ADAM = {"write_optimizer": "adam", "meta_gradient": "first_order"}
# What a memory is, and how it is stepped: input vectors as in the paper, or values as the English adapters have them.
FORMS: dict[str, tuple[str, dict[str, Any]]] = {
    "vectors": ("random start, Adam, step size 0.05", {"write_learning_rate": 0.05}),
    "values": (
        "random start of values, Adam, relative steps of 0.234 that shrink (`--form values`)",
        {
            "memory_form": {"name": "key_values", "write": "values"},
            "write_relative_step_size": True,
            "write_learning_rate": 0.234,
            "write_step_decay": 0.86,
            "write_betas": (0.5, 0.9),
        },
    ),
}

Tensor = torch.Tensor


def passages(tokenizer: PreTrainedTokenizerBase, count: int, books: Sequence[Path] = BOOKS) -> Tensor:
    """So many passages, from the books in turn and spread evenly over each, from the beginning of a sentence on.

    Returns:
        `(count, WRITTEN + CONTINUED)` tokens.
    """
    tokens = WRITTEN + CONTINUED
    found = []
    for number, book in enumerate(books):
        told = sentences(strip_gutenberg(read_text(book)))
        of_book = len(range(number, count, len(books)))
        for place in range(of_book):
            first = (2 * place + 1) * len(told) // (2 * of_book)
            text = "".join(told[first : first + tokens]).lstrip()  # a sentence has a token at least
            ids = tokenizer(text, add_special_tokens=False).input_ids[:tokens]
            if len(ids) < tokens:
                raise ValueError(f"{book} ends {len(ids)} tokens after sentence {first}; {tokens} are needed.")
            found.append((place, number, ids))
    return torch.tensor([ids for *_, ids in sorted(found)])


def memories_after(model: GradMemForCausalLM, contexts: Tensor, steps: Sequence[int]) -> dict[int, Any]:
    """The memories after each of so many steps, of one run of the most."""
    return write_at_steps(model.writer, Contexts(contexts, torch.ones_like(contexts)), steps, identity=model.identity())


@torch.no_grad()
def recited(model: GradMemForCausalLM, contexts: Tensor, embeddings: Tensor) -> Tensor:
    """Share of each context's tokens that are the likeliest, given the memory and the tokens before: `(batch,)`."""
    rows = model.writer.rows(Contexts(contexts, torch.ones_like(contexts)).checked(model.device))
    with evaluating():
        prefix = model.write_phase.prefix(embeddings).take(rows.sample_index)
        inputs, places = write_inputs(prefix, rows, model.write_phase)
        right = rows.of_scored(model.write_phase.logits(inputs, places)).argmax(-1) == rows.targets
    return right.view(contexts.shape).float().mean(1)


@torch.no_grad()
def continuation_losses(model: GradMemForCausalLM, texts: Tensor, memory: Any) -> dict[str, list[float]]:
    """Mean cross-entropy of each text's continuation, its first token apart, which "nothing" does not predict.

    Args:
        model: memory and base.
        texts: `(batch, WRITTEN + CONTINUED)`.
        memory: of the first `WRITTEN` tokens.
    """
    continued = texts[:, -CONTINUED:]
    with evaluating():
        logits = {
            "memory": model(input_ids=continued, memory=memory).logits,
            "full context": model.base_model(input_ids=texts).logits[:, -CONTINUED:],
            "nothing": model.base_model(input_ids=continued).logits,
        }
    targets = continued[:, 1:]
    return {
        given: functional.cross_entropy(of[:, :-1].float().transpose(1, 2), targets, reduction="none").mean(1).tolist()
        for given, of in logits.items()
    }


def longest(accuracies: dict[int, float], bound: float) -> int | None:
    """The longest of the lengths that, with all shorter ones, is recited to at least `bound`; `None` if none is."""
    found = None
    for length in sorted(accuracies):
        if accuracies[length] < bound:
            break
        found = length
    return found


class Report:
    """Cells by their names, in a file that always holds what is measured so far.

    Raises:
        ValueError: the file holds results of other conditions.
    """

    def __init__(self, path: Path, conditions: dict[str, Any]) -> None:
        self.path, self.values = path, {"conditions": conditions, "recited": {}, "continuation": {}}
        if path.is_file():
            kept = json.loads(path.read_text(encoding="utf-8"))
            if kept["conditions"] != conditions:
                raise ValueError(
                    f"{path} holds results of {kept['conditions']}, not of {conditions}. Give another --output, or "
                    "remove it."
                )
            self.values = kept

    def add(self, kind: str, name: str, value: dict[str, Any]) -> None:
        self.values[kind][name] = value
        with whole_file(self.path) as unfinished:
            unfinished.write_text(json.dumps(self.values, indent=1) + "\n", encoding="utf-8")
        self.path.with_suffix(".md").write_text("\n".join(tables(self.values)) + "\n", encoding="utf-8")


def measure(
    models: dict[int, GradMemForCausalLM], texts: Tensor, lengths: Sequence[int], steps: Sequence[int], report: Report
) -> None:
    """Every cell that the report does not have: the passages of a length in one batch, for each number of vectors."""
    cells = [(size, length) for length in lengths for size in models]
    for size, length in tqdm(cells, desc="passages recited", unit="cell"):
        if (name := f"{size} vectors, {length} tokens") not in report.values["recited"]:
            contexts = texts[:, :length].to(models[size].device)
            written = memories_after(models[size], contexts, steps)
            shares = {
                step: recited(models[size], contexts, memory.embeddings).tolist() for step, memory in written.items()
            }
            report.add("recited", name, {"vectors": size, "tokens": length, "accuracy": shares})
    for size, model in tqdm(models.items(), desc="text continued", unit="memory"):
        if (name := f"{size} vectors") not in report.values["continuation"]:
            written = memories_after(model, texts[:, :WRITTEN].to(model.device), [max(steps)])
            losses = continuation_losses(model, texts.to(model.device), written[max(steps)])
            report.add("continuation", name, {"vectors": size, "steps": max(steps), "losses": losses})


def tables(values: dict[str, Any]) -> list[str]:
    """The results as Markdown."""
    conditions, cells = values["conditions"], values["recited"].values()
    steps = [str(step) for step in conditions["steps"]]
    lengths = [str(length) for length in sorted({cell["tokens"] for cell in cells})]
    sizes = list(dict.fromkeys(cell["vectors"] for cell in cells))
    options = f"--texts {conditions['texts']} --memory-sizes {' '.join(map(str, sizes))}"
    lines = [
        "# How long a text a memory recites",
        "",
        f"`python -m benchmarks.recitation {options} --steps {' '.join(steps)} --lengths {' '.join(lengths)}`: "
        f"{conditions['base']}, frozen, READ untrained, {conditions['start']}; {conditions['texts']} passages of "
        f"{len(conditions['books'])} novels, one seed. Tokens of the longest passage of which 95 / 99 % are the "
        "likeliest ones, given its memory and the tokens before, on the mean over passages and for all shorter lengths "
        f"as well, of {', '.join(lengths)} (– : not the shortest).",
        "",
    ]
    lines += [f"| positions | {' | '.join(f'{step} steps' for step in steps)} |", "|---" * (len(steps) + 1) + "|"]
    for size in sizes:
        found = []
        for step in steps:
            means = {cell["tokens"]: _mean(cell["accuracy"], step) for cell in cells if cell["vectors"] == size}
            found.append(" / ".join(str(longest(means, bound) or "–") for bound in BOUNDS))
        lines.append(f"| {size} | {' | '.join(found)} |")
    lines += ["", "Share of the tokens, the mean over passages:", ""]
    lines += [
        f"| positions | tokens | {' | '.join(f'{step} steps' for step in steps)} |",
        "|---" * (len(steps) + 2) + "|",
    ]
    for cell in sorted(cells, key=lambda cell: (cell["vectors"], cell["tokens"])):
        shares = " | ".join(f"{_mean(cell['accuracy'], step):.3f}" for step in steps)
        lines.append(f"| {cell['vectors']} | {cell['tokens']} | {shares} |")
    if values["continuation"]:
        lines += [
            "",
            f"Nats a token of the {CONTINUED - 1} tokens from the second one after a passage of {WRITTEN} on, given "
            "its memory, the passage itself, or nothing:",
            "",
            "| positions | steps | memory | full context | nothing |",
            "|---|---|---|---|---|",
        ]
        for cell in values["continuation"].values():
            losses = " | ".join(
                f"{_mean(cell['losses'], given):.3f}" for given in ("memory", "full context", "nothing")
            )
            lines.append(f"| {cell['vectors']} | {cell['steps']} | {losses} |")
    return lines


def _mean(columns: dict[Any, list[float]], name: str) -> float:
    (values,) = (column for key, column in columns.items() if str(key) == name)
    return sum(values) / len(values)


def build_models(
    base: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    sizes: Sequence[int],
    adapter: str | None,
    form: str,
) -> dict[int, GradMemForCausalLM]:
    """The base with a memory of each size from a random start, or with the adapter's, by the number of vectors."""
    if adapter is not None:
        model = get_gradmem_model(base, adapter, tokenizer=tokenizer)
        if model.config.writer != "gradient" or model.config.write_segments_in_turn:
            raise ValueError(
                f"{adapter} does not write whole passages by gradient steps, so it has no steps to compare."
            )
        return {model.config.num_memory_tokens: model}
    models = {}
    for size in sizes:
        torch.manual_seed(0)
        config = GradMemConfig(num_memory_tokens=size, **ADAM, **FORMS[form][1])
        models[size] = get_gradmem_model(base, config, tokenizer=tokenizer)
    return models


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure what is missing, and write the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--base", help="directory or Hub repository of the base; SmolLM2-135M-Instruct by default")
    parser.add_argument("--adapter", help="write from its start and by its rule, in place of a random start and Adam")
    parser.add_argument("--texts", type=int, default=8, metavar="N", help="passages of each length")
    parser.add_argument("--memory-sizes", type=int, nargs="+", default=list(MEMORY_SIZES), metavar="M")
    parser.add_argument("--steps", type=int, nargs="+", default=list(STEPS), metavar="K")
    parser.add_argument("--lengths", type=int, nargs="+", default=list(LENGTHS), metavar="L")
    parser.add_argument("--form", choices=FORMS, default="vectors", help="what the memory of a random start is")
    parser.add_argument("--dtype", choices=DTYPES, default=DTYPES[0], help="of the base")
    parser.add_argument("--books", type=Path, nargs="+", default=BOOKS)
    parser.add_argument("--output", type=Path, default=RESULTS)
    given = parser.parse_args(arguments)
    for name, numbers, most in (
        ("texts", [given.texts], None),
        ("memory-sizes", given.memory_sizes, None),
        ("steps", given.steps, None),
        ("lengths", given.lengths, WRITTEN),
    ):
        if min(numbers) < 1 or (most is not None and max(numbers) > most):
            parser.error(f"--{name} must be at least 1{f' and at most {most}' if most else ''}, got {numbers}.")
    torch.set_num_threads(1)
    base = given.base or find_demo_model(Console(stderr=True))
    tokenizer = AutoTokenizer.from_pretrained(base)
    models = build_models(
        AutoModelForCausalLM.from_pretrained(base, dtype=getattr(torch, given.dtype)),
        tokenizer,
        given.memory_sizes,
        given.adapter,
        given.form,
    )
    from_adapter = f"start and rule of {Path(given.adapter).name} (`--adapter`)" if given.adapter else None
    precision = "" if given.dtype == DTYPES[0] else f", in {given.dtype} (`--dtype`)"
    conditions = {
        "base": Path(base).name,
        "start": (from_adapter or FORMS[given.form][0]) + precision,
        "texts": given.texts,
        "steps": given.steps,
        "books": [book.name for book in given.books],
    }
    report = Report(given.output, conditions)
    measure(models, passages(tokenizer, given.texts, given.books), given.lengths, given.steps, report)


if __name__ == "__main__":
    main()
