"""Checkpoints: adapters beside their base, the base's own weights, and exports to stock formats."""

import hashlib
import os
from collections.abc import Callable, Iterable
from dataclasses import fields
from pathlib import Path
from typing import Any

import torch
import transformers
from huggingface_hub.errors import RevisionNotFoundError
from peft import PromptTuningConfig, TaskType
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.utils import CONFIG_NAME, GENERATION_CONFIG_NAME, SAFE_WEIGHTS_NAME, cached_file

from .adapters import lora_modules
from .configuration_gradmem import GradMemConfig
from .files import save_tensors, whole_file
from .hub import HubError, causes, explain, is_cached, loaded_commit, one_line_errors

HUB_ARGUMENTS = ("cache_dir", "force_download", "local_files_only", "proxies", "revision", "subfolder", "token")
PUSH_ARGUMENTS = frozenset({"repo_id", "commit_message", "commit_description", "private", "create_pr", "revision"})
# What from_pretrained takes as options of the configuration; the precision is left to the loading of weights.
CONFIG_OPTIONS = ({field.name for field in fields(GradMemConfig)} - {"dtype"}) | {"attn_implementation"}
# These say where and how the adapter itself is found; the base has its own name and revision.
_ADAPTER_ONLY = (
    "revision",
    "subfolder",
    "adapter_kwargs",
    "code_revision",
    "ignore_mismatched_sizes",
    "output_loading_info",
    "_from_auto",
    "_from_pipeline",
)
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
# Facts of a base that an adapter or its memories depend on.
_BASE_FACTS = ("model_type", "hidden_size", "num_hidden_layers", "vocab_size")


def base_keys(model: nn.Module) -> set[str]:
    """Keys of the model's state dict that belong to the base itself, tied ones and non-LoRA ones included."""
    lora = tuple(f"base_model.{name}." for name in lora_modules(model.base_model))
    return {key for key in model.state_dict() if key.startswith("base_model.") and not (lora and key.startswith(lora))}


def tied_keys(model: PreTrainedModel) -> set[str]:
    """Keys of the model's state dict that a full checkpoint leaves out, since another key holds the same tensor."""
    tensors = model.state_dict()
    return {
        key
        for key, source in model.all_tied_weights_keys.items()
        if key in tensors and source in tensors and tensors[key].data_ptr() == tensors[source].data_ptr()
    }


def base_name(base_model: PreTrainedModel) -> str | None:
    """Where the base was loaded from: a Hub repository, an absolute directory, or nothing."""
    name = base_model.name_or_path
    return (os.path.abspath(name) if os.path.isdir(name) else name) or None


def check_attachable(config: GradMemConfig, base_model: PreTrainedModel, adapter: str | os.PathLike) -> None:
    """Refuse to attach an adapter to a base that it was not trained for.

    Raises:
        ValueError: the checkpoint brings its own base, or the bases differ in kind, width or commit.
    """
    if config.includes_base:
        raise ValueError(
            f"{adapter} includes its own base, which was trained with it or has no name. Load it with from_pretrained."
        )
    for fact, trained, given in _differences(config, base_model):
        raise ValueError(
            f"{adapter} belongs to {config.base_model_name_or_path} with {fact} {trained}, but base_model has {given}."
        )
    name, commit = config.base_model_name_or_path, config.base_model_revision
    given = loaded_commit(base_name(base_model)) if base_name(base_model) == name else None
    # A base that was loaded at the recorded commit is in the cache at that commit.
    if commit is not None and given not in (None, commit) and not is_cached(name, commit, CONFIG_NAME):
        raise ValueError(
            f"{adapter} was made with {name} at commit {commit}, but base_model was loaded at {given}: the base has "
            f"moved on. Load it with revision={commit!r}."
        )


def _differences(config: GradMemConfig, base_model: PreTrainedModel) -> list[tuple[str, Any, Any]]:
    """Facts in which a base is not the one recorded: name, recorded and given value."""
    if config.text_config is None:
        return []
    recorded, given = config.text_config.get_text_config(), base_model.config.get_text_config()
    facts = [(fact, getattr(recorded, fact, None), getattr(given, fact, None)) for fact in _BASE_FACTS]
    return [fact for fact in facts if fact[1] != fact[2]]


