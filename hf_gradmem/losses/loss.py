"""What a term of the outer loss is made from, and how the terms are put together."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from ..memory.written import GradMemMemory
from ..writing.writers.writer import Kept, WriteTrace

Tensor = torch.Tensor


@dataclass(frozen=True)
class Passed:
    """What a forward pass leaves for the outer loss.

    Attributes:
        read_loss: `()`, mean cross-entropy over the label tokens of the batch.
        trace: what WRITE left; `None` where a memory was given.
        memory: what was read.
        read: the same loss, read from other memories `(batch, num_memory_tokens, width)`.
        scored: `(label tokens, vocab)`, the logits that the loss is made from.
        prompted: the same of the plain base with the context in its prompt, without a graph; `None` where a memory was
            given without its context.
    """

    read_loss: Tensor
    trace: WriteTrace | None
    memory: GradMemMemory
    read: Callable[[Tensor], Tensor]
    scored: Tensor
    prompted: Callable[[], Tensor] | None


@dataclass(frozen=True)
class TrainingLoss:
    """A term of the outer loss.

    Attributes:
        term: from a forward pass to a scalar; `None` where it has nothing to say.
        needs: what of WRITE's trace it is made from, which is kept for it. The configuration refuses the term beside a
            writer that cannot leave it; without a `"last_loss"` the term has nothing to say.
    """

    term: Callable[[Passed], Tensor | None]
    needs: tuple[Kept, ...] = ()


def weight_name(loss: str) -> str:
    """The option that a term is weighted by."""
    return f"{loss}_loss_weight"


def outer_loss(passed: Passed, losses: Mapping[str, TrainingLoss], config: Any) -> Tensor:
    """The loss of the answers, plus each term times its weight; a term of weight 0 is not computed.

    Args:
        passed: what the forward pass left.
        losses: the terms by name.
        config: with the weight of each.
    """
    total = passed.read_loss
    for name, loss in losses.items():
        weight = getattr(config, weight_name(name))
        term = loss.term(passed) if weight else None
        if term is not None:
            total = total + weight * term
    return total


def needed(losses: Mapping[str, TrainingLoss], config: Any) -> tuple[Kept, ...]:
    """What of WRITE's trace the terms of a weight other than 0 are made from."""
    return tuple(part for name, loss in losses.items() if getattr(config, weight_name(name)) for part in loss.needs)
