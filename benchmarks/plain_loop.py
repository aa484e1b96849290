"""Contexts into memory vectors: `write-dataset` beside the loop that one would write in plain PyTorch.

    python -m benchmarks.plain_loop --model MODEL                # K = 20, two rounds
    python -m benchmarks.plain_loop --model MODEL --quick        # K = 3, one round
    python -m benchmarks.plain_loop --model MODEL --dtype bfloat16

Both write the same contexts, Short SQuAD's sentences of 12 to 48 tokens, into 8 vectors of the frozen base from the
same start by Adam. The plain loop takes batches of 32, padded to 48 tokens, and all logits; `write_dataset` writes a
store, its files and the loss after the last step included. They take turns in one process, on one thread, and what is
counted is the processor time of it: the result is the ratio within a round. Each round is added to
`benchmarks/results/plain_loop.json`, and the table beside it is made anew.
"""

import argparse
import json
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from torch.nn import functional
from tqdm import tqdm
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

from hf_gradmem import GradMemConfig, MemoryStore, get_gradmem_model
from hf_gradmem.commands.write_dataset import write_dataset
from hf_gradmem.tasks import load_task

Tensor = torch.Tensor

ROOT = Path(__file__).parent
RESULT, TABLE = ROOT / "results" / "plain_loop.json", ROOT / "results" / "plain_loop.md"
DATA = Path("../shared/data/squad/train_subset_800.json")
CONTEXTS, BATCH, LONGEST, SHORTEST = 32, 32, 48, 12
MEMORY_TOKENS, STEP_SIZE, BETAS = 8, 0.05, (0.9, 0.9)


def contexts_of(tokenizer: Any, count: int) -> list[str]:
    """The first texts of the lengths that are asked for."""
    rows = load_task("squad", "train", path=str(DATA), short=True, num_contexts=4 * count)
    texts = ["".join(row["context"]).strip() for row in rows]
    fitting = [text for text in texts if SHORTEST <= len(tokenizer(text).input_ids) <= LONGEST]
    return list(dict.fromkeys(fitting))[:count]


def plain_loop(
    base: PreTrainedModel, batches: list[tuple[Tensor, Tensor]], start: Tensor, steps: int
) -> tuple[Tensor, Tensor]:
    """Memories `(contexts, num_memory_tokens, width)` by the loop of a user who knows PyTorch, and the last losses."""
    written, last = [], []
    for ids, mask in batches:
        tokens = base.get_input_embeddings()(ids).detach()
        memory = start.detach().float().repeat(len(ids), 1, 1).requires_grad_()
        optimizer = torch.optim.Adam([memory], lr=STEP_SIZE, betas=BETAS)
        whole_mask = torch.cat([mask.new_ones(memory.shape[:2]), mask], dim=1)
        labels = ids.masked_fill(mask == 0, -100)
        for _ in range(steps):
            embeds = torch.cat([memory.to(tokens.dtype), tokens], dim=1)
            logits = base(inputs_embeds=embeds, attention_mask=whole_mask).logits[:, memory.shape[1] - 1 : -1].float()
            losses = functional.cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="none")
            of_contexts = losses.view_as(ids).sum(1) / mask.sum(1)
            optimizer.zero_grad()
            of_contexts.sum().backward()
            optimizer.step()
        written.append(memory.detach())
        last.append(of_contexts.detach())
    return torch.cat(written), torch.cat(last)


