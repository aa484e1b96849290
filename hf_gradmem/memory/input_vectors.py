"""The paper's form of memory: m vectors that stand in place of token embeddings."""

from typing import Any

import torch
from torch import nn
from transformers import initialization as init

from ..base.decoder import Decoder
from ..base.running import DecoderInputs
from .form import MemoryForm

Tensor = torch.Tensor


class InputVectors(MemoryForm):
    """Vectors `(batch, num_memory_tokens, hidden_size)`, through a projection P if there is one, identity at the start.

    The decoder is given `[start; P(M); end]`; of several memories side by side, `[start; P(M_1); ...; P(M_k); end]`.
    """

    holds_vectors = True
    reads_several = True

    def __init__(
        self,
        module: nn.Module,
        decoder: Decoder,
        *,
        num_memory_tokens: int,
        memory_projection: bool,
        num_control_tokens: int,
    ) -> None:
        super().__init__(module, decoder, num_memory_tokens=num_memory_tokens)
        self.num_control_tokens = num_control_tokens
        width = self.width
        if memory_projection:
            self.module.memory_projection = nn.Linear(width, width, **self.like)

    @property
    def width(self) -> int:
        return self.module.memory_init.shape[1]

    def start(self, batch_size: int) -> Tensor:
        return self.module.memory_init.expand(batch_size, -1, -1)

    def start_parameters(self) -> dict[str, nn.Parameter]:
        return {"memory_init": self.module.memory_init}

    def prefix(self, memory: Tensor, start: Tensor | None, end: Tensor | None) -> DecoderInputs:
        memory = memory.to(self.module.memory_init.dtype)  # it may have been written beside a base of another precision
        if self.module.memory_projection is not None:
            memory = self.module.memory_projection(memory)
        parts = [
            part if part.dim() == 3 else part.expand(memory.shape[0], -1, -1)
            for part in (start, memory, end)
            if part is not None
        ]
        return self.decoder.vectors(torch.cat(parts, dim=1).to(self.decoder.base_model.dtype))

    def extra_tensors(self) -> dict[str, Tensor]:
        projection = self.module.memory_projection
        own = {} if projection is None else dict(projection.named_parameters(prefix="memory_projection"))
        return super().extra_tensors() | own

    def init_module(self, module: Any) -> None:
        if module is self.module.memory_projection:
            init.eye_(module.weight)
            init.zeros_(module.bias)
