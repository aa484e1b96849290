"""What every way back through a step of WRITE has to offer."""

from abc import ABC, abstractmethod
from typing import Any

import torch
from torch import nn
from torch.distributed.tensor import DTensor

from ...memory.phase import Phase
from ..objectives.objective import Objective

Tensor = torch.Tensor


class MetaGradient(ABC):
    """Takes the gradient of a step so that the outer loss can be differentiated through it.

    The keyword-only arguments of a way back are the options of [`GradMemConfig`] that it reads.

    Attributes:
        steps: how many of the last steps are taken this way; all of them when `None`. The others are first order.
        detaches: whether the memory is cut off from what came before it after every step.
        keeps_graph: whether the graphs of all steps are alive until the backward pass.
    """

    steps: int | None = None
    detaches = False
    keeps_graph = False

    def __init__(self, phase: Phase) -> None:
        self.phase = phase

    @abstractmethod
    def __call__(self, objective: Objective, memory: Tensor) -> tuple[Tensor, Tensor]:
        """Each sample's loss `(batch,)` and its memory gradient, of the memory's shape, both differentiable once."""

    def check_trainable(self) -> None:
        """Refuse to train what would silently get no gradient.

        Raises:
            ValueError: says what, and what to do.
        """

    def compile(self, *arguments: Any, **options: Any) -> bool:
        """Compile what a step spends its time on; `False` where nothing but the base itself is worth it."""
        return False


def is_sharded(parameter: nn.Parameter) -> bool:
    """Whether this is a shard (of FSDP): a run uses other tensors, so it is no input of the run."""
    return isinstance(parameter, DTensor)
