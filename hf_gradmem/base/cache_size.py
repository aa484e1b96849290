"""What a KV cache takes: measured on a copy of the base without storage, or on the base itself."""

import functools
import json
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedConfig

from .decoder import Decoder

_MOST_RUN = 32_768  # tokens that the base is run over for a figure alone
_CACHE_TOKENS = 8  # the cache's growth is measured from so many tokens to twice as many


def expected_cache_bytes(text_config: PreTrainedConfig, num_tokens: int, dtype: str = "float32") -> int:
    """What of the base's cache grows with its tokens, in bytes, at so many; layers with a sliding window keep its last.

    A save must not run the base itself, which may be spread over processes: this runs a copy without storage.

    Args:
        text_config: of the base.
        num_tokens: in the cache.
        dtype: that it computes and caches in.

    Returns:
        0 where the base keeps no cache that grows, or cannot be run without storage.
    """
    kept = sum(numbers * min(num_tokens, most or num_tokens) for numbers, most in _layers_of(text_config))
    return kept * getattr(torch, dtype).itemsize


def cached_elements_per_token(text_config: PreTrainedConfig) -> int:
    """Numbers that the base's cache grows by with each token at first; 0 where that cannot be told without storage."""
    return sum(numbers for numbers, _ in _layers_of(text_config))


def most_cached(text_config: PreTrainedConfig) -> int:
    """Tokens of the longest sliding window's cache, from which on it grows by less with each; 0 without one."""
    return max((most or 0 for _, most in _layers_of(text_config)), default=0)


def _layers_of(text_config: PreTrainedConfig) -> tuple[tuple[int, int | None], ...]:
    # A padding token would be looked for in the input, which has no values.
    values = text_config.to_dict() | {"pad_token_id": None}
    return _growth(json.dumps(values, default=str, sort_keys=True))


@functools.cache
def _growth(text_config: str) -> tuple[tuple[int, int | None], ...]:
    """Of each layer of the cache: numbers that it grows by with each token, and the most tokens if a window ends it."""
    try:
        with torch.random.fork_rng(devices=[]), torch.device("meta"), torch.no_grad():
            config = AutoConfig.for_model(**json.loads(text_config))
            # What runs without storage for most families: masks are not looked at, experts are not grouped by kernels.
            base_model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16, attn_implementation="eager")
            caches = [
                base_model(input_ids=torch.zeros((1, length), dtype=torch.long), use_cache=True).past_key_values
                for length in (_CACHE_TOKENS, 2 * _CACHE_TOKENS)
            ]
        return tuple(
            ((_numbers(later) - _numbers(layer)) // _CACHE_TOKENS, _most_tokens(layer))
            for layer, later in zip(*(cache.layers for cache in caches), strict=True)
        )
    except Exception:  # a base with code of its own, or whose shapes depend on its data: the figure is left out
        return ()


def _most_tokens(layer: Any) -> int | None:
    window = getattr(layer, "sliding_window", None)
    return None if window is None else window - 1  # the next token is the window's last


def _held(layer: Any) -> list[torch.Tensor]:
    return [value for value in vars(layer).values() if isinstance(value, torch.Tensor)]


def _numbers(layer: Any) -> int:
    return sum(tensor.numel() for tensor in _held(layer))


def cache_bytes(cache: Any) -> int:
    """Bytes of the tensors that a Transformers cache holds, 0 for a cache of another form."""
    return sum(
        tensor.numel() * tensor.element_size() for layer in getattr(cache, "layers", []) for tensor in _held(layer)
    )


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
