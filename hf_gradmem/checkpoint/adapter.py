"""An adapter on disk or on the Hub: opened in one place, and its weights put into a model.

A checkpoint that includes its base is opened likewise; Transformers loads its weights, and [`load_full`] checks them.
"""

import copy
import functools
import json
import os
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, Self, TypeVar

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils import (
    CONFIG_NAME,
    GENERATION_CONFIG_NAME,
    SAFE_WEIGHTS_INDEX_NAME,
    SAFE_WEIGHTS_NAME,
    cached_file,
    resolve_revision,
)

from ..base.lora import base_keys, lora_taken_back, train_beside_base
from ..base.precision import FASTEST
from ..configuration_gradmem import GradMemConfig, unknown_options_refused
from ..files import save_text
from ..hub.errors import one_line_errors
from .tokenizer import open_tokenizer
from .whole_save import finish_save

HUB_ARGUMENTS = ("cache_dir", "force_download", "local_files_only", "proxies", "revision", "subfolder", "token")
PUSH_ARGUMENTS = frozenset({"repo_id", "commit_message", "commit_description", "private", "create_pr", "revision"})
# What from_pretrained takes as options of the configuration; the precision is left to the loading of weights.
CONFIG_OPTIONS = ({field.name for field in fields(GradMemConfig)} - {"dtype"}) | {"attn_implementation"}
# Options that an adapter which was trained without them may be opened with, and what stands in the names of their
# parameters, which begin such that nothing changes until they are trained.
_LEARNS, _STEP_SIZES = "learn_write_learning_rate", "write_log_learning_rate"
ADDABLE = {"write_lora": ".write.", _LEARNS: _STEP_SIZES}
# What lets `trust_remote_code=True` load a checkpoint where this package is installed but was not imported; where it is
# not installed, Transformers says so. Nothing else of a repository is ever run.
REMOTE_CODE_FILE = "modeling_gradmem_hub.py"
_REMOTE_CODE = '''"""Loads this checkpoint with the installed hf_gradmem package, which holds all of its code."""

from hf_gradmem import GradMemConfig, GradMemForCausalLM

__all__ = ["GradMemConfig", "GradMemForCausalLM"]
'''
AUTO_MAP = {
    "AutoConfig": f"{Path(REMOTE_CODE_FILE).stem}.GradMemConfig",
    "AutoModel": f"{Path(REMOTE_CODE_FILE).stem}.GradMemForCausalLM",
    "AutoModelForCausalLM": f"{Path(REMOTE_CODE_FILE).stem}.GradMemForCausalLM",
}


_Model = TypeVar("_Model", bound=nn.Module)


