"""What READ can make of a text by how it is given: the same base, LoRA, questions and outer steps for each.

    python -m benchmarks.readers                  # every arm that has no result yet
    python -m benchmarks.readers full_context     # this one

A LoRA of SmolLM2-135M-Instruct, frozen, is trained on the questions of `readers.yaml` to answer from memories that
gradient descent wrote, from what a forward pass left at the memory's positions, from mean embeddings, or with the
context in the prompt. Answers to questions on unseen articles and people are generated and scored as
`hf-gradmem evaluate` does. Beside each memory stands another context's: what the reader guesses. Results go to
`benchmarks/results/readers/<arm>.json`, the table to `benchmarks/results/readers.md`. A run that was interrupted goes
on from its memories and its last checkpoint in `runs/`.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from rich.console import Console
from torch.utils.data import Dataset
from transformers import DataCollatorForSeq2Seq, Trainer

from hf_gradmem import GradMemConfig, GradMemForCausalLM, get_gradmem_model
from hf_gradmem.commands.packaged import find_demo_model
from hf_gradmem.evaluation import evaluate_rows
from hf_gradmem.evaluation.readers import OTHER, prompt_tokens
from hf_gradmem.evaluation.results import evaluation_sets, load_sets, metrics_of_sets
from hf_gradmem.tasks import load_task
from hf_gradmem.template import get_template
from hf_gradmem.training.checkpoints import last_checkpoint
from hf_gradmem.training.memories import WrittenRows, written_rows
from hf_gradmem.training.recipe import Recipe, load_recipe
from hf_gradmem.training.run import build_model, build_trainer

from .arms import run_chosen, save_table

ROOT = Path(__file__).parent
RECIPE, RESULTS, TABLE = ROOT / "readers.yaml", ROOT / "results" / "readers", ROOT / "results" / "readers.md"
COMMON = load_recipe(RECIPE).arguments
VALUES = {
    "num_memory_tokens": 16,
    "memory_form": {"name": "key_values", "write": "values"},
    "write_optimizer": "adam",
    "write_betas": [0.5, 0.9],
    "meta_gradient": "first_order",
    "write_steps": 8,
    "write_learning_rate": 0.234,
    "write_relative_step_size": True,
    "write_step_decay": 0.86,
}
VECTORS = {"num_memory_tokens": 16}
ATTENTION = ["q_proj", "k_proj", "v_proj", "o_proj"]
# A quarter of the texts, asked so often that a reader overfits them.
FEW = {
    "task_arguments.parts": [
        {**part, "num_contexts": part["num_contexts"] // 4} for part in COMMON.task_arguments["parts"]
    ],
    "stages": [{"steps": 160}],
}
# What benchmarks/self_study.py writes.
SELF_STUDY_ROWS = Path("runs") / "readers" / "self_study.jsonl"
SELF_STUDY = {"task": "jsonl", "task_arguments": {"path": {"train": str(SELF_STUDY_ROWS)}}, "stages": FEW["stages"]}
DISTILLED = {"gradmem.distillation_loss_weight": 1.0}
TAUGHT = "runs/readers/full_context/base"


@dataclass(frozen=True)
class Arm:
    """What one arm has of its own.

    Attributes:
        title: of its row.
        memory: options of what it reads; `None` for the context in the prompt.
        changes: of the recipe.
        written_by: the arm that wrote the memories it is trained on; itself by default.
        other_steps: with which the texts are written as well, and one of the memories of a text is drawn each time.
    """

    title: str
    memory: Mapping[str, Any] | None = None
    changes: Mapping[str, Any] = field(default_factory=dict)
    written_by: str = ""
    other_steps: Sequence[int] = ()


def _lora(**arguments: Any) -> dict[str, Any]:
    return {f"gradmem.read_lora.{name}": value for name, value in arguments.items()}


ARMS = {
    "pooled": Arm("16 mean embeddings", VECTORS | {"writer": "pooled"}),
    "forward": Arm(
        "16 vectors read back from behind the context (RMT)", VECTORS | {"writer": "forward", "write_steps": 1}
    ),
    "full_context": Arm("the context in the prompt"),
    "values": Arm("written: 16 positions of values, 8 steps", VALUES),
    "few": Arm("a quarter of the texts, 160 steps", VALUES, FEW),
    "rank_2": Arm("… with a LoRA of rank 2", VALUES, FEW | _lora(r=2, lora_alpha=4), "few"),
    "rank_32": Arm("… of rank 32", VALUES, FEW | _lora(r=32, lora_alpha=64), "few"),
    "attention": Arm(
        "… of rank 8 on the attention's layers alone", VALUES, FEW | _lora(target_modules=ATTENTION), "few"
    ),
    "few_free": Arm(
        "… without dropout and weight decay", VALUES, FEW | _lora(lora_dropout=0.0) | {"weight_decay": 0.0}, "few"
    ),
    "few_held": Arm(
        "… dropout .2, weight decay .1", VALUES, FEW | _lora(lora_dropout=0.2) | {"weight_decay": 0.1}, "few"
    ),
    "few_writes": Arm("… each text written with 4 steps as well, one of both drawn", VALUES, FEW, "few", (4,)),
    "few_self_study": Arm("… with further questions by the base (`benchmarks.self_study`)", VALUES, SELF_STUDY),
    "few_distilled": Arm("… `distillation_loss_weight` 1, the plain base teaches", VALUES, FEW | DISTILLED, "few"),
    "taught_alone": Arm("… the base has full_context's LoRA in it", VALUES, FEW | {"base_model": TAUGHT}),
    "taught": Arm(
        "… and teaches, `distillation_loss_weight` 1",
        VALUES,
        FEW | {"base_model": TAUGHT} | DISTILLED,
        "taught_alone",
    ),
}


def arm_recipe(name: str) -> Recipe:
    """The recipe that an arm is trained by. Its evaluation sets are answered afterwards, and not on the way."""
    arm, base = ARMS[name], find_demo_model(Console(stderr=True))
    changes = {"base_model": base, "output_dir": f"runs/readers/{name}", "eval_sets": {}, **arm.changes}
    if arm.memory is not None:
        changes |= {f"gradmem.{option}": value for option, value in arm.memory.items()}
        changes["memories"] = f"runs/readers/{arm.written_by or name}/memories"
    return load_recipe(RECIPE, [f"{key}={json.dumps(value)}" for key, value in changes.items()])


class Prompts(Dataset):
    """A prompt with context and question, and the answer as its labels, for each question of the rows."""

    def __init__(self, rows: Any, tokenizer: Any, template: Any) -> None:
        words = get_template(template, tokenizer)
        targets = [target for row in rows for target in row["targets"]]
        self.items = []
        for prompt, target in zip(prompt_tokens(rows, tokenizer, template), targets, strict=True):
            answer = [*tokenizer(words.target(target), add_special_tokens=False).input_ids, tokenizer.eos_token_id]
            self.items.append({"input_ids": prompt + answer, "labels": [-100] * len(prompt) + answer})

    def __len__(self) -> int:
        return len(self.items)

    def __getitem__(self, index: int) -> dict[str, list[int]]:
        return self.items[index]


class DrawnWrites(Dataset):
    """The questions on texts that were written several times, each with the memory of one of them, drawn anew."""

    column_names = WrittenRows.column_names

    def __init__(self, writes: Sequence[WrittenRows]) -> None:
        self.writes = writes

    def __len__(self) -> int:
        return len(self.writes[0])

    def __getitem__(self, index: int) -> dict[str, Any]:
        return self.writes[int(torch.randint(len(self.writes), ()))][index]


def written_again(trainer: Trainer, folder: Path, steps: Sequence[int]) -> DrawnWrites:
    """The rows of a trainer, whose texts are written with further numbers of steps into `folder`."""
    first, options = (
        trainer.train_dataset,
        {"batch_size": trainer.args.per_device_eval_batch_size, "source_name": COMMON.task},
    )
    further = (
        written_rows(trainer.model, first.rows, folder / f"steps_{count}", write_steps=count, **options)
        for count in steps
    )
    return DrawnWrites([first, *further])


def train_on_memories(recipe: Recipe, other_steps: Sequence[int]) -> GradMemForCausalLM:
    """READ's LoRA, trained as the recipe says."""
    trainer = build_trainer(recipe)
    if other_steps:
        trainer.train_dataset = written_again(trainer, Path(str(recipe.training.output_dir)), other_steps)
    trainer.train(resume_from_checkpoint=last_checkpoint(str(recipe.training.output_dir)))
    return trainer.model


