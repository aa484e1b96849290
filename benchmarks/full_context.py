"""The ceiling of a recipe that trains on memories: the same LoRA, as long, with the context in the prompt.

    python -m benchmarks.full_context model_cards/gradmem-smollm2-135m/recipe.yaml --output results.json

The base, the template, the rows, the LoRA, the optimiser's settings and the number of questions are the recipe's, whose
`--override`s it takes; only where the context stands differs. Answers are generated and scored as `hf-gradmem evaluate`
does, on the sets and the split that it would take.
"""

import argparse
from pathlib import Path
from typing import Any

from peft import LoraConfig, get_peft_model
from torch.utils.data import Dataset
from transformers import DataCollatorForSeq2Seq, Trainer

from hf_gradmem import GradMemConfig, get_gradmem_model
from hf_gradmem.evaluation import evaluate_rows
from hf_gradmem.evaluation.results import evaluation_sets, load_sets, save_results, task_metric
from hf_gradmem.tasks import load_task
from hf_gradmem.template import get_template, leading_tokens
from hf_gradmem.training.recipe import load_recipe
from hf_gradmem.training.run import build_model, last_checkpoint


class Prompts(Dataset):
    """A prompt with context and question, and the answer as its labels, for each question of the rows."""

    def __init__(self, rows: Any, tokenizer: Any, template: Any) -> None:
        words, start = get_template(template, tokenizer), leading_tokens(tokenizer)
        self.items = []
        for row in rows:
            context = "".join(row["context"])
            for query, target in zip(row["queries"], row["targets"], strict=True):
                prompt = start + tokenizer(words.in_prompt(context, query), add_special_tokens=False).input_ids
                answer = tokenizer(words.target(target), add_special_tokens=False).input_ids
                answer = [*answer, tokenizer.eos_token_id]
                self.items.append({"input_ids": prompt + answer, "labels": [-100] * len(prompt) + answer})

    def __len__(self) -> int:
        return len(self.items)

    def __getitem__(self, index: int) -> dict[str, list[int]]:
        return self.items[index]


def main() -> None:
    """Train and measure."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("recipe", type=Path)
    parser.add_argument("--override", action="append", default=[])
    parser.add_argument("--split", default="test")
    parser.add_argument("--output", type=Path, required=True)
    given = parser.parse_args()
    recipe = load_recipe(given.recipe, given.override)
    arguments, training = recipe.arguments, recipe.training
    training.output_dir = f"{training.output_dir}-full-context"
    training.eval_strategy, training.remove_unused_columns, training.batch_eval_metrics = "no", True, False
    config = arguments.config
    if config.read_lora is None:
        raise ValueError("The recipe has no read_lora to train with the context in the prompt.")
    plain = {"num_memory_tokens": 1, "template": config.template}
    arguments.gradmem, arguments.memories = plain, None
    model = build_model(arguments)
    tokenizer = model.tokenizer
    adapted = get_peft_model(model.base_model, LoraConfig(**config.read_lora, task_type="CAUSAL_LM"))
    rows = load_task(arguments.task, **{"split": "train"} | arguments.task_arguments)
    trainer = Trainer(
        model=adapted,
        args=training,
        train_dataset=Prompts(rows, tokenizer, config.template),
        data_collator=DataCollatorForSeq2Seq(tokenizer, padding=True),
    )
    trainer.train(resume_from_checkpoint=last_checkpoint(str(training.output_dir)))
    reader = get_gradmem_model(adapted.merge_and_unload(), GradMemConfig(**plain), tokenizer=tokenizer)
    sets = evaluation_sets(arguments.eval_sets, arguments.task_arguments)
    records = []
    for name, set_rows in load_sets(arguments.task, sets, given.split).items():
        measured = evaluate_rows(
            reader, set_rows, [], task_metric(arguments.task), baselines=["prompt", "none"], batch_size=16
        )
        records += [{"model": "full context, LoRA", "set": name, "arguments": sets[name]} | each for each in measured]
        save_results({"task": arguments.task, "split": given.split, "results": records}, given.output)


if __name__ == "__main__":
    main()
