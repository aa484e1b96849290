"""A memory in formats that others read: a KV prefix for stock PEFT, prompt embeddings for serving engines.

Both hold what READ puts before a query, `[r_start; P(M_K); r_end]`, so that the reader needs the base and nothing else.
`export_prompt_tuning`, the third of its kind, is in `saving.py`.
"""

import os
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from peft import CartridgeConfig, TaskType
from peft.tuners.cartridge.utils import prompt_embeddings_from_past_key_values
from transformers import DynamicCache

from .decoder import modules_in_eval, same_but_for_rounding
from .files import save_tensors
from .memory import GradMemMemory

if TYPE_CHECKING:
    from .modeling_gradmem import GradMemForCausalLM

Tensor = torch.Tensor
PROMPT_EMBEDS_FILE = "prompt_embeds.safetensors"


class ExportMixin:
    """The part of [`GradMemForCausalLM`] that hands memories to other programs."""

    def export_cartridge(self, memory: GradMemMemory, save_directory: str | os.PathLike) -> None:
        """Write one memory as a stock PEFT CARTRIDGE adapter: the keys and values of its m + 2n vectors in each layer.

        `peft.PeftModel.from_pretrained(base, save_directory)` then reads it without this package, left-padded batches
        included. (On a base with sliding windows, give PEFT prompts of one length: there it masks padding wrongly.)
        The file is larger than that of `export_prompt_tuning` by the factor that a cache is larger than embeddings;
        the base need not run over the memory again.

        Args:
            memory: a batch of one.
            save_directory: where to.

        Raises:
            ValueError: several memories were given, or READ uses weights that the named base does not have, or the
                base keeps anything but equal keys and values of every position, or does not go on from them.
        """
        prefix = stock_prefix(self, memory)
        cache = _key_value_prefix(self, prefix)
        keys, _ = cache[0]
        save_tensors(
            {"prompt_embeddings": prompt_embeddings_from_past_key_values(cache, num_virtual_tokens=prefix.shape[1])},
            Path(save_directory) / "adapter_model.safetensors",
            {"format": "pt"},
        )
        CartridgeConfig(
            task_type=TaskType.CAUSAL_LM,
            base_model_name_or_path=self.config.base_model_name_or_path,
            revision=self.config.base_model_revision,
            inference_mode=True,
            num_virtual_tokens=prefix.shape[1],
            num_frozen_tokens=0,
            token_dim=keys.shape[1] * keys.shape[3],
            num_transformer_submodules=1,
            num_attention_heads=keys.shape[1],
            num_layers=len(cache),
        ).save_pretrained(save_directory)

    def export_prompt_embeds(self, memory: GradMemMemory, file: str | os.PathLike) -> None:
        """Write one memory as prompt embeddings `(m + 2n, hidden_size)`, for engines that take them before the prompt.

        The file is safetensors with one tensor, `prompt_embeds`, in the base's precision; its header names the base.
        The reader puts the embeddings of the prompt's tokens behind it.

        Args:
            memory: a batch of one.
            file: where to; its directory is made if it is missing.

        Raises:
            ValueError: several memories were given, or READ uses weights that the named base does not have, or the
                base cannot be run on embeddings.
        """
        header = {"format": "pt", "base_model_name_or_path": str(self.config.base_model_name_or_path)}
        if self.config.base_model_revision is not None:
            header["base_model_revision"] = self.config.base_model_revision
        save_tensors({"prompt_embeds": stock_prefix(self, memory)[0]}, Path(file), header)


def stock_prefix(model: "GradMemForCausalLM", memory: GradMemMemory) -> Tensor:
    """`[r_start; P(M_K); r_end]` of one memory, `(1, m + 2n, hidden_size)`, if the named base alone reads it aright.

    Raises:
        ValueError: it does not, or several memories were given.
    """
    model._check_memory(memory)
    if len(memory) != 1:
        raise ValueError(f"An export holds one memory, got {len(memory)}. Index the one to export.")
    config = model.config
    if config.read_lora is not None or config.includes_base:
        reason = "a LoRA in READ" if config.read_lora is not None else "a base that is saved with the adapter"
        raise ValueError(
            f"This model reads with {reason}, which the base that another program would load "
            f"({config.base_model_name_or_path}) does not have. Such a memory cannot be exported."
        )
    if not model.decoder.embeddings_suffice:
        raise ValueError(
            f"{type(model.base_model).__name__} does not make the same of embedded tokens as of token ids, and another "
            "program would give it embeddings. Such a memory cannot be exported."
        )
    with torch.no_grad():
        return model._prefix(memory.to(model.device).embeddings, model.read_start, model.read_end)


def _key_value_prefix(model: "GradMemForCausalLM", prefix: Tensor) -> list[tuple[Tensor, Tensor]]:
    """Keys and values `(1, heads, m + 2n, head_size)` of the prefix in each layer, tried out as PEFT would use them."""
    base_model, name = model.base_model, type(model.base_model).__name__
    with torch.no_grad(), modules_in_eval(base_model):
        mask = torch.ones(prefix.shape[:2], dtype=torch.long, device=prefix.device)
        output = base_model(inputs_embeds=prefix, attention_mask=mask, use_cache=True)
        layers = getattr(getattr(output, "past_key_values", None), "layers", ())
        cache = [(getattr(layer, "keys", None), getattr(layer, "values", None)) for layer in layers]
        shapes = {getattr(tensor, "shape", None) for pair in cache for tensor in pair}
        if len(shapes) != 1 or None in shapes or next(iter(shapes))[2] != prefix.shape[1]:
            raise ValueError(
                f"{name} does not keep keys and values of one shape for each of {prefix.shape[1]} positions in every "
                "layer, which is all that a CARTRIDGE adapter holds. Use export_prompt_tuning."
            )
        _check_declared_shape(model, *cache[0][0].shape[1::2])
        tokens = torch.linspace(1, model.vocab_size - 1, 6, device=prefix.device).long()[None]
        expected = model.decoder.logits(
            torch.cat([prefix, model.decoder.embed(tokens)], dim=1),
            torch.cat([mask, torch.ones_like(tokens)], dim=1),
            torch.cat([model.decoder.prefix_ids(prefix), tokens], dim=1),
        )[:, prefix.shape[1] :]
        continued = base_model(
            input_ids=tokens,
            attention_mask=torch.cat([mask, torch.ones_like(tokens)], dim=1),
            past_key_values=DynamicCache([(keys.clone(), values.clone()) for keys, values in cache]),
        ).logits
    if not same_but_for_rounding(continued, expected):
        raise ValueError(
            f"{name} does not go on from cached keys and values as it does from the memory itself, so a CARTRIDGE "
            "adapter would be read otherwise. Use export_prompt_tuning."
        )
    return cache


def _check_declared_shape(model: "GradMemForCausalLM", heads: int, head_size: int) -> None:
    """PEFT takes the number and size of the heads from the base's configuration, where that has them."""
    declared = model.base_model.config.get_text_config().to_dict()
    if "num_key_value_heads" not in declared:
        return
    expected = (declared["num_key_value_heads"], declared.get("head_dim") or head_size)
    if expected != (heads, head_size):
        raise ValueError(
            f"{type(model.base_model).__name__} caches {heads} heads of size {head_size}, but its configuration says "
            f"{expected[0]} of size {expected[1]}, which is what PEFT would read. Use export_prompt_tuning."
        )


__all__ = ["PROMPT_EMBEDS_FILE", "ExportMixin", "stock_prefix"]