@dataclass(frozen=True)
class Adapter:
    """A GradMem checkpoint that was found: its configuration, and its further files once they are asked for.

    Attributes:
        name_or_path: directory or Hub repository.
        config: its configuration, or the one that was given in its place; a copy, free to be changed.
        hub_arguments: those of [`HUB_ARGUMENTS`] that all of its files are fetched with, at one commit.
        trust_remote_code: whether code of its repository, or of its base's, may be run for a tokenizer.
        added: those of [`ADDABLE`] that it was opened with and has no parameters for.
    """

    name_or_path: str
    config: GradMemConfig
    hub_arguments: dict[str, Any]
    trust_remote_code: bool = False
    added: frozenset[str] = frozenset()

    @classmethod
    def open(
        cls,
        name_or_path: str | os.PathLike,
        hub_arguments: dict[str, Any] | None = None,
        options: dict[str, Any] | None = None,
        config: GradMemConfig | str | os.PathLike | None = None,
        trust_remote_code: bool = False,
    ) -> Self:
        """Find a checkpoint and read its configuration; weights and tokenizer are left for when they are needed.

        Args:
            name_or_path: directory or Hub repository.
            hub_arguments: where and how to fetch its files.
            options: of [`GradMemConfig`], in place of the checkpoint's.
            config: in place of the checkpoint's: a configuration, which `options` do not change, or where to load one.
            trust_remote_code: whether code of its repository, or of its base's, may be run for a tokenizer.

        Raises:
            OSError: there is no such checkpoint.
            TypeError: it is no place.
            ValueError: it holds another kind of model, or an option is wrong.
        """
        if not isinstance(name_or_path, str | os.PathLike):
            raise TypeError(
                f"An adapter is a GradMemConfig, for a new one, or where it lies, a text or path; got {name_or_path!r}."
            )
        name, hub = os.fspath(name_or_path), dict(hub_arguments or {})
        finish_save(os.path.join(name, hub.get("subfolder") or ""))
        # Resolved once, so that all files come from one commit.
        if (revision := resolve_revision(name, hub.get("revision"), **_place(hub))) is not None:
            hub["revision"] = revision
        given = copy.deepcopy(config) if isinstance(config, GradMemConfig) else None  # as by the Auto classes
        values = config_values(name if config is None or given is not None else config, hub)
        opened: GradMemConfig = GradMemConfig.from_dict(values | (options or {})) if given is None else given
        without = (None, "none")
        added = frozenset(
            name for name in ADDABLE if values.get(name) in without and getattr(opened, name) not in without
        )
        reduction = values.get("write_loss_reduction", GradMemConfig.write_loss_reduction)
        if values.get(_LEARNS) not in without and opened.write_loss_reduction != reduction:
            raise ValueError(
                f"{name} has learned the sizes of its steps for write_loss_reduction={reduction!r}, and they are of "
                f"another scale by {opened.write_loss_reduction!r}: leave it out."
            )
        if values.get(_LEARNS) not in without and opened.write_learning_rate != values.get("write_learning_rate"):
            raise ValueError(
                f"{name} has learned the sizes of its steps, beside which write_learning_rate does nothing: leave it "
                "out, or give one to model.write(..., write_learning_rate=...)."
            )
        if added and opened.includes_base:
            raise ValueError(
                f"{name} includes its base, and only an adapter on a frozen one can be given "
                f"{' and '.join(sorted(added))} that it was trained without."
            )
        return cls(name, opened, hub, trust_remote_code, added)

    @property
    def place(self) -> dict[str, Any]:
        """What holds for other repositories as well: token, cache, whether the Hub may be asked, and their code run."""
        return _place(self.hub_arguments) | {"trust_remote_code": self.trust_remote_code}

    @functools.cached_property
    def weights(self) -> str | None:
        """The path of the weights beside the base, downloaded if need be; `None` where the base is included.

        Raises:
            OSError: there are none.
        """
        return None if self.config.includes_base else adapter_file(self.name_or_path, self.hub_arguments)

    @functools.cached_property
    def tokenizer(self) -> PreTrainedTokenizerBase | None:
        """Its own tokenizer; `None` if it has none, and reads with its base's."""
        return load_tokenizer(self.name_or_path, self.hub_arguments, self.trust_remote_code)

    def attach(
        self, model_class: Callable[[GradMemConfig, PreTrainedModel], _Model], base_model: PreTrainedModel
    ) -> _Model:
        """A model of this adapter on a base that is loaded already.

        Raises:
            OSError: there are no weights.
            ValueError: the weights are truncated or do not fit the configuration or the base, or include a base.
        """
        if (weights := self.weights) is None:
            raise ValueError(f"{self.name_or_path} includes its own base and is attached to no other.")
        self.config.text_config = base_model.config
        model = model_class(self.config, base_model)
        with lora_taken_back(base_model):
            load_adapter(model, weights, self.name_or_path, self.added)
        return model


def _place(hub_arguments: dict[str, Any]) -> dict[str, Any]:
    return {name: hub_arguments[name] for name in ("token", "local_files_only", "cache_dir") if name in hub_arguments}


def tied_keys(model: PreTrainedModel) -> set[str]:
    """Keys of the model's state dict that a full checkpoint leaves out, since another key holds the same tensor."""
    tensors = model.state_dict()
    return {
        key
        for key, source in model.all_tied_weights_keys.items()
        if key in tensors and source in tensors and tensors[key].data_ptr() == tensors[source].data_ptr()
    }