def train_on_prompts(recipe: Recipe) -> GradMemForCausalLM:
    """The same LoRA, trained with the context in the prompt; it is part of the base that comes back."""
    arguments, training = recipe.arguments, recipe.training
    lora, template = arguments.config.read_lora, arguments.config.template
    plain = {"num_memory_tokens": 1, "template": template}
    arguments.gradmem = plain
    model = build_model(arguments)
    training.remove_unused_columns, training.batch_eval_metrics = True, False
    adapted = get_peft_model(model.base_model, LoraConfig(**lora, task_type="CAUSAL_LM"))
    rows = load_task(arguments.task, "train", **arguments.task_arguments)
    trainer = Trainer(
        model=adapted,
        args=training,
        train_dataset=Prompts(rows, model.tokenizer, template),
        data_collator=DataCollatorForSeq2Seq(model.tokenizer, padding=True),
    )
    trainer.train(resume_from_checkpoint=last_checkpoint(str(training.output_dir)))
    merged = adapted.merge_and_unload()
    for part in (merged, model.tokenizer):
        part.save_pretrained(Path(str(training.output_dir)) / "base")
    return get_gradmem_model(merged, GradMemConfig(**plain), tokenizer=model.tokenizer)


def run_arm(name: str) -> dict[str, Any]:
    """Train an arm, and answer the test sets."""
    arm, recipe = ARMS[name], arm_recipe(name)
    arguments = recipe.arguments
    sets = evaluation_sets(COMMON.eval_sets, COMMON.task_arguments)
    template = arguments.config.template
    model = train_on_prompts(recipe) if arm.memory is None else train_on_memories(recipe, arm.other_steps)
    model.eval()
    steps = [] if arm.memory is None else [model.writer.write_steps]
    # What a reader guesses is measured once for each kind of memory.
    baselines = ["prompt"] if arm.memory is None else [] if arm.written_by else [OTHER]
    records, metrics = {}, metrics_of_sets(COMMON.task, sets)
    for set_name, rows in load_sets(COMMON.task, sets, "test").items():
        records[set_name] = evaluate_rows(
            model, rows, steps, metrics[set_name], baselines=baselines, template=template, batch_size=8
        )
    return {"arm": arm.title, "arguments": sets, "records": records}