def hash_tensors(tensors: dict[str, torch.Tensor]) -> str:
    """A short hash of named tensors, the same at any precision they are held in."""
    digest = hashlib.sha256()
    for name in sorted(tensors):
        digest.update(name.encode())
        digest.update(tensors[name].detach().to("cpu", torch.float32).contiguous().numpy().tobytes())
    return digest.hexdigest()[:12]


def load_tokenizer(name_or_path: str | os.PathLike, hub_arguments: dict[str, Any]) -> PreTrainedTokenizerBase | None:
    """The tokenizer saved with an adapter, or `None` if it has none of its own."""
    path = cached_file(
        os.fspath(name_or_path),
        "tokenizer_config.json",
        _raise_exceptions_for_missing_entries=False,
        _raise_exceptions_for_connection_errors=False,
        **hub_arguments,
    )
    return None if path is None else AutoTokenizer.from_pretrained(name_or_path, **hub_arguments)


def load_config(
    name_or_path: str | os.PathLike, hub_arguments: dict[str, Any], options: dict[str, Any]
) -> GradMemConfig:
    """The configuration of a GradMem checkpoint, with `options` in place of its own.

    Raises:
        OSError: there is none.
        ValueError: it is the configuration of another kind of model, or an option is wrong.
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
    return GradMemConfig.from_dict(values | options)


def build_base(config: PreTrainedConfig) -> PreTrainedModel:
    """A decoder with random weights."""
    try:
        return AutoModelForCausalLM.from_config(config)
    except ValueError:
        # The text part of a composite model is no model of its own to the Auto classes.
        for name in config.architectures or ():
            model_class = getattr(transformers, name, None)
            if isinstance(model_class, type) and issubclass(model_class, PreTrainedModel):
                return model_class._from_config(config)
        raise


def load_base(config: GradMemConfig, arguments: dict[str, Any]) -> tuple[PreTrainedModel, dict[str, Any]]:
    """Load the base that an adapter names, at its recorded revision.

    Args:
        config: the adapter's.
        arguments: those given to the adapter's `from_pretrained`: `dtype`, `device_map`, `quantization_config` and
            the like reach the base.

    Returns:
        The base, and what `from_pretrained` says of its loading.

    Raises:
        OSError: it is not where the adapter says, or no longer at the commit that the adapter was made with.
        ValueError: it is not the model that the adapter was made with.
    """
    name, commit = config.base_model_name_or_path, config.base_model_revision
    arguments = {name: value for name, value in arguments.items() if name not in _ADAPTER_ONLY}
    if config._attn_implementation is not None:
        arguments.setdefault("attn_implementation", config._attn_implementation)
    if commit is not None:
        arguments["revision"] = commit
    try:
        base_model, info = AutoModelForCausalLM.from_pretrained(name, output_loading_info=True, **arguments)
    except OSError as error:
        if commit is not None and any(isinstance(cause, RevisionNotFoundError) for cause in causes(error)):
            raise HubError(
                f"The base of this adapter, {name}, has moved on: commit {commit}, which the adapter was made with, is "
                "no longer there. base_model_revision='main' takes the base as it is now; the adapter may not fit it."
            ) from error
        raise HubError(
            f"The base of this adapter, {name}, could not be loaded: {explain(error, name, commit) or error} If it "
            "lies elsewhere, load it from there and attach the adapter with get_gradmem_model(base_model, adapter)."
        ) from error
    for fact, recorded, found in _differences(config, base_model):
        raise ValueError(f"{name} has {fact} {found}, but this adapter was made for a base with {recorded}.")
    return base_model, info


def load_full(
    load: Callable[..., tuple[PreTrainedModel, dict[str, Any]]], name_or_path: str, arguments: dict[str, Any]
) -> tuple[PreTrainedModel, dict[str, Any]]:
    """Load a checkpoint that includes its base; what it does not hold is an error, where the stock loader only warns.

    Args:
        load: `PreTrainedModel.from_pretrained` of this checkpoint.
        name_or_path: the checkpoint, for messages.
        arguments: those given to `from_pretrained`.

    Returns:
        The model, its base frozen, and what `from_pretrained` says of its loading.

    Raises:
        ValueError: the weights are truncated or do not fit the configuration.
    """
    tolerant = arguments.get("ignore_mismatched_sizes", False)
    settings = {"use_safetensors": True} | arguments | {"output_loading_info": True, "ignore_mismatched_sizes": True}
    try:
        model, info = load(**settings)
    except SafetensorError as error:
        raise ValueError(
            f"The weights in {name_or_path} are not readable safetensors ({error}). Were they copied whole?"
        ) from error
    mismatched = [f"{key} {tuple(found)} for {tuple(built)}" for key, found, built in info["mismatched_keys"]]
    unexpected = [key for key in info["unexpected_keys"] if not key.startswith("base_model.")]
    if info["missing_keys"] or unexpected or (mismatched and not tolerant):
        raise ValueError(
            f"The weights in {name_or_path} are not those that its config.json describes: missing "
            f"{_few(info['missing_keys'])}; unexpected {_few(unexpected)}; of another shape {_few(mismatched)}."
        )
    base = base_keys(model)
    for key, parameter in model.named_parameters():  # the loader makes every weight trainable
        parameter.requires_grad_(key not in base)
    return model, info


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


def load_adapter(model: nn.Module, path: str, name_or_path: str | os.PathLike) -> None:
    """Fill the parameters beside the base from an adapter's `model.safetensors`.

    Args:
        model: whose parameters to fill.
        path: of [`adapter_file`].
        name_or_path: the adapter, for messages.

    Raises:
        ValueError: the file is truncated, or holds other parameters than this adapter's configuration asks.
    """
    try:
        tensors = load_file(path)
    except SafetensorError as error:
        raise ValueError(f"{path} is not a readable safetensors file ({error}). Was it copied whole?") from error
    try:
        result = model.load_state_dict(tensors, strict=False)
    except RuntimeError as error:
        raise ValueError(f"The adapter in {name_or_path} does not fit its own configuration: {error}") from error
    missing = set(result.missing_keys) - base_keys(model)
    if missing or result.unexpected_keys:
        raise ValueError(
            f"{path} is not the adapter that its config.json describes: missing {_few(missing)}, "
            f"unexpected {_few(result.unexpected_keys)}."
        )


def _few(names: Iterable[str]) -> str:
    names = sorted(names)
    return ", ".join(names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "") if names else "none"


def save_remote_code(directory: str | os.PathLike) -> None:
    """Write the few lines that `auto_map` of the configuration points to."""
    with whole_file(Path(directory) / REMOTE_CODE_FILE) as unfinished:
        unfinished.write_text(_REMOTE_CODE, encoding="utf-8")


def drop_generation_config(directory: str | os.PathLike) -> None:
    """Take back what `PreTrainedModel.save_pretrained` writes for any model that generates: it is the base's own."""
    (Path(directory) / GENERATION_CONFIG_NAME).unlink(missing_ok=True)


def save_prompt_tuning(
    prompt: torch.Tensor, base_model: PreTrainedModel, config: GradMemConfig, directory: str | os.PathLike
) -> None:
    """Write virtual tokens `(num_virtual_tokens, hidden_size)` as a stock PEFT PROMPT_TUNING adapter."""
    text_config = base_model.config.get_text_config()
    save_tensors({"prompt_embeddings": prompt}, Path(directory) / "adapter_model.safetensors", {"format": "pt"})
    PromptTuningConfig(
        task_type=TaskType.CAUSAL_LM,
        base_model_name_or_path=config.base_model_name_or_path,
        revision=config.base_model_revision,
        inference_mode=True,
        num_virtual_tokens=prompt.shape[0],
        token_dim=prompt.shape[1],
        num_transformer_submodules=1,
        num_attention_heads=getattr(text_config, "num_attention_heads", None),
        num_layers=getattr(text_config, "num_hidden_layers", None),
    ).save_pretrained(directory)
