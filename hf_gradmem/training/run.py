"""Training from a recipe with the stock `transformers.Trainer`."""

import fnmatch
import itertools
import json
import math
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
import yaml
from datasets import Dataset, Features, IterableDataset, Value
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    PreTrainedTokenizerBase,
    PrinterCallback,
    Trainer,
    TrainerState,
    TrainingArguments,
    set_seed,
)
from transformers.trainer import TRAINER_STATE_NAME

from ..base.lora import train_beside_base
from ..base.precision import FASTEST, fastest_dtype
from ..checkpoint.adapter import Adapter
from ..checkpoint.base_model import adapter_dtype, check_attachable
from ..checkpoint.run_facts import (
    RESULTS_FILE,
    arguments_of_set,
    published_recipe,
    set_arguments,
)
from ..checkpoint.tokenizer import open_tokenizer
from ..checkpoint.whole_save import check_apart
from ..commands.packaged import HUB_NAME, find_demo_model, needs_copy, packaged_adapter
from ..files import check_directory, save_text
from ..modeling_gradmem import GradMemForCausalLM, get_gradmem_model
from ..tasks import columns_of, get_task, load_set, load_task
from ..tasks.collator import DataCollatorForGradMem
from .callbacks import DivergenceCallback, diverged_at, log_writes
from .card import fill_model_card
from .checkpoints import check_pushed, check_recipe, keep_recipe, last_checkpoint
from .memories import DrawnEachEpoch, WrittenRows, check_rows, train_reading_alone, written_rows
from .metrics import TeacherForcedExactMatch, count_anew, most_likely_tokens
from .new_base import new_base
from .optimizer import build_optimizer
from .recipe import TRAINING_SET, Recipe, RecipeArguments
from .stages import Stage
from .start import Start, begin_with_start


def run_training(recipe: Recipe, *, trust_remote_code: bool = False, show_progress: bool = True) -> dict[str, Any]:
    """Train a memory as the recipe says, going on from the last checkpoint in its `output_dir` if there is one.

    Args:
        recipe: of [`~hf_gradmem.training.recipe.load_recipe`].
        trust_remote_code: whether code of the base's repository may be run.
        show_progress: have Trainer print its log and show progress bars, unless the recipe's `disable_tqdm` is set.

    Returns:
        Steps, seconds, and the metrics of each evaluation set after the last step, as `results.json` holds them.

    Raises:
        FloatingPointError: training diverged.
        OSError: `output_dir` cannot be written to.
        ValueError: the recipe does not fit its task or base, or `output_dir` holds a run of another recipe, or
            the base.
    """
    output = Path(str(recipe.training.output_dir))
    check_directory(output)
    check_apart(recipe.arguments.base_model, output)
    check_pushed(recipe, output)
    check_recipe(recipe, output)
    if not show_progress:
        recipe.training.disable_tqdm = True
    trainer = build_trainer(recipe, trust_remote_code=trust_remote_code)
    if not show_progress:
        trainer.remove_callback(PrinterCallback)  # which stands in for the bars
    keep_recipe(recipe, output)
    _train(trainer, last_checkpoint(output))
    trainer.save_model()
    trainer.save_state()
    results: dict[str, Any] = {"steps": trainer.state.global_step, "seed": recipe.training.seed}
    if recipe.arguments.eval_sets:
        results["metrics"] = trainer.evaluate()
        if not all(math.isfinite(value) for value in results["metrics"].values()):
            raise diverged_at(trainer.state.global_step)
    if trainer.is_world_process_zero():
        save_text(json.dumps(results, indent=2) + "\n", output / RESULTS_FILE)
    if recipe.training.push_to_hub:
        trainer.push_to_hub()
    else:
        trainer.create_model_card()
    return results


