"""The form of a memory: what its numbers are, where they start, and what the decoder is given for them."""

from abc import ABC, abstractmethod
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedConfig
from transformers import initialization as init

from ..base.decoder import Decoder
from ..base.running import DecoderInputs

Tensor = torch.Tensor

# Tokens of the vocabulary that the embeddings' mean and spread are estimated from; more change neither visibly.
_STATISTICS_TOKENS = 4096


class MemoryForm(ABC):
    """A form of memory, `(batch, num_memory_tokens, width)` in whatever form: the loop and the store know no more.

    It reads its parameters from the model when they are used and keeps no tensor, since loading, resizing and sharding
    replace them. The keyword-only arguments of a form are the options of [`GradMemConfig`] that it reads.

    Attributes:
        module: the model that its parameters are registered on.
        decoder: the base.
        num_memory_tokens: positions of a memory, m in the paper.
        num_control_tokens: vectors that it takes on either side.
        holds_vectors: whether each position is a vector as wide as the decoder's hidden states.
        in_cache: whether a memory stands in the base's cache, before everything else.
        reads_several: whether [`prefix`] takes several memories side by side, `(batch, k · num_memory_tokens, width)`.
    """

    num_control_tokens = 0
    holds_vectors = False
    in_cache = False
    reads_several = False

    # The model is `Any`: its parameters are set and read by name, which no type of a module knows.
    def __init__(self, module: Any, decoder: Decoder, *, num_memory_tokens: int) -> None:
        self.module, self.decoder, self.num_memory_tokens = module, decoder, num_memory_tokens
        module.memory_projection = module.memory_start = None
        module.memory_init = nn.Parameter(torch.empty((num_memory_tokens, self.hidden_size), **self.like))

    @property
    def like(self) -> dict[str, Any]:
        """Device and precision of the parameters beside the base: float32, or float64 on a float64 base."""
        base_model = self.decoder.base_model
        return {
            "device": self.decoder.device,
            "dtype": torch.float64 if base_model.dtype == torch.float64 else torch.float32,
        }

    @property
    def hidden_size(self) -> int:
        """Width of a vector that stands in place of a token's embedding."""
        with torch.no_grad():
            token = torch.zeros((1, 1), dtype=torch.long, device=self.decoder.device)
            return self.decoder.embed(token).shape[-1]

    @property
    def prefix_length(self) -> int:
        """Positions before a context or a query: those of the memory and of what goes with it."""
        return self.positions(self.num_memory_tokens, self.num_control_tokens)

    @staticmethod
    def positions(num_memory_tokens: int, num_control_tokens: int) -> int:
        """[`prefix_length`] of a memory of so many tokens, with so many control vectors on either side."""
        return num_memory_tokens + 2 * num_control_tokens

    @staticmethod
    def numbers(text_config: PreTrainedConfig) -> int | None:
        """[`width`] on a base of this configuration, which need not be loaded; `None` where it cannot be told."""
        return text_config.hidden_size

    @property
    def shape(self) -> tuple[int, int]:
        """Of one memory: its positions, and the numbers in each."""
        return self.num_memory_tokens, self.width

    @property
    @abstractmethod
    def width(self) -> int:
        """Numbers in each position of a memory."""

    @abstractmethod
    def start(self, batch_size: int) -> Tensor:
        """M_0, `(batch, num_memory_tokens, width)`, differentiable in the parameters that it is made from."""

    @property
    def blocks(self) -> list[int]:
        """How the numbers of a position fall into tensors of the base, in order: they add up to [`width`]."""
        return [self.width]

    @torch.no_grad()
    def start_scale(self) -> Tensor:
        """Root mean square of M_0 over each of [`blocks`], `(width,)`, without a gradient."""
        blocks = self.start(1)[0].split(self.blocks, dim=-1)
        return torch.cat([block.square().mean().sqrt().expand(block.shape[-1]) for block in blocks])

    @abstractmethod
    def prefix(self, memory: Tensor, start: Tensor | None, end: Tensor | None) -> DecoderInputs:
        """What the decoder is given before tokens: a row for each memory, with at least one position to predict from.

        Args:
            memory: `(batch, num_memory_tokens, width)`.
            start, end: `(num_control_tokens, hidden_size)` vectors of the phase, to go on either side.
        """

    def start_parameters(self) -> dict[str, nn.Parameter]:
        """What [`set_start`] sets, by the names of the parameters; they are made where there were none.

        Raises:
            ValueError: this form of memory cannot start from a memory.
        """
        raise ValueError(
            f"A memory of the form {type(self).__name__} cannot start from the mean of others: leave out the recipe's "
            "start, or use memory_form='input_vectors' or 'key_values'."
        )

    @torch.no_grad()
    def set_start(self, memory: Tensor) -> None:
        """Make M_0 this memory, `(num_memory_tokens, width)`."""
        (parameter,) = self.start_parameters().values()
        parameter.copy_(memory)

    def extra_tensors(self) -> dict[str, Tensor]:
        """What a memory is made from and read with beside the base, by the names that checkpoints have for it."""
        return {"memory_init": self.module.memory_init}

    def check(self) -> None:
        """Refuse a base that cannot hold this form; called once the base has its weights.

        Raises:
            ValueError: names the base and what it lacks.
        """

    def init_module(self, module: nn.Module) -> None:
        """Give a module of the model its first values if it belongs to the form."""

    def init_vectors(self, names: list[str]) -> None:
        """Fill vectors of the model with the mean embedding plus noise of the embeddings' standard deviation."""
        if self.module.memory_init.device.type == "meta":
            return
        vocabulary = self.decoder.vocab_size
        ids = torch.linspace(0, vocabulary - 1, min(vocabulary, _STATISTICS_TOKENS), device=self.decoder.device)
        embeddings = self.decoder.embed(ids.long()[None])[0].to(self.module.memory_init.dtype)
        mean, spread = embeddings.mean(0), embeddings.std(0)
        for name in names:
            parameter = getattr(self.module, name, None)
            if parameter is not None:
                init.copy_(parameter, mean + spread * torch.randn_like(parameter))
