"""Keys and values for every layer as the memory (the paper's appendix J)."""

from typing import Literal

import torch
from torch import nn
from transformers import PreTrainedConfig
from transformers import initialization as init

from ..base.cache_size import cached_elements_per_token
from ..base.decoder import Decoder
from ..base.lora import other_adapters
from ..base.modes import makes_constants
from ..base.running import DecoderInputs
from ..base.running import KeyValues as LayerPairs
from ..base.weights import Cached, base_weights
from .form import MemoryForm

Tensor = torch.Tensor


class KeyValues(MemoryForm):
    """m positions of keys and values in every layer, `(batch, num_memory_tokens, width)` with the layers side by side.

    They start as what the base makes of `memory_init` in a forward pass, or as numbers of their own, and stand in its
    cache before everything else.
    Behind them stands one input vector that is not written, the last one of `memory_init`: a decoder predicts from
    positions that it runs over, and the first token of a context or an answer has to be predicted from something.

    Several memories side by side are the positions of all of them in the cache, each with the keys that it was written
    with: what a base does to a key by its place, such as rotating it, is that of the place in its own memory.

    Args:
        write: `"keys_and_values"`, or `"values"` alone: the memory then holds half as many numbers, and the keys of all
            memories are those of `memory_init`.
        own_start: `True` makes M_0 a parameter, `memory_start` of the shape of a memory, which begins as what the base
            makes of `memory_init`. It can then become the mean of memories, and be trained by itself. The
            configuration keeps [`width`] in its place: a checkpoint is opened before the base can be run.
    """

    in_cache = reads_several = True

    def __init__(
        self,
        module: nn.Module,
        decoder: Decoder,
        *,
        num_memory_tokens: int,
        write: Literal["keys_and_values", "values"] = "keys_and_values",
        own_start: bool | int = False,
    ) -> None:
        super().__init__(module, decoder, num_memory_tokens=num_memory_tokens)
        if write not in ("keys_and_values", "values"):
            raise ValueError(f"The memory form 'key_values' has write 'keys_and_values' or 'values', got {write!r}.")
        self._write, self.values_alone = write, write == "values"
        self._shapes: list[tuple[int, int]] = []
        self._kept = Cached(self._run_start)
        if own_start:
            width = self.width if own_start is True else own_start
            self._add_start(torch.empty((num_memory_tokens, width), **self.like))

    @staticmethod
    def positions(num_memory_tokens: int, num_control_tokens: int) -> int:
        return num_memory_tokens + 1

    @staticmethod
    def numbers(text_config: PreTrainedConfig, write: str = "keys_and_values", own_start: int = 0) -> int | None:
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
    def blocks(self) -> list[int]:
        return [heads * size for heads, size in self.shapes]

    @property
    def width(self) -> int:
        return sum(self.blocks)

    def start(self, batch_size: int) -> Tensor:
        own = self.module.memory_start
        return (self._start_of_base() if own is None else own[None]).expand(batch_size, -1, -1)

    def start_parameters(self) -> dict[str, nn.Parameter]:
        if self.module.memory_start is None:
            self._add_start(self._start_of_base()[0].detach().clone())
        return {"memory_start": self.module.memory_start}

    def extra_tensors(self) -> dict[str, Tensor]:
        own = self.module.memory_start
        return super().extra_tensors() | ({} if own is None else {"memory_start": own})

    def init_vectors(self, names: list[str]) -> None:
        super().init_vectors(names)
        if self.module.memory_start is not None and self.module.memory_start.device.type != "meta":
            init.copy_(self.module.memory_start, self._start_of_base()[0])

    def prefix(self, memory: Tensor, start: Tensor | None, end: Tensor | None) -> DecoderInputs:
        dtype = self.decoder.base_model.dtype
        parts = memory.to(dtype).split(self.blocks, dim=-1)
        written = [part.unflatten(-1, shape).transpose(1, 2) for part, shape in zip(parts, self.shapes, strict=True)]
        if self.values_alone:
            times = memory.shape[1] // self.num_memory_tokens
            keys = [keys.repeat(1, 1, times, 1).expand(len(memory), -1, -1, -1) for keys, _ in self._pairs_of_start()]
        else:
            keys, written = written[::2], written[1::2]
        behind = self.module.memory_init[-1:].expand(len(memory), -1, -1).to(dtype)
        return self.decoder.vectors(behind, past=tuple(zip(keys, written, strict=True)))

    def check(self) -> None:
        decoder, count = self.decoder, self.num_memory_tokens
        if not decoder.keeps_in_cache(count):
            fewer = ", or a smaller num_memory_tokens" if decoder.goes_on_from_cache else ""
            raise ValueError(
                f"memory_form='key_values' needs a base that keeps keys and values of all {count} positions in every "
                f"layer and goes on from them, which {decoder.name} does not. Use memory_form='input_vectors'{fewer}."
            )

    def _pairs_of_start(self) -> LayerPairs:
        """What the base makes of `memory_init`, `(1, heads, num_memory_tokens, size)` each.

        Every step of WRITE and every question asks for it, so it is kept where no gradient is to come through it.
        """
        base_model, vectors = self.decoder.base_model, self.module.memory_init
        if not makes_constants(base_model, vectors) or other_adapters(base_model):
            return self._run_start()
        with torch.no_grad():
            return self._kept(base_weights(base_model) | {"memory_init": vectors}, torch.is_inference_mode_enabled())

    def _run_start(self, *_: object) -> LayerPairs:
        vectors = self.module.memory_init[None].to(self.decoder.base_model.dtype)
        return self.decoder.keys_and_values(self.decoder.vectors(vectors))

    def _add_start(self, values: Tensor) -> None:
        self.module.memory_start = nn.Parameter(values)
        settings = {"write": self._write, "own_start": values.shape[1]}
        self.module.config.memory_form = {"name": "key_values"} | settings

    def _start_of_base(self) -> Tensor:
        """What the base makes of `memory_init`, as a memory `(1, num_memory_tokens, width)`."""
        parts = [tensor.transpose(1, 2).flatten(2) for tensor in self._held(self._pairs_of_start())]
        return torch.cat(parts, dim=-1).to(self.module.memory_init.dtype)

    def _held(self, pairs: LayerPairs) -> list[Tensor]:
        """The tensors that a memory holds, layer by layer."""
        return [tensor for pair in pairs for tensor in (pair[1:] if self.values_alone else pair)]