def _train(trainer: Trainer, checkpoint: str | None) -> None:
    """Train from a checkpoint on; one of the last step is what training would leave, and is taken as it is.

    Raises:
        ValueError: the checkpoint has the model alone.
    """
    state = TrainerState() if checkpoint is None else TrainerState.load_from_json(f"{checkpoint}/{TRAINER_STATE_NAME}")
    if checkpoint is None or state.global_step < trainer.args.max_steps:
        if checkpoint is not None and trainer.args.save_only_model:
            raise ValueError(
                f"{checkpoint} was saved with save_only_model: without optimizer and schedule a run does not go on as "
                "it would have. Remove its checkpoints to begin anew, and leave save_only_model out of the recipe."
            )
        trainer.train(resume_from_checkpoint=checkpoint)
        return
    state.is_local_process_zero, state.is_world_process_zero = (
        trainer.is_local_process_zero(),
        trainer.is_world_process_zero(),
    )
    trainer.state, best = state, state.best_model_checkpoint
    wanted = best if trainer.args.load_best_model_at_end and best is not None and Path(best).is_dir() else checkpoint
    # What Trainer itself loads a checkpoint by: its `train` would take one step more before it sees that it is done.
    trainer._load_from_checkpoint(wanted)
    handler = trainer.callback_handler
    trainer.control = handler.on_train_begin(trainer.args, state, trainer.control)
    trainer.control = handler.on_train_end(trainer.args, state, trainer.control)


def build_trainer(recipe: Recipe, *, trust_remote_code: bool = False) -> Trainer:
    """The `Trainer` of a recipe, ready to train; `trust_remote_code` as in [`run_training`]."""
    arguments, training = recipe.arguments, recipe.training
    set_seed(training.seed)
    model = build_model(arguments, trust_remote_code, training.device)
    tokenizer = model.tokenizer
    model.to(training.device)  # type: ignore[arg-type] # Transformers wraps it, and its types are lost
    train_rows, eval_sets = training_data(arguments, training, model)
    _freeze(model, arguments)
    metric = TeacherForcedExactMatch()
    trainer = Trainer(
        model=model,
        args=training,
        data_collator=DataCollatorForGradMem(
            tokenizer,
            max_context_length=arguments.max_context_length,
            max_query_length=arguments.max_query_length,
            queries_per_context=arguments.queries_per_context,
            padding=_padding(arguments, training.world_size),
            template=model.config.template,
            keep_contexts=model.config.distillation_loss_weight != 0,
            **model.writer.cutting,
        ),
        train_dataset=train_rows,
        eval_dataset=eval_sets or None,
        processing_class=tokenizer,
        compute_metrics=metric,
        preprocess_logits_for_metrics=most_likely_tokens,
        optimizers=(
            build_optimizer(model, training, arguments.step_size_learning_rate, arguments.muon_learning_rate),
            None,
        ),
    )
    count_anew(trainer, metric)
    log_writes(trainer)
    trainer.add_callback(DivergenceCallback())
    if isinstance(train_rows, WrittenRows):
        trainer.add_callback(DrawnEachEpoch(train_rows))
    text = published_recipe(yaml.safe_dump(recipe.values, sort_keys=False))
    fill_model_card(trainer, arguments.task, text.strip(), set_arguments(recipe.values))
    return trainer


def _freeze(model: GradMemForCausalLM, arguments: RecipeArguments) -> None:
    """Leave as they are the parameters that the recipe names and, where no question is asked, what READ has of its own.

    Raises:
        ValueError: a name is none of the model's, or nothing is left to train.
    """
    named = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    kept = list(model.read_phase.extra_tensors().values()) if arguments.queries_per_context == 0 else []
    for pattern in arguments.frozen:
        matching = fnmatch.filter(named, pattern)
        if not matching:
            raise ValueError(
                f"frozen names {pattern!r}, and no parameter that trains is called so. They are {', '.join(named)}."
            )
        kept += [named[name] for name in matching]
    for parameter in kept:
        parameter.requires_grad_(False)
    if arguments.step_size_learning_rate is not None and model.write_log_learning_rate is None:
        raise ValueError(
            f"step_size_learning_rate would do nothing, got {arguments.step_size_learning_rate}: no step size is "
            "learned. Leave it out, or give gradmem a learn_write_learning_rate."
        )
    if not any(parameter.requires_grad for parameter in named.values()):
        raise ValueError(
            f"Nothing is left to train: frozen is {arguments.frozen}, and queries_per_context "
            f"{arguments.queries_per_context}, which with 0 leaves READ as it is."
        )


def _padding(arguments: RecipeArguments, world_size: int) -> Literal["longest", "queries"]:
    """How batches are padded: processes that evaluate together join their answers, if any, which then have one shape.

    Raises:
        ValueError: the recipe does not say which.
    """
    if world_size == 1 or not arguments.eval_sets or arguments.queries_per_context == 0:
        return "longest"
    if arguments.max_query_length is None or arguments.queries_per_context is None:
        raise ValueError(
            f"{world_size} processes evaluate in batches of one shape: give the recipe max_query_length and "
            "queries_per_context, or no eval_sets."
        )
    return "queries"


