"""Recipes: everything that a training run is made of, as data."""

import os
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, get_args, get_type_hints

import torch
import yaml
from huggingface_hub.errors import StrictDataclassFieldValidationError
from transformers import HfArgumentParser, TrainingArguments
from transformers.trainer_utils import SaveStrategy, SchedulerType

from ..base.precision import FASTEST
from ..checkpoint.adapter import ADDABLE
from ..checkpoint.run_facts import file_name
from ..configuration_gradmem import GradMemConfig
from ..losses import LOSSES, weight_name
from ..tasks import get_task
from ..tasks.collator import check_limits
from .loss import check_loss_is_the_models
from .stages import Stage, checked_stages
from .start import Start
from .yaml_values import read_yaml

TRAINING_SET = "train"
"""The folder, in that of a recipe's memories, of those that it trains on."""


_NAMES: dict[Any, str] = {str: "text", list: "list", dict: "mapping of names to values"}
_NAMES[dict | None] = _NAMES[dict]
# What a file may hold in place of these is found out before anything looks into it.
_KINDS: dict[str, Any] = {
    "task": str,
    "task_arguments": dict,
    "eval_sets": dict,
    "stages": list,
    "frozen": list,
    "gradmem": dict,
    "base_config": dict | None,
    "start": dict | None,
}


# Options of Trainer that would do nothing in a recipe, and what does it.
_SET_OTHERWISE = {
    "num_train_epochs": "the steps of its stages say how long it trains",
    "auto_find_batch_size": "the stages are cut for per_device_train_batch_size: lower that, and raise "
    "gradient_accumulation_steps",
    "resume_from_checkpoint": "it goes on from the last checkpoint in output_dir by itself when it is started again",
}
# Options of Trainer that would do harm in a recipe: what is as good as leaving them out, and what they would do.
_REFUSED: dict[str, tuple[Any, str]] = {
    "dataloader_drop_last": (False, "leaves rows out, of evaluations as well"),
    "ignore_data_skip": (False, "begins the stages anew where a run goes on"),
    "train_sampling_strategy": ("random", "sorts rows by a length that they do not have yet"),
}
# Options that a trained adapter may be given anew: none of its parameters depends on them.
_CHANGEABLE = {
    "write_steps",
    "write_learning_rate",
    "write_betas",
    "write_prefix_segments",
    "write_sentence_segments",
    "write_prompt",
    "write_relative_step_size",
    "write_step_decay",
    "meta_gradient",
    "meta_gradient_steps",
    "meta_gradient_radius",
    "checkpoint_write_steps",
    "template",
    *map(weight_name, LOSSES),
    *ADDABLE,
}