def load_tokenizer(
    name_or_path: str | os.PathLike, hub_arguments: dict[str, Any], trust_remote_code: bool = False
) -> PreTrainedTokenizerBase | None:
    """The tokenizer saved with an adapter, or `None` if it has none of its own."""
    path = cached_file(
        os.fspath(name_or_path),
        "tokenizer_config.json",
        _raise_exceptions_for_missing_entries=False,
        _raise_exceptions_for_connection_errors=False,
        **hub_arguments,
    )
    return None if path is None else open_tokenizer(name_or_path, trust_remote_code=trust_remote_code, **hub_arguments)


def config_values(name_or_path: str | os.PathLike, hub_arguments: dict[str, Any]) -> dict[str, Any]:
    """The values in the configuration of a GradMem checkpoint.

    Raises:
        OSError: there is none.
        ValueError: it is the configuration of another kind of model.
    """
    with one_line_errors(name_or_path, hub_arguments.get("revision")):
        values, _ = GradMemConfig.get_config_dict(name_or_path, **hub_arguments)
    if not values:  # what Transformers makes of a directory without the file
        raise OSError(f"{name_or_path} holds no model: {CONFIG_NAME} is missing.")
    if values.get("model_type") != GradMemConfig.model_type:
        raise ValueError(
            f"{name_or_path} holds a model of type {values.get('model_type')!r}, not {GradMemConfig.model_type!r}. To "
            "give that model a memory, load it and call get_gradmem_model(base_model, GradMemConfig())."
        )
    return values


