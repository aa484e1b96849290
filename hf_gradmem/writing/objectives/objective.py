"""An objective of WRITE: losses of tokens, put together for each sample, with the gradients that the loop asks for."""

import copy
import functools
from abc import ABC, abstractmethod

import torch
from torch import nn

from ...base.modes import settled, weights_frozen
from ...memory.phase import Phase
from ..drawn_prompts import DrawnPrompts
from ..rows import ContextRows

Tensor = torch.Tensor


class Objective(ABC):
    """Per-sample loss as a function of the memory `(batch, num_memory_tokens, width)`.

    Losses are in nats, `(batch,)`: the mean over each sample's tokens, and never over the batch, since a sample's
    memory must not depend on its neighbours. A new objective says what each token costs; the rest comes with it.

    Attributes:
        rows: what is written.
        phase: WRITE.
        drawn: what stands before each segment, where it is drawn anew at each step.
    """

    drawn: DrawnPrompts | None = None

    def __init__(self, rows: ContextRows, phase: Phase) -> None:
        self.rows, self.phase = rows, phase

    @abstractmethod
    def token_losses(self, memory: Tensor, rows: ContextRows) -> Tensor:
        """Losses of the scored tokens of some of the rows, `(tokens,)`, differentiable any number of times."""

    def lean_token_losses(self, memory: Tensor, rows: ContextRows) -> Tensor:
        """The same, differentiable once, if that can be had for less."""
        return self.token_losses(memory, rows)

    def __call__(self, memory: Tensor) -> Tensor:
        """Losses that can be differentiated any number of times."""
        with settled(self.phase.decoder.base_model):
            return self._means(self.rows, self.token_losses(memory, self.rows))

    def first_order(self, memory: Tensor) -> Tensor:
        """The same losses, differentiable once: no more logits than those of a few positions are ever held."""
        return torch.stack([self._lean(memory, rows) for rows in self._groups]).sum(0)

    def _lean(self, memory: Tensor, rows: ContextRows) -> Tensor:
        with settled(self.phase.decoder.base_model):
            return self._means(rows, self.lean_token_losses(memory, rows))

    def value_and_gradient(self, memory: Tensor) -> tuple[Tensor, Tensor]:
        """Losses, and the gradient of their sum with respect to the memory, of its shape; neither has a graph.

        The weights are constants meanwhile, so that nothing is kept for the gradient of one, and the graph of each
        group of rows is gone before the next is run.
        """
        losses, gradient = memory.new_zeros(len(memory)), torch.zeros_like(memory)
        with weights_frozen(self.phase.decoder.base_model, self.phase.head):
            for rows in self._groups:
                start = memory.detach().requires_grad_()
                part = self._lean(start, rows)
                gradient = gradient + torch.autograd.grad(part.sum(), start)[0]
                losses = losses + part.detach()
        return losses, gradient

    def kept_value_and_gradient(self, memory: Tensor) -> tuple[Tensor, Tensor]:
        """Losses with their graph, and the gradient of their sum with respect to the memory, without one."""
        start = requiring_gradient(memory)
        losses = self.first_order(start)
        (gradient,) = torch.autograd.grad(losses.sum(), start, retain_graph=True)
        return losses, gradient

    def of_contexts(self, contexts: Tensor) -> "Objective":
        """The same of some of the contexts alone, `(batch,)` True at these."""
        return self._of(self.rows.of_contexts(contexts))

    def at_step(self, step: int) -> "Objective":
        """What a step descends on: the same, or with the words that are drawn for that step."""
        return self if self.drawn is None else self._of(self.drawn.before(self.rows, step))

    def _of(self, rows: ContextRows) -> "Objective":
        other = copy.copy(self)  # with the options of a subclass
        other.rows = rows
        other.__dict__.pop("_groups", None)
        return other

    @property
    def parameters(self) -> list[nn.Parameter]:
        """What trains and may be used: the leaves that a way back gives their gradients."""
        return [parameter for parameter in self.phase.module.parameters() if parameter.requires_grad]

    @functools.cached_property
    def _groups(self) -> list[ContextRows]:
        return self.rows.grouped_by_length()

    @staticmethod
    def _means(rows: ContextRows, token_losses: Tensor) -> Tensor:
        token_sample = rows.of_scored(rows.sample_index[:, None].expand_as(rows.scored))
        sums = token_losses.new_zeros(len(rows.segment_lengths)).index_add(0, token_sample, token_losses)
        return sums / rows.num_tokens


def requiring_gradient(memory: Tensor) -> Tensor:
    """The memory itself if a gradient can be taken with respect to it, else a leaf of the same values."""
    return memory if memory.requires_grad else memory.detach().requires_grad_()
