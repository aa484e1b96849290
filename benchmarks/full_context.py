"""The ceiling of key-value retrieval: the same base, with all pairs before it in place of a memory.

    python -m benchmarks.full_context

A Llama of the paper's shape learns to answer questions behind a context, by the usual training of a decoder, with Muon
for its matrices: few pairs of eight symbols at first, then up to 96 of 62. Then it answers contexts that it was not
trained on, one question at a time. Results go to `benchmarks/results/full_context.json`.

What it takes is many contexts in a step, few symbols first, and to stay at few pairs until values are found by their
keys, which comes at once after some hundred steps. With 16 contexts of 62 symbols in each, 1,590 steps from one pair on
found the second symbol of a value by its first, and no value by its key; where each stage ended after a fixed number of
steps (300 at 4 to 12 pairs, Muon at twice the rate), .11 of 8 pairs and .01 of 96 were right in the end.
"""

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from datasets import IterableDataset
from torch.optim import AdamW, Muon
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    DataCollatorForSeq2Seq,
    PreTrainedModel,
    Trainer,
    TrainerCallback,
    TrainerControl,
    TrainingArguments,
    set_seed,
)

from hf_gradmem.tasks import TASKS
from hf_gradmem.training.optimizer import JoinedOptimizer
from hf_gradmem.training.recipe import load_recipe

RECIPE = Path(__file__).parents[1] / "model_cards" / "gradmem-kv-96" / "recipe.yaml"
RESULTS = Path(__file__).parent / "results" / "full_context.json"
MUON_LEARNING_RATE, LEARNING_RATE, BETAS = 1e-2, 1e-3, (0.9, 0.98)


class Stage(NamedTuple):
    """At most so many steps, each on so many contexts of pairs and symbols, until the loss is below `enough`."""

    steps: int
    contexts: int
    pairs: tuple[int, int]
    symbols: int
    enough: float


STAGES = (
    Stage(400, 128, (2, 4), 8, 0.25),
    Stage(200, 96, (2, 6), 24, 0.45),
    Stage(900, 64, (4, 12), 62, 0.1),
    Stage(300, 32, (8, 32), 62, 0.06),
    Stage(250, 16, (8, 96), 62, 0.0),
)
SIZES, CONTEXTS = (8, 16, 32, 64, 96), 16
QUERIES = 16
IGNORED = -100

TASK = TASKS["kv_retrieval"]
TOKENIZER = TASK.build_tokenizer()


def tokens(text: str) -> list[int]:
    return TOKENIZER(text, add_special_tokens=False)["input_ids"]


def training_rows(rows: IterableDataset) -> Iterator[dict[str, list[int]]]:
    """A context and then its questions with their answers, one behind the other; the answers are what is learned."""
    for row in rows:
        ids = tokens("".join(row["context"]))
        labels = [IGNORED] * len(ids)
        for query, target in zip(row["queries"], row["targets"], strict=True):
            asked, answer = tokens(query), tokens(target)
            ids, labels = [*ids, *asked, *answer], [*labels, *[IGNORED] * len(asked), *answer]
        yield {"input_ids": ids, "labels": labels}


@torch.no_grad()
def exact_match(model: PreTrainedModel, arguments: Mapping[str, Any]) -> float:
    """The share of generated answers that are right, each question alone behind its context."""
    right = []
    for row in TASK.load("test", num_contexts=CONTEXTS, **arguments):
        context = "".join(row["context"])
        prompts = torch.tensor([tokens(context + query) for query in row["queries"]])  # of one length
        made = model.generate(prompts, attention_mask=torch.ones_like(prompts), max_new_tokens=4, do_sample=False)
        answers = made[:, prompts.shape[1] :].tolist()
        right += [answer == tokens(target) for answer, target in zip(answers, row["targets"], strict=True)]
    return sum(right) / len(right)


class StopBelow(TrainerCallback):
    """Stop once the logged training loss is below a bound."""

    def __init__(self, enough: float) -> None:
        self.enough = enough

    def on_log(self, args: Any, state: Any, control: TrainerControl, logs: dict[str, Any], **kwargs: Any) -> None:
        if logs.get("loss", self.enough) < self.enough:
            control.should_training_stop = True


def train(model: PreTrainedModel, arguments: dict[str, Any]) -> list[int]:
    """One Trainer for each stage, with one optimiser for all; the last anneals. Returns the steps of each."""
    matrices = [weight for weight in model.model.layers.parameters() if weight.dim() == 2]
    others = [weight for weight in model.parameters() if not any(weight is matrix for matrix in matrices)]
    optimizer = JoinedOptimizer(
        [
            Muon(matrices, MUON_LEARNING_RATE, weight_decay=0.0),
            AdamW(others, LEARNING_RATE, BETAS, weight_decay=0.0),
        ]
    )
    taken = []
    for index, stage in enumerate(STAGES):
        drawn = arguments | {
            "num_contexts": stage.steps * stage.contexts,
            "num_pairs": list(stage.pairs),
            "num_symbols": stage.symbols,
            "queries_per_context": QUERIES,
            "seed": index,
        }
        training = TrainingArguments(
            output_dir="runs/full_context",
            max_steps=stage.steps,
            per_device_train_batch_size=stage.contexts,
            lr_scheduler_type="cosine" if stage is STAGES[-1] else "constant_with_warmup",
            warmup_steps=20,
            logging_steps=25,
            bf16=True,
            use_cpu=True,
            save_strategy="no",
            report_to="none",
            remove_unused_columns=False,
        )
        trainer = Trainer(
            model,
            training,
            train_dataset=IterableDataset.from_generator(
                training_rows, gen_kwargs={"rows": TASK.stream("train", **drawn)}
            ),
            data_collator=DataCollatorForSeq2Seq(TOKENIZER),
            optimizers=(optimizer, None),
            callbacks=[StopBelow(stage.enough)],
        )
        trainer.train()
        taken.append(trainer.state.global_step)
    return taken


def main() -> None:
    """Train, answer, and keep the figures."""
    torch.set_num_threads(1)
    set_seed(0)
    arguments = load_recipe(RECIPE, ["output_dir=runs/full_context"]).arguments
    special = {"pad_token_id": TOKENIZER.pad_token_id, "eos_token_id": TOKENIZER.eos_token_id}
    config = AutoConfig.for_model(vocab_size=len(TOKENIZER), **special, **arguments.base_config)
    model = AutoModelForCausalLM.from_config(config)
    taken = train(model, arguments.task_arguments)
    model.eval()
    drawn = arguments.task_arguments | {"queries_per_context": 32, "seed": arguments.eval_sets["n8"]["seed"]}
    found = {str(pairs): exact_match(model, drawn | {"num_pairs": pairs}) for pairs in SIZES}
    record = {"steps": taken, "exact_match": found}
    RESULTS.write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