def training_data(
    arguments: RecipeArguments, training: TrainingArguments, model: GradMemForCausalLM
) -> tuple[Any, dict[str, Any]]:
    """The rows to train on, and the evaluation sets.

    A recipe's start is learned first, and where it trains on memories, those that are missing are written.
    """
    eval_sets = {
        name: load_set(arguments.task, {"split": "validation"} | arguments_of_set(arguments.task_arguments, given))
        for name, given in arguments.eval_sets.items()
    }
    options: dict[str, Any] = {
        "batch_size": training.per_device_eval_batch_size,
        "show_progress": not training.disable_tqdm and training.process_index == 0,
    }
    if arguments.start is None and arguments.memories is None:
        return training_stream(arguments, training, model.writer.write_steps), eval_sets
    rows = load_task(arguments.task, **{"split": "train"} | arguments.task_arguments)
    sets = {TRAINING_SET: rows, **eval_sets}
    if arguments.memories is not None:
        for name, of_set in sets.items():
            limits = arguments.max_query_length, arguments.max_context_length
            check_rows(model, of_set, name, arguments.distractors, *limits)
    if arguments.start is not None:
        cut = {"max_context_length": arguments.max_context_length}
        begin_with_start(model, rows, Start.of(arguments.start), str(training.output_dir), **cut, **options)
    if arguments.memories is None:
        return training_stream(arguments, training, model.writer.write_steps), eval_sets
    train_reading_alone(model)
    folder = Path(arguments.memories)
    options |= {"source_name": arguments.task, "distractors": arguments.distractors}
    written = {name: written_rows(model, of_set, folder / name, **options) for name, of_set in sets.items()}
    return written.pop(TRAINING_SET), written


def build_model(
    arguments: RecipeArguments, trust_remote_code: bool = False, device: torch.device | None = None
) -> GradMemForCausalLM:
    """The base, loaded or built with random weights, with its memory; or an adapter to go on training.

    Args:
        device: where it will run, for `base_dtype: fastest`; this machine's accelerator by default, if there is one.
    """
    arguments = _at_hand(arguments)
    dtype = _base_dtype(arguments, trust_remote_code, device)
    load: dict[str, Any] = {"dtype": dtype, "trust_remote_code": trust_remote_code}
    changes = arguments.gradmem | {"confidence": None}  # which was fitted on answers of before
    if arguments.base_model is not None:
        base_model = AutoModelForCausalLM.from_pretrained(arguments.base_model, **load)
        own = None
        if arguments.adapter is not None:
            adapter = Adapter.open(arguments.adapter, options=changes)
            check_attachable(adapter.config, base_model, arguments.adapter)
            model, own = adapter.attach(GradMemForCausalLM, base_model), adapter.tokenizer
        else:
            model = get_gradmem_model(base_model, arguments.config)
        model.tokenizer = own or open_tokenizer(arguments.base_model, trust_remote_code=trust_remote_code)
    elif arguments.adapter is not None:
        model = GradMemForCausalLM.from_pretrained(arguments.adapter, **load, **changes)
    else:
        tokenizer = _task_tokenizer(arguments)
        model = get_gradmem_model(new_base(arguments.base_config or {}, tokenizer, dtype), arguments.config, tokenizer)
    train_beside_base(model, base_trains=arguments.train_base)
    return model


def _at_hand(arguments: RecipeArguments) -> RecipeArguments:
    """With the folder of an adapter of the package in place of its name, and the demo's copy of its base."""
    if arguments.adapter is None:
        return arguments
    adapter = str(packaged_adapter(arguments.adapter) or os.path.expanduser(arguments.adapter))
    base = arguments.base_model
    if base is None and os.path.isdir(adapter):
        copied = needs_copy(adapter, Adapter.open(adapter).config)
        base = find_demo_model() if copied else None
    # The Hub's own is loaded by the adapter, which names its commit.
    return replace(arguments, adapter=adapter, base_model=None if base == HUB_NAME else base)


