"""What a KV cache takes: measured on a copy of the base without storage, or on the base itself."""

import functools
import json
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedConfig

from .decoder import Decoder

_MOST_RUN = 32_768  # tokens that the base is run over for a figure alone
_CACHE_TOKENS = 8  # the cache's growth is measured from so many tokens to twice as many


def cache_bytes_per_token(text_config: PreTrainedConfig, dtype: str = "float32") -> int | None:
    """What the base's cache grows by with each token, in bytes, measured on a copy of the base without storage.

    A save must not run the base itself, which may be spread over processes.

    Args:
        text_config: of the base.
        dtype: that it computes and caches in.

    Returns:
        `None` where the base keeps no cache that grows, or cannot be run without storage.
    """
    return cached_elements_per_token(text_config) * getattr(torch, dtype).itemsize or None


def cached_elements_per_token(text_config: PreTrainedConfig) -> int:
    """Numbers that the base's cache grows by with each token; 0 where that cannot be told without storage."""
    # A padding token would be looked for in the input, which has no values.
    values = text_config.to_dict() | {"pad_token_id": None}
    return _elements_per_token(json.dumps(values, default=str, sort_keys=True))


@functools.cache
def _elements_per_token(text_config: str) -> int:
    try:
        with torch.random.fork_rng(devices=[]), torch.device("meta"), torch.no_grad():
            config = AutoConfig.for_model(**json.loads(text_config))
            # What runs without storage for most families: masks are not looked at, experts are not grouped by kernels.
            base_model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16, attn_implementation="eager")
            sizes = []
            for length in (_CACHE_TOKENS, 2 * _CACHE_TOKENS):
                output = base_model(input_ids=torch.zeros((1, length), dtype=torch.long), use_cache=True)
                sizes.append(cache_bytes(output.past_key_values))
    except Exception:  # a base with code of its own, or whose shapes depend on its data: the figure is left out
        return 0
    return (sizes[1] - sizes[0]) // _CACHE_TOKENS // torch.bfloat16.itemsize


def cache_bytes(cache: Any) -> int:
    """Bytes of the tensors that a Transformers cache holds, 0 for a cache of another form."""
    held = [value for layer in getattr(cache, "layers", []) for value in vars(layer).values()]
    return sum(value.numel() * value.element_size() for value in held if isinstance(value, torch.Tensor))


@torch.no_grad()
def kv_cache_bytes(decoder: Decoder, num_tokens: int) -> int | None:
    """Measure the cache that the base keeps for a context of `num_tokens` in its prompt.

    Returns:
        Bytes, or `None` where the base keeps no cache of a known form or cannot take so many tokens, or they are more
        than 32,768.
    """
    if num_tokens > min(decoder.window or _MOST_RUN, _MOST_RUN):
        return None
    tokens = torch.zeros((1, num_tokens), dtype=torch.long, device=decoder.device)
    output = decoder.base_model.get_decoder()(input_ids=tokens, use_cache=True)
    return cache_bytes(getattr(output, "past_key_values", None)) or None
