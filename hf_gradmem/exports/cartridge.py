"""A memory as a CARTRIDGE adapter of stock PEFT: the keys and values that the base makes of its vectors."""

import os
from pathlib import Path
from typing import Any

import torch
from peft import CartridgeConfig, TaskType
from peft.tuners.cartridge.utils import prompt_embeddings_from_past_key_values
from transformers import DynamicCache

from ..base.decoder import Decoder
from ..base.modes import evaluating, settled
from ..base.probes import same_but_for_rounding
from ..base.running import side_by_side
from ..files import save_tensors
from .export import PEFT_WEIGHTS_FILE, StockPrefix

Tensor = torch.Tensor
# Keys and values of each layer, `(1, heads, m + 2n, head_size)` both.
_Cache = list[tuple[Tensor, Tensor]]
_TRIED_TOKENS = 6  # that the base goes on with, to see whether the cache stands for the vectors


def save(prefix: StockPrefix, directory: str | os.PathLike) -> None:
    """Write the adapter's weights and configuration into a directory, which is made if it is missing.

    Raises:
        ValueError: the base keeps anything but equal keys and values of every position, or does not go on from them.
    """
    cache = _key_values(prefix)
    length, (keys, _) = len(prefix.vectors), cache[0]
    save_tensors(
        {"prompt_embeddings": prompt_embeddings_from_past_key_values(cache, num_virtual_tokens=length)},
        Path(directory) / PEFT_WEIGHTS_FILE,
        {"format": "pt"},
    )
    CartridgeConfig(
        task_type=TaskType.CAUSAL_LM,
        base_model_name_or_path=prefix.base_model_name_or_path,
        revision=prefix.base_model_revision,
        inference_mode=True,
        num_virtual_tokens=length,
        num_frozen_tokens=0,
        token_dim=keys.shape[1] * keys.shape[3],
        num_transformer_submodules=1,
        num_attention_heads=keys.shape[1],
        num_layers=len(cache),
    ).save_pretrained(os.fspath(directory))


def _key_values(prefix: StockPrefix) -> _Cache:
    """What the base caches of the vectors, tried out as PEFT would use it."""
    decoder, vectors = prefix.decoder, prefix.vectors[None]
    base_model, length, device = decoder.base_model, vectors.shape[1], vectors.device
    with torch.no_grad(), evaluating(), settled(base_model):
        mask = torch.ones((1, length), dtype=torch.long, device=device)
        output = base_model(inputs_embeds=vectors, attention_mask=mask, use_cache=True)
        layers = getattr(getattr(output, "past_key_values", None), "layers", ())
        cache: list[tuple[Any, Any]] = [
            (getattr(layer, "keys", None), getattr(layer, "values", None)) for layer in layers
        ]
        shapes: set[Any] = {getattr(tensor, "shape", None) for pair in cache for tensor in pair}
        if len(shapes) != 1 or None in shapes or next(iter(shapes))[2] != length:
            raise ValueError(
                f"{decoder.name} does not keep keys and values of one shape for each of {length} positions in every "
                "layer, which is all that a CARTRIDGE adapter holds. Use export_prompt_tuning."
            )
        _check_declared_shape(decoder, *cache[0][0].shape[1::2])
        tokens = torch.linspace(1, decoder.vocab_size - 1, _TRIED_TOKENS, device=device).long()[None]
        inputs = side_by_side([decoder.vectors(vectors), decoder.tokens(tokens, torch.ones_like(tokens))])
        expected = decoder.logits(inputs)[:, length:]
        continued = base_model(
            input_ids=tokens,
            attention_mask=torch.cat([mask, torch.ones_like(tokens)], dim=1),
            past_key_values=DynamicCache([(keys.clone(), values.clone()) for keys, values in cache]),
        ).logits
    if not same_but_for_rounding(continued, expected):
        raise ValueError(
            f"{decoder.name} does not go on from cached keys and values as it does from the memory itself, so a "
            "CARTRIDGE adapter would be read otherwise. Use export_prompt_tuning."
        )
    return cache


def _check_declared_shape(decoder: Decoder, heads: int, head_size: int) -> None:
    """PEFT takes the number and size of the heads from the base's configuration, where that has them."""
    declared = decoder.base_model.config.get_text_config().to_dict()
    if "num_key_value_heads" not in declared:
        return
    expected = (declared["num_key_value_heads"], declared.get("head_dim") or head_size)
    if expected != (heads, head_size):
        raise ValueError(
            f"{decoder.name} caches {heads} heads of size {head_size}, but its configuration says "
            f"{expected[0]} of size {expected[1]}, which is what PEFT would read. Use export_prompt_tuning."
        )