def _base_dtype(arguments: RecipeArguments, trust_remote_code: bool, device: torch.device | None) -> torch.dtype | str:
    """The precision to load the base in."""
    if arguments.base_dtype is None:
        return "auto"
    if arguments.base_dtype != FASTEST:
        return getattr(torch, arguments.base_dtype)
    name = arguments.base_model
    if name is None and arguments.adapter is not None:
        return adapter_dtype(Adapter.open(arguments.adapter, trust_remote_code=trust_remote_code).config, device)
    if name is None:  # built from nothing
        return "auto"
    return fastest_dtype(AutoConfig.from_pretrained(name, trust_remote_code=trust_remote_code), device)


def _task_tokenizer(arguments: RecipeArguments) -> PreTrainedTokenizerBase:
    build = get_task(arguments.task).build_tokenizer
    if build is None:
        raise ValueError(f"The task {arguments.task!r} has no tokenizer of its own. Name a base_model.")
    return build(_known_rows(arguments))


def _known_rows(arguments: RecipeArguments) -> Iterator[Mapping[str, Any]]:
    """The rows whose words a new base is to know: those of all stages and evaluation sets, loaded as they are read.

    Of files all rows (their `"test"` part), as `hf-gradmem evaluate` may ask of them later.
    """
    given = [arguments.task_arguments | stage.task_arguments for stage in arguments.curriculum]
    given += [arguments_of_set(arguments.task_arguments, of_set) for of_set in arguments.eval_sets.values()]
    for part in given:
        yield from load_set(arguments.task, {"split": "validation" if "task" in part else "test"} | part)


def training_stream(arguments: RecipeArguments, training: TrainingArguments, write_steps: int) -> IterableDataset:
    """The rows of all stages in order, exactly as many as the stages' steps take.

    `write_steps` is what a stage that names none takes.

    The stream has one shard: every process reads it whole and takes its part of each batch, so the batches do not
    depend on the number of processes.
    """
    per_step = training.train_batch_size * training.world_size * training.gradient_accumulation_steps
    curriculum = arguments.curriculum
    ends = list(itertools.accumulate(stage.steps * per_step for stage in curriculum))
    stages = tuple(
        (load_stage(arguments, stage, range(*part)), stage.steps, stage.drawn_write_steps(write_steps))
        for stage, part in zip(curriculum, itertools.pairwise([0, *ends]), strict=True)
    )
    columns = columns_of(*(rows for rows, *_ in stages))
    return IterableDataset.from_generator(
        _rows_of_stages,
        features=Features({**columns, "write_steps": Value("int64")}),
        gen_kwargs={
            "columns": tuple(columns),
            "stages": stages,
            "per_step": per_step,
            "seed": training.seed if training.data_seed is None else training.data_seed,
        },
    )


def load_stage(arguments: RecipeArguments, stage: Stage, contexts: range) -> Dataset | IterableDataset:
    """The rows of a stage: generated, or the file's, which are repeated in a new order as long as it takes.

    `contexts` are those of a task's stream that no stage before has taken; a recipe's own `num_contexts` are repeated.
    """
    given: dict[str, Any] = {"split": "train"} | arguments.task_arguments | stage.task_arguments
    if get_task(arguments.task).stream is None:
        return load_task(arguments.task, **given)
    if "num_contexts" not in given:
        if "first" in given:
            raise ValueError(
                f"first={given['first']} would do nothing: each stage goes on in the stream where the one before left "
                "it. Give num_contexts beside it, which are then repeated, or another seed."
            )
        given |= {"num_contexts": len(contexts), "first": contexts.start}
    return load_task(arguments.task, streaming=True, **given)


def _rows_of_stages(
    columns: Sequence[str],
    stages: tuple[tuple[Dataset | IterableDataset, int, list[int]], ...],
    per_step: int,
    seed: int,
) -> Iterator[dict[str, Any]]:
    orders = itertools.count(seed)
    for index, (rows, steps, write_steps) in enumerate(stages):
        drawn = np.random.default_rng([seed, index]).choice(write_steps, size=steps)
        repeated = _repeated(rows, orders)
        for step in range(steps):
            for row in itertools.islice(repeated, per_step):
                yield {name: row.get(name) for name in columns} | {"write_steps": int(drawn[step])}


def _repeated(rows: Dataset | IterableDataset, orders: Iterator[int]) -> Iterator[dict[str, Any]]:
    """The rows without end: a file's in a new order each time, of the next seed, whichever stage asks for it."""
    for order in orders:
        yield from rows if isinstance(rows, IterableDataset) else rows.shuffle(seed=order)
