"""Checkpoints: adapters beside their base, the base's own weights, and exports to stock formats."""

import hashlib
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from peft import PromptTuningConfig, TaskType
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils import SAFE_WEIGHTS_NAME, cached_file

from .adapters import lora_modules
from .configuration_gradmem import GradMemConfig

HUB_ARGUMENTS = ("cache_dir", "force_download", "local_files_only", "proxies", "revision", "subfolder", "token")
# These say where and how the adapter itself is found; the base has its own name and revision.
_ADAPTER_ONLY = ("revision", "subfolder", "adapter_kwargs", "code_revision", "_from_auto", "_from_pipeline")


def base_keys(model: nn.Module) -> set[str]:
    """Keys of the model's state dict that belong to the base itself, tied ones and non-LoRA ones included."""
    lora = tuple(f"base_model.{name}." for name in lora_modules(model.base_model))
    return {key for key in model.state_dict() if key.startswith("base_model.") and not (lora and key.startswith(lora))}


def base_name(base_model: PreTrainedModel) -> str | None:
    """Where the base was loaded from: a Hub repository, an absolute directory, or nothing."""
    name = base_model.name_or_path
    return (os.path.abspath(name) if os.path.isdir(name) else name) or None


def check_attachable(config: GradMemConfig, base_model: PreTrainedModel, adapter: str | os.PathLike) -> None:
    """Refuse to attach an adapter to a base that it was not trained for.

    Raises:
        ValueError: the checkpoint brings its own base, or the bases differ in kind or width.
    """
    if config.includes_base:
        raise ValueError(
            f"{adapter} includes its own base, which was trained with it or has no name. Load it with from_pretrained."
        )
    trained, given = config.text_config, base_model.config
    for fact in ("model_type", "hidden_size", "num_hidden_layers", "vocab_size"):
        if getattr(trained, fact, None) != getattr(given, fact, None):
            raise ValueError(
                f"{adapter} belongs to {config.base_model_name_or_path} with {fact} {getattr(trained, fact, None)}, but "
                f"base_model has {getattr(given, fact, None)}."
            )


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
    return None if path is None else AutoTokenizer.from_pretrained(os.path.dirname(path))


def load_base(config: GradMemConfig, arguments: dict[str, Any]) -> PreTrainedModel:
    """Load the base that an adapter names, at its recorded revision.

    Args:
        config: the adapter's.
        arguments: those given to the adapter's `from_pretrained`: `dtype`, `device_map`, `quantization_config` and
            the like reach the base.
    """
    arguments = {name: value for name, value in arguments.items() if name not in _ADAPTER_ONLY}
    if config._attn_implementation is not None:
        arguments.setdefault("attn_implementation", config._attn_implementation)
    if config.base_model_revision is not None:
        arguments["revision"] = config.base_model_revision
    return AutoModelForCausalLM.from_pretrained(config.base_model_name_or_path, **arguments)


def load_adapter(model: nn.Module, name_or_path: str | os.PathLike, hub_arguments: dict[str, Any]) -> None:
    """Fill the parameters beside the base from an adapter's `model.safetensors`.

    Raises:
        ValueError: the file is missing, truncated, or holds other parameters than this adapter's configuration asks.
    """
    path = cached_file(os.fspath(name_or_path), SAFE_WEIGHTS_NAME, **hub_arguments)
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


def save_prompt_tuning(
    prompt: torch.Tensor, base_model: PreTrainedModel, name: str, directory: str | os.PathLike
) -> None:
    """Write virtual tokens `(num_virtual_tokens, hidden_size)` as a stock PEFT PROMPT_TUNING adapter."""
    text_config = base_model.config.get_text_config()
    directory = Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    unfinished = directory / f".adapter_model.{os.getpid()}"
    try:
        save_file({"prompt_embeddings": prompt.detach().cpu().contiguous()}, unfinished, metadata={"format": "pt"})
        unfinished.replace(directory / "adapter_model.safetensors")
    finally:
        unfinished.unlink(missing_ok=True)
    PromptTuningConfig(
        task_type=TaskType.CAUSAL_LM,
        base_model_name_or_path=name,
        inference_mode=True,
        num_virtual_tokens=prompt.shape[0],
        token_dim=prompt.shape[1],
        num_transformer_submodules=1,
        num_attention_heads=getattr(text_config, "num_attention_heads", None),
        num_layers=getattr(text_config, "num_hidden_layers", None),
    ).save_pretrained(directory)
