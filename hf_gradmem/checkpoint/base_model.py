"""The base of an adapter: which one it belongs to, where it is loaded from, and whether it can take memory vectors."""

import inspect
import os
from typing import Any

import torch
import transformers
from huggingface_hub.errors import RevisionNotFoundError
from transformers import (
    AutoModelForCausalLM,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.utils import CONFIG_NAME

from ..base.lora import other_adapters
from ..base.precision import FASTEST, fastest_dtype
from ..configuration_gradmem import GradMemConfig, unknown_options_refused
from ..hub.client import is_cached, loaded_commit
from ..hub.errors import HubError, causes, explain
from .adapter import HUB_ARGUMENTS
from .tokenizer import open_tokenizer

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
# Facts of a base that an adapter or its memories depend on.
_BASE_FACTS = ("model_type", "hidden_size", "num_hidden_layers", "vocab_size")


def check_base(base_model: PreTrainedModel) -> None:
    """Refuse by name a base that cannot take memory vectors.

    Raises:
        TypeError: it is no model of Transformers, no decoder with a language-model head, has no single token embedding,
            or takes no `inputs_embeds`.
        ValueError: it gives plain tuples, or has a PEFT adapter inside, which no checkpoint here would hold.
    """
    name = type(base_model).__name__
    if not isinstance(base_model, PreTrainedModel):
        hint = ""
        if hasattr(base_model, "merge_and_unload"):
            hint = (
                " Merge its adapter and give the result a memory: get_gradmem_model(base_model.merge_and_unload(), "
                "...). It is then saved with the memory's adapter, since its name stands for other weights."
            )
        raise TypeError(
            f"base_model must be a transformers.PreTrainedModel with a language-model head, got {name}.{hint}"
        )
    try:
        has_embeddings = getattr(base_model.get_input_embeddings(), "weight", None) is not None
    except (AttributeError, NotImplementedError):
        has_embeddings = False
    if not has_embeddings:
        raise TypeError(f"{name} has no single token embedding, so no memory vectors can be put before its tokens.")
    if "inputs_embeds" not in inspect.signature(base_model.forward).parameters:
        raise TypeError(f"{name} takes no inputs_embeds, so no memory vectors can be put before its tokens.")
    if base_model.config.is_encoder_decoder:
        raise TypeError(
            f"{name} is an encoder with a decoder. A memory stands before the tokens of a decoder alone: load one with "
            "AutoModelForCausalLM."
        )
    if not base_model.can_generate() and base_model.get_output_embeddings() is None:
        raise TypeError(
            f"{name} has no language-model head, so nothing can be reconstructed with it. Load the base with "
            "AutoModelForCausalLM."
        )
    if not all(config.return_dict for config in (base_model.config, base_model.config.get_text_config())):
        raise ValueError(f"{name} gives plain tuples (return_dict=False). Set base_model.config.return_dict = True.")
    if adapters := other_adapters(base_model):
        raise ValueError(
            f"{name} has a PEFT adapter inside ({', '.join(adapters)}), which would be neither the base's nor the "
            "memory's and would be lost on saving. Load the base without it, or merge it: "
            "peft.PeftModel.from_pretrained(base_model, adapter).merge_and_unload() can be given a memory."
        )


def base_to_wrap(config: GradMemConfig, base_model: PreTrainedModel | None) -> PreTrainedModel:
    """The base of a new model: the one given, or one with random weights as the configuration describes it.

    Args:
        config: of the model. Unless it says that checkpoints include the base, a base that is built here is recorded in
            it as one that no name stands for.
        base_model: a base that is loaded already, *optional*.

    Returns:
        The base, frozen.

    Raises:
        TypeError: it cannot take memory vectors.
        ValueError: there is neither a base nor a description of one.
    """
    if base_model is None:
        described = recorded_base(config)
        base_model = build_base(described)
        if not config.includes_base:
            config.describe_base(described, None)  # random weights, which no name stands for
        check_base(base_model)
    else:
        check_base(base_model)
        module: Any
        for module in base_model.modules():  # loaded already: post_init must not initialise it again
            module._is_hf_initialized = True
    return base_model.requires_grad_(False)


def recorded_base(config: GradMemConfig) -> PreTrainedConfig:
    """The configuration of the base that is recorded in a model's.

    Raises:
        ValueError: there is none.
    """
    if not isinstance(config.text_config, PreTrainedConfig):
        raise ValueError(
            "GradMemConfig.text_config is empty and no base_model was given: there is no decoder to write "
            "with. Use get_gradmem_model(base_model, config), or from_pretrained."
        )
    return config.text_config


def record_base(config: GradMemConfig, base_model: PreTrainedModel) -> None:
    """Record in a configuration which base it is for: its configuration, its name, and the commit it was loaded at."""
    config.describe_base(base_model.config, base_name(base_model) or config.base_model_name_or_path)
    config.base_model_revision = loaded_commit(config.base_model_name_or_path, config.base_model_revision)


def base_name(base_model: PreTrainedModel) -> str | None:
    """Where the base was loaded from: a Hub repository, an absolute directory, or nothing."""
    name = base_model.name_or_path or ""
    return (os.path.abspath(name) if os.path.isdir(name) else name) or None


def check_attachable(config: GradMemConfig, base_model: PreTrainedModel, adapter: str | os.PathLike) -> None:
    """Refuse to attach an adapter to a base that it was not trained for.

    Where the directory that the adapter names is gone, `config` names the one that the base is in now.

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
    before = config.base_model_name_or_path or ""
    if os.path.isabs(before) and not os.path.isdir(before):
        record_base(config, base_model)
    name, commit = config.base_model_name_or_path or "", config.base_model_revision
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
    recorded, given = recorded_base(config).get_text_config(), base_model.config.get_text_config()
    facts = [(fact, getattr(recorded, fact, None), getattr(given, fact, None)) for fact in _BASE_FACTS]
    return [fact for fact in facts if fact[1] != fact[2]]


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
    name, commit = str(config.base_model_name_or_path), config.base_model_revision
    arguments = {name: value for name, value in arguments.items() if name not in _ADAPTER_ONLY}
    if config._attn_implementation is not None:
        arguments.setdefault("attn_implementation", config._attn_implementation)
    if arguments.get("dtype") == FASTEST:
        arguments["dtype"] = fastest_dtype(config.get_text_config())
    if commit is not None:
        arguments["revision"] = commit
    try:
        _check_no_adapter(name, arguments)
        with unknown_options_refused():
            loaded: Any = AutoModelForCausalLM.from_pretrained(name, output_loading_info=True, **arguments)
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
    base_model, info = loaded
    for fact, recorded, found in _differences(config, base_model):
        raise ValueError(f"{name} has {fact} {found}, but this adapter was made for a base with {recorded}.")
    return base_model, info


def _check_no_adapter(name: str, arguments: dict[str, Any]) -> None:
    """Refuse a base that is an adapter itself, before it is loaded: it may name itself, and never come to an end.

    Raises:
        OSError: there is no such base.
        ValueError: it is an adapter.
    """
    place = {key: arguments[key] for key in (*HUB_ARGUMENTS, "gguf_file") if key in arguments}
    values, _ = PreTrainedConfig.get_config_dict(name, **place)
    if values.get("model_type") == GradMemConfig.model_type:
        raise ValueError(
            f"base_model_name_or_path={name!r} is an adapter itself, not a base. Put the base's name into config.json, "
            "or give it as base_model_name_or_path=."
        )


def adapter_dtype(config: GradMemConfig, device: torch.device | None = None) -> torch.dtype | str:
    """The precision to load an adapter's base in: the fastest on a device; of weights that were trained, their own."""
    return "auto" if config.includes_base else fastest_dtype(config.get_text_config(), device)


def load_base_tokenizer(config: GradMemConfig, hub_arguments: dict[str, Any]) -> PreTrainedTokenizerBase:
    """The tokenizer of the base that an adapter names, at its recorded revision.

    Args:
        config: the adapter's.
        hub_arguments: where and how to fetch it: token, cache, whether the Hub may be asked.

    Raises:
        OSError: there is none.
        ValueError: the base has no name.
    """
    name = config.base_model_name_or_path
    if name is None:
        raise ValueError(
            "This model has no tokenizer: its base has no name to load one from. Pass tokenizer= to "
            "get_gradmem_model, or give input_ids in place of text."
        )
    return open_tokenizer(name, revision=config.base_model_revision, **hub_arguments)
