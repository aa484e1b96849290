"""Keys and values for every layer as the memory (the paper's appendix J)."""

from typing import Literal

import torch
from torch import nn
from transformers import PreTrainedConfig

from ..base.cache_size import cached_elements_per_token
from ..base.decoder import Decoder
from ..base.running import DecoderInputs
from ..base.running import KeyValues as LayerPairs
from .form import MemoryForm

Tensor = torch.Tensor


class KeyValues(MemoryForm):
    """m positions of keys and values in every layer, `(batch, num_memory_tokens, width)` with the layers side by side.

    They start as what the base makes of `memory_init` in a forward pass, and stand in its cache before everything else.
    Behind them stands one input vector that is not written, the last one of `memory_init`: a decoder predicts from
    positions that it runs over, and the first token of a context or an answer has to be predicted from something.

    Args:
        write: `"keys_and_values"`, or `"values"` alone: the memory then holds half as many numbers, and the keys of all
            memories are those of the start.
    """

    def __init__(
        self,
        module: nn.Module,
        decoder: Decoder,
        *,
        num_memory_tokens: int,
        write: Literal["keys_and_values", "values"] = "keys_and_values",
    ) -> None:
        super().__init__(module, decoder, num_memory_tokens=num_memory_tokens)
        if write not in ("keys_and_values", "values"):
            raise ValueError(f"The memory form 'key_values' has write 'keys_and_values' or 'values', got {write!r}.")
        self.values_alone = write == "values"
        self._shapes: list[tuple[int, int]] = []

    @staticmethod
    def positions(num_memory_tokens: int, num_control_tokens: int) -> int:
        return num_memory_tokens + 1

    @staticmethod
    def numbers(text_config: PreTrainedConfig, write: str = "keys_and_values") -> int | None:
        cached = cached_elements_per_token(text_config)
        return cached // (2 if write == "values" else 1) or None

    @property
    def shapes(self) -> list[tuple[int, int]]:
        """Heads, and the numbers in each, of the tensors that a memory holds, layer by layer."""
        if not self._shapes:
            with torch.no_grad():
                self._shapes = [(tensor.shape[1], tensor.shape[3]) for tensor in self._held(self._pairs_of_start())]
        return self._shapes

    @property
    def width(self) -> int:
        return sum(heads * size for heads, size in self.shapes)

    def start(self, batch_size: int) -> Tensor:
        parts = [tensor.transpose(1, 2).flatten(2) for tensor in self._held(self._pairs_of_start())]
        return torch.cat(parts, dim=-1).to(self.module.memory_init.dtype).expand(batch_size, -1, -1)

    def prefix(self, memory: Tensor, start: Tensor | None, end: Tensor | None) -> DecoderInputs:
        dtype = self.decoder.base_model.dtype
        parts = memory.to(dtype).split([heads * size for heads, size in self.shapes], dim=-1)
        written = [part.unflatten(-1, shape).transpose(1, 2) for part, shape in zip(parts, self.shapes, strict=True)]
        if self.values_alone:
            keys = [keys.expand(len(memory), -1, -1, -1) for keys, _ in self._pairs_of_start()]
        else:
            keys, written = written[::2], written[1::2]
        behind = self.module.memory_init[-1:].expand(len(memory), -1, -1).to(dtype)
        return self.decoder.vectors(behind, past=tuple(zip(keys, written, strict=True)))

    def check(self) -> None:
        if not self.decoder.goes_on_from_cache:
            raise ValueError(
                f"memory_form='key_values' needs a base that keeps keys and values of every position in every layer "
                f"and goes on from them, which {self.decoder.name} does not. Use memory_form='input_vectors'."
            )

    def _pairs_of_start(self) -> LayerPairs:
        """What the base makes of `memory_init`, `(1, heads, num_memory_tokens, size)` each."""
        vectors = self.module.memory_init[None].to(self.decoder.base_model.dtype)
        return self.decoder.keys_and_values(self.decoder.vectors(vectors))

    def _held(self, pairs: LayerPairs) -> list[Tensor]:
        """The tensors that a memory holds, layer by layer."""
        return [tensor for pair in pairs for tensor in (pair[1:] if self.values_alone else pair)]