def load_full(load: Callable[..., Any], adapter: Adapter, arguments: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
    """Load a checkpoint that includes its base; what it does not hold is an error, where the stock loader only warns.

    Args:
        load: `PreTrainedModel.from_pretrained` of this checkpoint.
        adapter: the checkpoint.
        arguments: those given to `from_pretrained`.

    Returns:
        The model, its base frozen, and what `from_pretrained` says of its loading.

    Raises:
        ValueError: the weights are truncated or do not fit the configuration.
    """
    tolerant = arguments.get("ignore_mismatched_sizes", False)
    if arguments.get("dtype") == FASTEST:  # weights that were trained stay in the precision that they were trained in
        arguments = arguments | {"dtype": "auto"}
    settings = {"use_safetensors": True} | arguments | {"output_loading_info": True, "ignore_mismatched_sizes": True}
    config, steps = adapter.config, adapter.config.write_steps
    try:
        # Of other steps it has the learned sizes of these.
        config.write_steps = _trained_steps(adapter, arguments.get("variant")) or steps
        with unknown_options_refused():
            model, info = load(**settings, config=config)
    except SafetensorError as error:
        raise ValueError(
            f"The weights in {adapter.name_or_path} are not readable safetensors ({error}). Were they copied whole?"
        ) from error
    model.config.write_steps = steps
    mismatched = [f"{key} {tuple(found)} for {tuple(built)}" for key, found, built in info["mismatched_keys"]]
    missing, unexpected = info["missing_keys"], info["unexpected_keys"]
    if missing or unexpected or (mismatched and not tolerant):
        raise ValueError(
            f"The weights in {adapter.name_or_path} are not those that its config.json describes: missing "
            f"{_few(missing)}; unexpected {_few(unexpected)}; of another shape {_few(mismatched)}."
        )
    train_beside_base(model)  # the loader makes every weight trainable
    return model, info


def _trained_steps(adapter: Adapter, variant: str | None) -> int | None:
    """How many steps a full checkpoint has learned sizes of, by the header of its weights; `None` where it has none."""
    if getattr(adapter.config, _LEARNS) == "none":
        return None
    place: dict[str, Any] = {"_raise_exceptions_for_missing_entries": False, **adapter.hub_arguments}
    index = cached_file(adapter.name_or_path, _of_variant(SAFE_WEIGHTS_INDEX_NAME, variant), **place)
    files = {} if index is None else json.loads(Path(index).read_text(encoding="utf-8"))["weight_map"]
    path = cached_file(adapter.name_or_path, files.get(_STEP_SIZES, _of_variant(SAFE_WEIGHTS_NAME, variant)), **place)
    if path is None:
        return None
    with safe_open(path, framework="pt") as file:
        return file.get_slice(_STEP_SIZES).get_shape()[0] if _STEP_SIZES in file.keys() else None  # noqa: SIM118


def _of_variant(name: str, variant: str | None) -> str:
    """The name that Transformers gives a file of weights that are saved beside others."""
    stem, suffix = name.split(".", 1)
    return name if variant is None else f"{stem}.{variant}.{suffix}"


def adapter_file(name_or_path: str | os.PathLike, hub_arguments: dict[str, Any]) -> str:
    """The path of an adapter's `model.safetensors`, downloaded if need be: before its base, which may be large.

    Raises:
        OSError: there is none.
    """
    with one_line_errors(name_or_path, hub_arguments.get("revision")):
        path = cached_file(
            os.fspath(name_or_path), SAFE_WEIGHTS_NAME, _raise_exceptions_for_missing_entries=False, **hub_arguments
        )
    if path is None:
        raise OSError(
            f"{name_or_path} has a {CONFIG_NAME} but no {SAFE_WEIGHTS_NAME}: it was saved or uploaded by half. Save or "
            "push it again."
        )
    return path


def load_adapter(model: nn.Module, path: str, name_or_path: str | os.PathLike, added: Collection[str] = ()) -> None:
    """Fill the parameters beside the base from an adapter's `model.safetensors`.

    Args:
        model: whose parameters to fill.
        path: of [`adapter_file`].
        name_or_path: the adapter, for messages.
        added: options of [`ADDABLE`] whose parameters it does not hold; they stay as they begin.

    Raises:
        ValueError: the file is truncated, or holds other parameters than this adapter's configuration asks.
    """
    try:
        tensors = load_file(path)
    except SafetensorError as error:
        raise ValueError(f"{path} is not a readable safetensors file ({error}). Was it copied whole?") from error
    _fit_step_sizes(model, tensors)
    try:
        result = model.load_state_dict(tensors, strict=False)
    except RuntimeError as error:
        raise ValueError(f"The adapter in {name_or_path} does not fit its own configuration: {error}") from error
    begun = {key for key in result.missing_keys if any(ADDABLE[name] in key for name in added)}
    missing = set(result.missing_keys) - base_keys(model) - begun
    if missing or result.unexpected_keys:
        raise ValueError(
            f"{path} is not the adapter that its config.json describes: missing {_few(missing)}, "
            f"unexpected {_few(result.unexpected_keys)}."
        )


def _fit_step_sizes(model: nn.Module, tensors: Mapping[str, torch.Tensor]) -> None:
    """Make room for as many learned step sizes as were trained: fewer steps use the first, more go on from the last."""
    own: Any = getattr(model, _STEP_SIZES, None)
    trained = tensors.get(_STEP_SIZES)
    if own is not None and trained is not None and own.shape[1:] == trained.shape[1:]:
        setattr(model, _STEP_SIZES, nn.Parameter(own.new_empty(trained.shape)))


def _few(names: Iterable[str]) -> str:
    names = sorted(names)
    return ", ".join(names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "") if names else "none"


def save_remote_code(directory: str | os.PathLike) -> None:
    """Write the few lines that `auto_map` of the configuration points to."""
    save_text(_REMOTE_CODE, Path(directory) / REMOTE_CODE_FILE)


def drop_generation_config(directory: str | os.PathLike) -> None:
    """Take back what `PreTrainedModel.save_pretrained` writes for any model that generates: it is the base's own."""
    (Path(directory) / GENERATION_CONFIG_NAME).unlink(missing_ok=True)