def measure(model_name: str, dtype: str, num_contexts: int, steps: int, rounds: int) -> None:
    tokenizer = AutoTokenizer.from_pretrained(model_name)
    base = AutoModelForCausalLM.from_pretrained(model_name, dtype=dtype).eval().requires_grad_(False)
    torch.manual_seed(0)
    config = GradMemConfig(
        num_memory_tokens=MEMORY_TOKENS,
        write_steps=steps,
        write_optimizer="adam",
        write_learning_rate=STEP_SIZE,
        write_betas=BETAS,
    )
    model = get_gradmem_model(base, config, tokenizer=tokenizer)
    texts = contexts_of(tokenizer, num_contexts)
    source = Dataset.from_dict({"id": [str(row) for row in range(len(texts))], "context": texts})
    padded = tokenizer(texts, padding="max_length", max_length=LONGEST, padding_side="right", return_tensors="pt")
    batches = list(zip(padded.input_ids.split(BATCH), padded.attention_mask.split(BATCH), strict=True))
    tokens = int(padded.attention_mask.sum()) / len(texts)

    def ours() -> tuple[Tensor, Tensor]:
        with tempfile.TemporaryDirectory() as directory:
            write_dataset(model, source, directory)
            store = MemoryStore.from_pretrained(directory)
            memories = store[source["id"]]
            return memories.embeddings, memories.write_losses[:, -1]

    runs: dict[str, Callable[[], tuple[Tensor, Tensor]]] = {
        "plain": lambda: plain_loop(base, batches, model.memory_init, steps),
        "ours": ours,
    }
    model.identity()  # the base's hash, which is taken once in a process
    for turn in tqdm(range(rounds), unit="round"):
        seconds, memories, losses = {}, {}, {}
        for name in list(runs) if turn % 2 else reversed(runs):
            begin = time.process_time()
            memories[name], losses[f"{name}_loss"] = runs[name]()
            seconds[name] = time.process_time() - begin
        apart = float((memories["plain"] - memories["ours"]).norm() / memories["plain"].norm())
        last = {name: float(loss.mean()) for name, loss in losses.items()}
        keep(
            {"dtype": dtype, "contexts": len(texts), "steps": steps, "tokens": tokens, "apart": apart} | seconds | last
        )


def keep(result: dict[str, Any]) -> None:
    """Add a round to the results, and make the table of all of them."""
    results = json.loads(RESULT.read_text(encoding="utf-8")) if RESULT.is_file() else []
    results.append(result)
    RESULT.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    kinds: dict[tuple[str, int, int], list[dict[str, Any]]] = {}
    for each in results:
        kinds.setdefault((each["dtype"], each["contexts"], each["steps"]), []).append(each)
    lines = [
        "# `write-dataset` beside a plain loop",
        "",
        "`python -m benchmarks.plain_loop --model MODEL` (`--quick` for K = 3): SmolLM2-135M-Instruct, frozen,",
        "one thread, processor seconds; Short SQuAD sentences of 12 to 48 tokens into 8 vectors, Adam. bfloat16 was",
        "measured on another processor than float32, one that has its products: compare ratios alone.",
        "The plain loop takes 32 contexts at a time, padded to 48 tokens, and all logits. `write-dataset` also",
        "measures the loss after the last step, one forward pass: a sixth of the work of 3 steps, a fortieth of",
        "that of 20. `apart` is how far the two sets of memories are apart, relative to their norm, at most: Adam",
        "takes steps of one size however small a gradient is, so rounding moves it. The losses are those before the",
        "last step, nats a token. Time: median, and the smallest and largest of the rounds.",
        "",
        "| precision | contexts | K | tokens | rounds | plain, contexts/s | write-dataset, contexts/s | time / plain "
        "| apart | loss, plain / write-dataset |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    for (dtype, contexts, steps), rounds in sorted(kinds.items()):
        ratios = [each["ours"] / each["plain"] for each in rounds]
        rates = [statistics.median(contexts / each[name] for each in rounds) for name in ("plain", "ours")]
        lines.append(
            f"| {dtype} | {contexts} | {steps} | {rounds[0]['tokens']:.1f} | {len(rounds)} | {rates[0]:.3f} | "
            f"{rates[1]:.3f} | {statistics.median(ratios):.2f} [{min(ratios):.2f}–{max(ratios):.2f}] | "
            f"{max(each['apart'] for each in rounds):.1e} | {last_losses(rounds)} |"
        )
    TABLE.write_text("\n".join(lines) + "\n", encoding="utf-8")


def last_losses(rounds: list[dict[str, Any]]) -> str:
    """The mean losses before the last step, where they were kept."""
    if "plain_loss" not in rounds[-1]:
        return "–"
    return " / ".join(f"{rounds[-1][name]:.3f}" for name in ("plain_loss", "ours_loss"))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="HuggingFaceTB/SmolLM2-135M-Instruct", help="the base")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32", help="the base's precision")
    parser.add_argument("--quick", action="store_true", help="3 steps, once")
    parser.add_argument("--rounds", type=int, help="2, or 1 if quick")
    given = parser.parse_args()
    torch.set_num_threads(1)
    steps, rounds = (3, 1) if given.quick else (20, 2)
    measure(given.model, given.dtype, CONTEXTS, steps, given.rounds or rounds)


if __name__ == "__main__":
    main()