@dataclass
class RecipeArguments:
    """What a recipe says beside [`~transformers.TrainingArguments`], which stand beside it in the same file."""

    task: str = field(metadata={"help": "The task to train on."})
    task_arguments: dict = field(default_factory=dict, metadata={"help": "Arguments of the task."})
    eval_sets: dict = field(
        default_factory=dict,
        metadata={"help": "Name of each evaluation set, its arguments over those of the recipe, or a task of its own."},
    )
    stages: list[dict] = field(
        default_factory=list,
        metadata={"help": "The curriculum: steps, task_arguments and write_steps of each stage, in order."},
    )
    base_model: str | None = field(default=None, metadata={"help": "Directory or Hub repository of the base."})
    base_config: dict | None = field(
        default=None,
        metadata={"help": "Configuration of a base with random weights: model_type and its options."},
    )
    adapter: str | None = field(
        default=None,
        metadata={"help": "Directory or Hub repository of an adapter to go on training, with the options it has."},
    )
    train_base: bool = field(default=False, metadata={"help": "Train the base's weights as well."})
    base_dtype: str | None = field(
        default=None,
        metadata={"help": "Precision that the base is loaded in: its own when absent; bfloat16, ...; or fastest."},
    )
    start: dict | None = field(
        default=None,
        metadata={"help": "How the memory's start is learned before the stages: method, contexts, rounds, ..."},
    )
    memories: str | None = field(
        default=None,
        metadata={"help": "Folder of memories that are written once; what READ has of its own is trained on them."},
    )
    distractors: int = field(
        default=0,
        metadata={"help": "With memories: each question's memory stands among so many others, in a random place."},
    )
    gradmem: dict = field(default_factory=dict, metadata={"help": "Options of GradMemConfig."})
    step_size_learning_rate: float | None = field(
        default=None, metadata={"help": "Outer learning rate of the learned step sizes; learning_rate when absent."}
    )
    muon_learning_rate: float | None = field(
        default=None,
        metadata={"help": "With train_base: that of the matrices of its layers, which Muon trains. Else optim does."},
    )
    max_context_length: int | None = field(default=None, metadata={"help": "Most tokens of a context."})
    max_query_length: int | None = field(
        default=None,
        metadata={"help": "Most tokens of query and answer; the one loses its beginning, a longer answer its end."},
    )
    queries_per_context: int | None = field(
        default=None,
        metadata={"help": "Most queries on a context in a batch; 0 asks nothing and trains what WRITE uses alone."},
    )
    frozen: list[str] = field(
        default_factory=list,
        metadata={"help": "Names of parameters that stay as they are; * stands for any part of a name."},
    )

    def __post_init__(self) -> None:
        for name, kind in _KINDS.items():
            if not isinstance(getattr(self, name), kind):
                raise ValueError(f"{name} must be a {_NAMES[kind]}, got {getattr(self, name)!r}.")
        if not all(isinstance(name, str) for name in self.frozen):
            raise ValueError(f"frozen must be a list of names, texts each, got {self.frozen}.")
        check_limits(self)
        get_task(self.task)
        self._check_model()
        if not self.stages:
            raise ValueError("A recipe needs stages: a list of at least one, each with its number of steps.")
        checked_stages(self.stages)
        for name, arguments in self.eval_sets.items():
            if not isinstance(name, str):
                raise ValueError(
                    f"The name of an evaluation set must be a text, got {name!r}: put it in quotes, '{name}'."
                )
            if not isinstance(arguments, dict):
                raise ValueError(f"The evaluation set {name!r} needs task arguments (or {{}}), got {arguments!r}.")
            get_task(arguments.get("task", self.task))
        for name in ("step_size_learning_rate", "muon_learning_rate"):
            rate = getattr(self, name)
            if rate is not None and not rate > 0:
                raise ValueError(f"{name} must be greater than 0, got {rate}.")
        if self.muon_learning_rate is not None and not self.train_base:
            raise ValueError(
                "muon_learning_rate is for the matrices of a base that trains: set train_base, or leave it out."
            )
        self._check_base_dtype()
        self._check_written_once()
        self._check_unasked()

    def _check_model(self) -> None:
        """Refuse what names no model, or two."""
        if self.base_model is not None and self.base_config is not None:
            raise ValueError("A recipe names either a base_model or a base_config to build one from, and not both.")
        if self.adapter is None and self.base_model is None and self.base_config is None:
            raise ValueError("A recipe needs a base_model, a base_config to build one from, or an adapter to train.")
        if self.adapter is not None and (self.base_config is not None or set(self.gradmem) - _CHANGEABLE):
            raise ValueError(
                f"The adapter {self.adapter} brings base and options: leave out base_config and, of gradmem, "
                f"all but {', '.join(sorted(_CHANGEABLE))}. Got {self.base_config or self.gradmem}."
            )
        if self.base_config is not None and "model_type" not in self.base_config:
            raise ValueError(f"base_config needs a model_type, got {self.base_config}.")
        try:
            GradMemConfig(**self.gradmem)  # which checks its options
        except StrictDataclassFieldValidationError as error:
            raise ValueError(f"gradmem holds a value of another kind: {error.__cause__ or error}.") from error
        except ValueError:
            if self.adapter is None:  # whose own options count as well, and are looked at with them
                raise

    def _check_base_dtype(self) -> None:
        """Refuse what is no precision, and one that is left to the machine for weights that train."""
        named = isinstance(getattr(torch, str(self.base_dtype), None), torch.dtype)
        if not named and self.base_dtype not in (None, FASTEST):
            raise ValueError(f"base_dtype must be {FASTEST}, float32, bfloat16 or float16, got {self.base_dtype!r}.")
        if self.base_dtype == FASTEST and self.train_base:
            raise ValueError(
                f"base_dtype: {FASTEST} may choose bfloat16, in which small updates of weights are lost. With "
                "train_base, name the precision, or leave base_dtype out for the base's own."
            )

    def _check_written_once(self) -> None:
        """Refuse what would do nothing where memories are written before the stages, or what they cannot do."""
        if self.start is not None:
            Start.of(self.start)
        if self.distractors < 0 or (self.distractors and self.memories is None):
            raise ValueError(
                f"distractors must be 0 or more, and goes with memories, got {self.distractors} and memories: "
                f"{self.memories}."
            )
        if self.memories is None:
            return
        if self.train_base:
            raise ValueError("memories are written by the base as it is: leave train_base at false.")
        if any(set(stage) - {"steps"} for stage in self.stages):
            raise ValueError(
                "With memories, which are written once, a stage has steps alone: task_arguments and write_steps of a "
                f"stage would do nothing, got {self.stages}."
            )
        if self.max_context_length is not None:
            raise ValueError(
                "With memories, contexts are written whole: max_context_length would do nothing, got "
                f"{self.max_context_length}. Leave it out, or shorten the contexts."
            )
        if self.queries_per_context not in (None, 1):  # 1 says what shape batches have, for several processes
            raise ValueError(
                "With memories, each question is a row of its own: queries_per_context would do nothing, got "
                f"{self.queries_per_context}. Leave it out, or give it to the task, if that takes it."
            )
        if self.step_size_learning_rate is not None:
            raise ValueError(
                "With memories, WRITE is not trained: step_size_learning_rate would do nothing, got "
                f"{self.step_size_learning_rate}. Leave it out."
            )
        for name in self.eval_sets:
            if name in ("", ".", "..", TRAINING_SET) or name != file_name(name):
                raise ValueError(
                    f"With memories, an evaluation set has a folder of its name beside that of the training data, "
                    f"{TRAINING_SET!r}: {name!r} cannot be one. Give the set another name, without a slash."
                )

    def _check_unasked(self) -> None:
        """Refuse terms of the loss of answers where nothing is asked."""
        unread = [name for name in map(weight_name, LOSSES) if self.gradmem.get(name)]
        if self.queries_per_context == 0 and unread:
            raise ValueError(
                f"With queries_per_context: 0 the loss is that of the memory alone: {', '.join(unread)} would do "
                "nothing. Leave it out of gradmem."
            )

    @property
    def curriculum(self) -> list[Stage]:
        """The stages in order."""
        return checked_stages(self.stages)

    @property
    def config(self) -> GradMemConfig:
        """The configuration of a new adapter."""
        return GradMemConfig(**self.gradmem)


