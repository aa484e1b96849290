"""The ceiling of key-value retrieval: the same base, with all pairs before it in place of a memory.

    python -m benchmarks.full_context

A Llama of the paper's shape learns to answer questions behind a context, by the usual training of a decoder and with
the optimiser of `model_cards/gradmem-kv-96/recipe.yaml`: one pair at first, then up to 96. Then it answers contexts
that it was not trained on, one question at a time. Results go to `benchmarks/results/full_context.json`.

None are on record: from two to eight pairs at first, 470 steps did no better than any symbol of the context; from one,
1,590 steps found the second symbol of a value by its first, and no value by its key.
"""

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from datasets import IterableDataset, concatenate_datasets
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    DataCollatorForSeq2Seq,
    PreTrainedModel,
    Trainer,
    set_seed,
)

from hf_gradmem.tasks import TASKS
from hf_gradmem.training.recipe import load_recipe

RECIPE = Path(__file__).parents[1] / "model_cards" / "gradmem-kv-96" / "recipe.yaml"
RESULTS = Path(__file__).parent / "results" / "full_context.json"
STAGES: tuple[tuple[int, tuple[int, int]], ...] = (
    (200, (1, 1)),
    (300, (2, 6)),
    (800, (4, 16)),
    (700, (8, 96)),
)  # steps, pairs
SIZES, CONTEXTS = (8, 16, 32, 64, 96), 16
QUERIES = 32
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


def main() -> None:
    """Train, answer, and keep the figures."""
    torch.set_num_threads(1)
    recipe = load_recipe(RECIPE, ["output_dir=runs/full_context", "eval_strategy='no'", "save_strategy='no'"])
    training, arguments = recipe.training, recipe.arguments
    set_seed(training.seed)
    special = {"pad_token_id": TOKENIZER.pad_token_id, "eos_token_id": TOKENIZER.eos_token_id}
    config = AutoConfig.for_model(vocab_size=len(TOKENIZER), **special, **arguments.base_config)
    model = AutoModelForCausalLM.from_config(config)
    batch = training.per_device_train_batch_size
    drawn = arguments.task_arguments | {"queries_per_context": QUERIES}
    stages = []
    for index, (steps, pairs) in enumerate(STAGES):
        of_stage = drawn | {"num_pairs": list(pairs), "seed": index, "num_contexts": steps * batch}
        stages.append(
            IterableDataset.from_generator(training_rows, gen_kwargs={"rows": TASK.stream("train", **of_stage)})
        )
    training.max_steps = sum(steps for steps, _ in STAGES)
    training.remove_unused_columns = False
    Trainer(
        model, training, train_dataset=concatenate_datasets(stages), data_collator=DataCollatorForSeq2Seq(TOKENIZER)
    ).train()
    model.eval()
    drawn |= {"seed": arguments.eval_sets["n8"]["seed"]}
    found = {str(pairs): exact_match(model, drawn | {"num_pairs": pairs}) for pairs in SIZES}
    RESULTS.write_text(json.dumps({"steps": training.max_steps, "exact_match": found}, indent=1) + "\n")


if __name__ == "__main__":
    main()
