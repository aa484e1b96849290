"""The model card of a training run: filled while it runs, written whenever Trainer would write its own."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer
from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from ..checkpoint.adapter import save_remote_code
from ..checkpoint.run_facts import CardFacts, may_be_shown, trainer_results
from ..hub.cards import local_id, write_card
from ..modeling_gradmem import GradMemForCausalLM
from .callbacks import model_within
from .loss import check_loss_is_the_models
from .memories import WrittenRows
from .optimizer import JoinedOptimizer


class ModelCardCallback(TrainerCallback):
    """Keeps `card_facts` of the model true while it trains: how it is trained, and what the last evaluation measured.

    Every save then writes them into the card. See [`fill_model_card`].

    Args:
        sets: the task arguments of each evaluation set by its name, where there are several.
        task: name of the task or data set.
        recipe: the recipe as YAML.
        example: a context and a query, for the card's code.
        trained_on: what a batch is made of.
    """

    def __init__(
        self,
        sets: Mapping[str, Mapping[str, Any]] | None = None,
        task: str | None = None,
        recipe: str | None = None,
        example: tuple[str | list[str], str] | None = None,
        trained_on: str = "contexts",
    ) -> None:
        self.sets, self.task, self.recipe, self.example = sets or {}, task, recipe, example
        self._trained_on = trained_on
        self._metrics: dict[str, Any] = {}
        self._model: GradMemForCausalLM | None = None

    def on_train_begin(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        model: nn.Module | None = None,
        **kwargs: Any,
    ) -> None:
        self._model = model_within(model)
        self._fill(self._model, args, state, kwargs.get("optimizer"))

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        self._facts.training["outer steps"] = state.global_step

    def on_evaluate(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        model: nn.Module | None = None,
        metrics: Mapping[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        if self._model is None:  # evaluated without having trained: of a training nothing is known
            self._model = model_within(model)
            self._model.card_facts = self._model.card_facts or CardFacts(example=self.example)
        self._metrics |= metrics or {}
        self._facts.results = trainer_results(self._metrics, self.sets, self.task)

    def on_push_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """A push from within training takes the model's files from a checkpoint, and these from `output_dir`."""
        if self._model is not None and state.is_world_process_zero:
            directory = str(args.output_dir)
            save_remote_code(directory)
            write_card(self._model.model_card(local_id(directory)), directory)

    @property
    def _facts(self) -> CardFacts:
        """Those of the model in training."""
        assert self._model is not None
        assert self._model.card_facts is not None
        return self._model.card_facts

    def _fill(
        self, model: GradMemForCausalLM, args: TrainingArguments, state: TrainerState, optimizer: Optimizer | None
    ) -> None:
        trained = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
        precision = "bfloat16" if args.bf16 else "float16" if args.fp16 else str(model.dtype).split(".")[-1]
        schedule = getattr(args.lr_scheduler_type, "value", args.lr_scheduler_type)
        in_step = args.train_batch_size * args.world_size * args.gradient_accumulation_steps
        facts = {
            "task": self.task,
            "outer steps": state.global_step,
            f"{self._trained_on} in each step": in_step,
            "trained parameters": f"{trained:,} of {model.num_parameters():,}",
            "optimizer": optimizers_of(args, optimizer),
            "learning rate": f"{args.learning_rate:g} ({schedule})",
            "precision": precision,
            "seed": args.seed,
            "hardware": hardware(args.world_size, args.device),
        }
        model.card_facts = CardFacts(
            training={name: value for name, value in facts.items() if value is not None},
            recipe=self.recipe,
            example=self.example,
        )


def fill_model_card(
    trainer: Trainer,
    task: str | None = None,
    recipe: str | None = None,
    set_arguments: Mapping[str, Mapping[str, Any]] | None = None,
) -> ModelCardCallback:
    """Give a trainer the callback that fills the card, and have it write this card where it would write its own.

    `Trainer` has no other way to be told: it writes its draft over the README.md that the model was saved with.

    Args:
        trainer: of a [`GradMemForCausalLM`].
        task: name of the task or data set.
        recipe: the recipe as YAML.
        set_arguments: the task arguments of each evaluation set by its name. They say where its rows came from; without
            them the card claims results on no data set but one that the task generates, and shows no other row.

    Returns:
        The callback, which the trainer has.

    Raises:
        ValueError: `label_smoothing_factor` is set, which goes past the model's loss.
    """
    check_loss_is_the_models(trainer.args)
    sets = trainer.eval_dataset if isinstance(trainer.eval_dataset, dict) else {}
    given = set_arguments or {}
    arguments = {name: given.get(name, {}) for name in sets}
    # The rows of a local file are not to be shown to everybody.
    shown = [rows for name, rows in sets.items() if may_be_shown(task, arguments[name])]
    if not sets and all(may_be_shown(task, each) for each in list(given.values()) or [{}]):  # one set without a name
        shown = [trainer.eval_dataset]
    trained_on = "questions" if isinstance(trainer.train_dataset, WrittenRows) else "contexts"
    callback = ModelCardCallback(arguments, task, recipe, _example(shown), trained_on)
    trainer.add_callback(callback)

    def create_model_card(
        language: str | None = None,
        license: str | None = None,
        tags: str | list[str] | None = None,
        model_name: str | None = None,
        dataset_tags: str | list[str] | None = None,
        **known: Any,  # Trainer's other arguments say what the configuration says: the base and the task
    ) -> None:
        if not trainer.is_world_process_zero():
            return
        model = trainer.accelerator.unwrap_model(trainer.model)
        model.card_facts = model.card_facts or CardFacts()
        given = {"language": language, "license": license, "model_name": model_name, "datasets": dataset_tags}
        model.card_facts.metadata |= {name: value for name, value in given.items() if value is not None}
        directory = str(trainer.args.output_dir)
        repo_id = getattr(trainer, "hub_model_id", None) or local_id(directory)
        write_card(model.model_card(repo_id, tags=[tags] if isinstance(tags, str) else tags), directory)

    trainer.create_model_card = create_model_card  # type: ignore[method-assign, assignment]
    return callback


def optimizers_of(args: TrainingArguments, optimizer: Optimizer | None) -> str:
    """Trainer's own by its name there, then what else steps, with its rate."""
    optimizer = getattr(optimizer, "optimizer", optimizer)  # without Accelerate's wrapper
    others = optimizer.parts[1:] if isinstance(optimizer, JoinedOptimizer) else []
    names = [f"{type(part).__name__} ({part.defaults['lr']:g}) for the base's matrices" for part in others]
    return ", ".join([str(getattr(args.optim, "value", args.optim)), *names])


def hardware(num_processes: int, device: torch.device) -> str:
    """What a run of so many processes on this kind of device computes on."""
    if device.type == "cuda":
        return f"{num_processes} × {torch.cuda.get_device_name(device)}"
    if device.type != "cpu":
        return f"{num_processes} × {device.type}"
    threads = torch.get_num_threads()
    return f"{num_processes} × CPU, {threads} thread{'s' * (threads != 1)} each"


def _example(sets: Sequence[Any]) -> tuple[str | list[str], str] | None:
    """A context, of many segments the first ones, and its query, if the rows are those of a task."""
    for rows in sets:
        if {"context", "queries"} <= set(getattr(rows, "column_names", None) or ()) and len(rows):
            row = rows[0]
            if row["queries"] and row["queries"][0]:
                context = row["context"]
                return context if isinstance(context, str) else context[:8], row["queries"][0]
    return None
