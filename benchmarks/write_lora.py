"""A LoRA of WRITE's own for the English adapter: what the base expects of a text, given its memory, learned from texts.

    python -m benchmarks.write_lora runs/gradmem-smollm2-135m-write

gradmem-smollm2-135m-recite is given a `write_lora` of rank 1 (what is published has one, which goes on), and that alone
is trained: on the reconstruction loss L(M_k; C) of memories that it wrote itself, after k steps in turn from `DRAWN`,
without a gradient through the steps (first order). No question is asked, and READ stays as it was. Half of the outer
steps take no step of WRITE: they cost a sixth, teach what texts of these kinds are like, which a memory then need not
hold, and keep the loss at the start from rising, as it did with memories of five steps alone (3.8 to 10 nats in twenty
outer steps). The losses of held-out texts, before each of six steps, go to `write_lora.json` in the folder, with the
adapter, every forty outer steps.
"""

import argparse
import json
import random
from pathlib import Path

import torch
from tqdm.auto import tqdm

from hf_gradmem import GradMemForCausalLM
from hf_gradmem.checkpoint.adapter import Adapter
from hf_gradmem.commands.packaged import LANGUAGE_ADAPTER
from hf_gradmem.tasks import load_task

from .arms import demo_base

LORA = {"r": 1, "lora_alpha": 2, "target_modules": "all-linear"}
DRAWN = (0, 0, 5, 0, 1, 3, 0, 0, 4, 0, 1, 2)
OUTER_STEPS, BATCH, WARMUP, LEARNING_RATE, MEASURED_EVERY = 400, 8, 8, 6e-3, 40
SQUAD = {
    "path": "../shared/data/squad/train_subset_800.json",
    "short": True,
    "segmented": False,
    "validation_share": 0.04,
}
FACTS = {"num_facts": [4, 8], "segmented": False}


def build_model() -> GradMemForCausalLM:
    """The adapter on the demo's base, with a LoRA that changes nothing yet."""
    base, tokenizer = demo_base()
    opened = Adapter.open(LANGUAGE_ADAPTER, options={"write_lora": LORA, "write_steps": max(DRAWN), "confidence": None})
    model = opened.attach(GradMemForCausalLM, base)
    model.tokenizer = tokenizer
    return model


def training_texts() -> tuple[list[str], list[str]]:
    """Texts of facts, of which none is seen twice, and of SQuAD."""
    facts = load_task(
        "facts",
        "train",
        **FACTS,
        num_contexts=BATCH // 2 * OUTER_STEPS,
        not_told=0.25,
        queries_per_context=8,
        seed=51,
    )
    squad = [row["context"][0] for row in load_task("squad", "train", **SQUAD)]
    random.Random(0).shuffle(squad)
    return [row["context"][0] for row in facts], squad


def held_out_texts() -> dict[str, list[str]]:
    rows = {
        "squad": load_task("squad", "validation", **SQUAD, num_contexts=16),
        "facts": load_task("facts", "validation", **FACTS, num_contexts=16, not_told=0.15),
    }
    return {kind: [row["context"][0] for row in found] for kind, found in rows.items()}


def written_losses(model: GradMemForCausalLM) -> dict[str, list[float]]:
    """Of each kind of held-out text the mean loss before each of six steps, in nats a token."""
    return {
        kind: model.write(texts, write_steps=6, batch_size=16).write_losses.float().mean(0).tolist()
        for kind, texts in held_out_texts().items()
    }


def train(model: GradMemForCausalLM, output: Path) -> None:
    """Train the LoRA, and save the adapter with what was measured on the way."""
    model.requires_grad_(False)
    lora = [parameter for name, parameter in model.named_parameters() if "lora_" in name and ".write." in name]
    optimizer = torch.optim.AdamW(lora, lr=LEARNING_RATE, weight_decay=0.0, betas=(0.9, 0.98))
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min(1, (step + 1) / WARMUP) * max(0.05, 1 - step / OUTER_STEPS)
    )
    facts, squad = training_texts()
    measured = [{"outer_step": 0} | written_losses(model)]
    for step in tqdm(range(OUTER_STEPS), desc="Training WRITE's LoRA", unit="step"):
        half = range(step * BATCH // 2, (step + 1) * BATCH // 2)
        texts = [facts[number] for number in half] + [squad[number % len(squad)] for number in half]
        memory = model.write(texts, write_steps=DRAWN[step % len(DRAWN)], batch_size=BATCH)
        for parameter in lora:
            parameter.requires_grad_(True)
        objective = model.writer.objective(model.writer.rows(model.tokenize(texts).checked(model.device)))
        objective.first_order(memory.embeddings).mean().backward()
        torch.nn.utils.clip_grad_norm_(lora, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
        model.requires_grad_(False)
        if (step + 1) % MEASURED_EVERY == 0:
            measured.append({"outer_step": step + 1} | written_losses(model))
            model.save_pretrained(output)
            (output / "write_lora.json").write_text(json.dumps(measured, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("output", type=Path)
    given = parser.parse_args()
    torch.set_num_threads(1)
    train(build_model(), given.output)
