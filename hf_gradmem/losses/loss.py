"""What a term of the outer loss is made from, and how the terms are put together."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch

from ..memory.written import GradMemMemory
from ..writing.writers.writer import WriteTrace

Tensor = torch.Tensor


@dataclass(frozen=True)
class Passed:
    """What a forward pass leaves for the outer loss.

    Attributes:
        read_loss: `()`, mean cross-entropy over the label tokens of the batch.
        trace: what WRITE left; `None` where a memory was given.
        memory: what was read.
    """

    read_loss: Tensor
    trace: WriteTrace | None
    memory: GradMemMemory


@dataclass(frozen=True)
class TrainingLoss:
    """A term of the outer loss.

    Attributes:
        term: from a forward pass to a scalar; `None` where it has nothing to say.
        needs_last_loss: whether it is differentiated through the last loss of WRITE.
    """

    term: Callable[[Passed], Tensor | None]
    needs_last_loss: bool = False


def outer_loss(passed: Passed, losses: Mapping[str, TrainingLoss], weights: Mapping[str, float]) -> Tensor:
    """The loss of the answers, plus each term times its weight; a term of weight 0 is not computed."""
    total = passed.read_loss
    for name, loss in losses.items():
        term = loss.term(passed) if weights[name] else None
        if term is not None:
            total = total + weights[name] * term
    return total


def needs_last_loss(losses: Mapping[str, TrainingLoss], weights: Mapping[str, float]) -> bool:
    """Whether one of the terms, of a weight other than 0, is differentiated through the last loss of WRITE."""
    return any(loss.needs_last_loss and weights[name] for name, loss in losses.items())
