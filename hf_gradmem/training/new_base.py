"""Bases with random weights, for recipes that train one."""

import difflib
from collections.abc import Mapping
from dataclasses import fields
from typing import Any

import torch
from huggingface_hub.errors import StrictDataclassError
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)


def new_base(values: dict[str, Any], tokenizer: PreTrainedTokenizerBase, dtype: torch.dtype | str) -> PreTrainedModel:
    """A base as a recipe's `base_config` describes it, for a tokenizer.

    Raises:
        ValueError: an option is misspelt, or there is no such base.
    """
    special = {
        "vocab_size": len(tokenizer),
        "pad_token_id": tokenizer.pad_token_id,
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
    }
    precision = {} if dtype == "auto" else {"dtype": dtype}  # which is for weights that are loaded
    try:
        config = AutoConfig.for_model(**special | values)
    except StrictDataclassError as error:
        raise ValueError(f"base_config makes no base: {error.__cause__ or error}") from error
    _check_spelling(values, config)
    return AutoModelForCausalLM.from_config(config, **precision)


def _check_spelling(values: Mapping[str, Any], config: PreTrainedConfig) -> None:
    """Refuse a misspelt option of a base: its configuration would keep it beside the default of what was meant.

    What merely stands in no list is left alone: a configuration takes some names of old.
    """
    known = {field.name for field in fields(type(config))} | set(config.attribute_map)
    for name in values.keys() - known:
        if nearest := difflib.get_close_matches(name, known, n=1, cutoff=0.85):
            raise ValueError(f"base_config has {name!r}, which {config.model_type} has not. Is it {nearest[0]!r}?")
