"""What every export is made from: the vectors of one memory that the named base, by itself, reads as READ does."""

from dataclasses import dataclass

import torch

from ..base.decoder import Decoder
from ..base.running import DecoderInputs

Tensor = torch.Tensor
# What PEFT calls the weights of an adapter.
PEFT_WEIGHTS_FILE = "adapter_model.safetensors"


@dataclass(frozen=True)
class StockPrefix:
    """One memory as stock programs take it: vectors to put before the embeddings of a query.

    Attributes:
        vectors: `[r_start; P(M_K); r_end]`, `(m + 2n, hidden_size)`, in the base's dtype.
        decoder: the base that reads them.
        base_model_name_or_path: where that base is loaded from.
        base_model_revision: its revision on the Hub, *optional*.
    """

    vectors: Tensor
    decoder: Decoder
    base_model_name_or_path: str | None
    base_model_revision: str | None = None


def stock_prefix(
    prefix: DecoderInputs,
    decoder: Decoder,
    *,
    base_model_name_or_path: str | None,
    base_model_revision: str | None,
    reads_with_lora: bool,
    includes_base: bool,
) -> StockPrefix:
    """The prefix of one memory, if the named base alone reads it as this model does.

    Args:
        prefix: what READ puts before a query, for a batch of one memory.
        decoder: the base.
        base_model_name_or_path: the name under which another program would load the base.
        base_model_revision: at this revision.
        reads_with_lora: whether READ has a LoRA, which that base does not have.
        includes_base: whether the base is saved with the adapter, and so is not the one that its name stands for.

    Raises:
        ValueError: it would be read otherwise, or several memories were given.
    """
    if len(prefix.embeddings) != 1:
        raise ValueError(f"An export holds one memory, got {len(prefix.embeddings)}. Index the one to export.")
    if reads_with_lora or includes_base:
        reason = "a LoRA in READ" if reads_with_lora else "a base that is saved with the adapter"
        raise ValueError(
            f"This model reads with {reason}, which the base that another program would load "
            f"({base_model_name_or_path}) does not have. Such a memory cannot be exported."
        )
    if not decoder.embeddings_suffice:
        raise ValueError(
            f"{decoder.name} does not make the same of embedded tokens as of token ids, and another program would give "
            "it embeddings. Such a memory cannot be exported."
        )
    if prefix.past is not None:
        raise ValueError(
            "This memory holds keys and values for each layer, and the stock formats that are written here hold input "
            "vectors. Such a memory cannot be exported."
        )
    return StockPrefix(prefix.embeddings[0], decoder, base_model_name_or_path, base_model_revision)