@dataclass
class Recipe:
    """A training run.

    Attributes:
        arguments: model, task and curriculum.
        training: those of `Trainer`.
        values: both as they were read, to be kept beside the results.
    """

    arguments: RecipeArguments
    training: TrainingArguments
    values: dict[str, Any]


def load_recipe(path: str | os.PathLike, overrides: Sequence[str] = ()) -> Recipe:
    """Read a recipe, a YAML file of [`RecipeArguments`] and [`~transformers.TrainingArguments`] side by side.

    Args:
        path: the file.
        overrides: `key=value` each, the value in YAML; `gradmem.write_steps=5` and `stages.0.steps=100` reach inside.

    Raises:
        OSError: the file cannot be read.
        ValueError: it is no YAML, or a key or value in it is wrong or goes past the model's loss.
    """
    try:
        values = read_yaml(Path(path).read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is not a readable recipe: {error}") from error
    if not isinstance(values, dict):
        raise ValueError(f"{path} is not a recipe: it holds {type(values).__name__}, not keys with values.")
    for override in overrides:
        _override(values, override)
    return make_recipe(values, str(path))


def make_recipe(values: dict[str, Any], source: str = "the recipe") -> Recipe:
    """A recipe from its values; see [`load_recipe`]."""
    stages = values.get("stages")
    steps = [stage.get("steps") for stage in stages if isinstance(stage, dict)] if isinstance(stages, list) else []
    training = {
        # Text columns are what the collator takes; metrics are counts, added up batch by batch.
        "remove_unused_columns": False,
        "batch_eval_metrics": True,
        "max_steps": sum(count for count in steps if isinstance(count, int)),  # what is no number is refused below
        # Each process reads the stream for itself: batches of different widths cannot be sent as one.
        "accelerator_config": {"dispatch_batches": False},
        "dataloader_pin_memory": torch.cuda.is_available(),
    }
    if values.get("queries_per_context") == 0:  # by its labels Trainer knows that a batch has a loss
        training |= {"label_names": ["context_input_ids"], "prediction_loss_only": True}
    if values.get("max_steps", training["max_steps"]) != training["max_steps"]:
        raise ValueError(
            f"max_steps in {source} is set by its stages: it is {training['max_steps']}, not {values['max_steps']}."
        )
    for name, instead in _SET_OTHERWISE.items():
        if values.get(name) is not None:
            raise ValueError(f"{name} in {source} would do nothing: {instead}. Leave it out.")
    for name, (usual, harm) in _REFUSED.items():
        if values.get(name) not in (None, usual):
            raise ValueError(f"{name}: {values[name]} in {source} {harm}. Leave it out.")
    if values.get("neftune_noise_alpha") is not None and not values.get("train_base"):
        raise ValueError(f"neftune_noise_alpha in {source} would do nothing: the base does not train. Leave it out.")
    if values.get("hub_token") is not None:
        raise ValueError(
            f"{source} holds a hub_token, and what a run is made of is pushed with it. Set HF_TOKEN, or log in with "
            "`hf auth login`."
        )
    _check_kinds(values, source)
    parser = HfArgumentParser((RecipeArguments, TrainingArguments))  # type: ignore[arg-type] # its name for any class
    try:
        arguments, training_arguments = parser.parse_dict(training | values)
    except TypeError as error:
        raise ValueError(f"{source} is not a complete recipe: {error}") from error
    check_loss_is_the_models(training_arguments)
    _check_best(training_arguments, arguments.eval_sets, source)
    return Recipe(arguments, training_arguments, values)


def _check_best(training: TrainingArguments, eval_sets: Collection[str], source: str) -> None:
    """Refuse to look for the best by a metric that no evaluation set has: Trainer would find out at the first."""
    asked = {
        "load_best_model_at_end": training.load_best_model_at_end,
        "save_strategy: best": training.save_strategy == SaveStrategy.BEST,
        "lr_scheduler_type: reduce_lr_on_plateau": training.lr_scheduler_type == SchedulerType.REDUCE_ON_PLATEAU,
    }
    metric = training.metric_for_best_model or "loss"
    if any(asked.values()) and not metric.removeprefix("eval_").startswith(tuple(f"{name}_" for name in eval_sets)):
        named = " or ".join(f"{name}_loss" for name in eval_sets) or "that of a set, of which it has none"
        raise ValueError(
            f"{' and '.join(name for name, given in asked.items() if given)} in {source} goes by "
            f"metric_for_best_model, which is {metric!r}. Each evaluation set has metrics of its own: give {named}."
        )


def _check_kinds(values: dict[str, Any], source: str) -> None:
    """Refuse what is no number, or not true or false, where one belongs: it would be found out deep inside, unnamed."""
    kinds = get_type_hints(RecipeArguments) | get_type_hints(TrainingArguments)
    for name, value in values.items():
        named = set(get_args(kinds.get(name)) or [kinds.get(name)])
        expected = named - {type(None)}
        may_be_none = expected != named or expected == {bool}  # which is then as good as false
        if not expected or (value is None and may_be_none):
            continue
        if expected == {bool}:
            right, kind = isinstance(value, bool), "true or false, without quotes"
        elif expected <= {int, float}:
            right = isinstance(value, int if expected == {int} else int | float) and not isinstance(value, bool)
            kind = "a whole number" if expected == {int} else "a number"
        else:
            continue
        if not right:
            empty = " Leave the line out for the default." if value is None else ""
            raise ValueError(f"{name} in {source} must be {kind}, got {value!r}.{empty}")


def _override(values: dict[str, Any], override: str) -> None:
    key, equals, text = override.partition("=")
    if not equals or not key:
        raise ValueError(f"An override is key=value, got {override!r}.")
    *path, last = key.split(".")
    place: Any = values
    try:
        for name in path:
            if isinstance(place, list):
                place = place[int(name)]
            else:
                place[name] = {} if place.get(name) is None else place[name]
                place = place[name]
        place[int(last) if isinstance(place, list) else last] = read_yaml(text)
    except (AttributeError, IndexError, TypeError, ValueError, yaml.YAMLError) as error:
        raise ValueError(f"The override {override!r} does not fit the recipe: {error}") from error