def write_table() -> None:
    """The table of all arms that have a result."""
    rows = []
    for name, arm in ARMS.items():
        path = RESULTS / f"{name}.json"
        if path.is_file():
            records = json.loads(path.read_text(encoding="utf-8"))["records"]
            cells = [" ".join(_cell(record) for record in records[of]) for of in ("short_squad", "facts")]
            rows.append(f"| {arm.title} | {' | '.join(cells)} |")
    save_table(
        TABLE,
        "One reader, by how it is given a text",
        "`python -m benchmarks.readers`: 100 outer steps of 16 questions for each arm (`readers.yaml`) unless its "
        "row says otherwise, SmolLM2-135M-Instruct frozen, READ's LoRA of rank 8 on all linear layers, dropout "
        ".05, weight decay .01, one seed. Exact match / F1 of generated answers, and nats a token of the right "
        "ones, on unseen articles (Short SQuAD, development half, 86 questions) and people (facts, 93); in "
        "brackets from another's memory. A row with … differs from the one above without in what it names alone, "
        "and reads the same memories but for ranks, places and teachers, whose memories have a start that was "
        "drawn apart. In bfloat16, the first two rows apart.",
        "| READ is given | Short SQuAD | facts |",
        rows,
    )


def _cell(record: dict[str, Any]) -> str:
    figures = f"{record['exact_match']:.3f} / {record['f1']:.3f} / {record['answer_loss']:.2f}"
    return f"({figures})" if record["context"] == OTHER else figures


if __name__ == "__main__":
    run_chosen(__doc__, ARMS, RESULTS, run_arm, write_table)
