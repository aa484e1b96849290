"""Keys and values for every layer as the memory (the paper's appendix J)."""

from typing import Literal

import torch
from torch import nn

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
        self._width: int | None = None

    @property
    def prefix_length(self) -> int:
        return self.num_memory_tokens + 1

    @property
    def width(self) -> int:
        if self._width is None:
            with torch.no_grad():
                self._width = self.start(1).shape[-1]
        return self._width

    def start(self, batch_size: int) -> Tensor:
        return self._flat(self._pairs_of_start()).expand(batch_size, -1, -1)

    def prefix(self, memory: Tensor, start: Tensor | None, end: Tensor | None) -> DecoderInputs:
        like = self._pairs_of_start()
        parts = memory.to(self.decoder.base_model.dtype).split(
            [tensor[0, :, 0].numel() for tensor in self._held(like)], -1
        )
        written = [
            part.unflatten(-1, (tensor.shape[1], tensor.shape[3])).transpose(1, 2)
            for part, tensor in zip(parts, self._held(like), strict=True)
        ]
        if self.values_alone:
            keys = [keys.expand(len(memory), -1, -1, -1) for keys, _ in like]
            pairs = tuple(zip(keys, written, strict=True))
        else:
            pairs = tuple(zip(written[::2], written[1::2], strict=True))
        behind = self.module.memory_init[-1:].expand(len(memory), -1, -1).to(self.decoder.base_model.dtype)
        return self.decoder.vectors(behind, past=pairs)

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

    def _flat(self, pairs: LayerPairs) -> Tensor:
        """`(rows, num_memory_tokens, width)` in the precision of the parameters."""
        parts = [tensor.transpose(1, 2).flatten(2) for tensor in self._held(pairs)]
        return torch.cat(parts, dim=-1).to(self.module.memory_init.dtype)
