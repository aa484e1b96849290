"""The exact way back: the gradient of a step is itself differentiated."""

from typing import Any

import torch
from torch.utils.checkpoint import checkpoint

from ...base.attention import twice_differentiable
from ...memory.phase import Phase
from ..objectives.objective import Objective, requiring_gradient
from .compiled import CompiledLossAndGradient, LossAndGradient, loss_and_gradient
from .meta_gradient import MetaGradient, is_sharded
from .recomputed import recomputed_gradient

Tensor = torch.Tensor


class Exact(MetaGradient):
    """With second-order terms, each step recomputed in the backward pass or its graph kept."""

    def __init__(self, phase: Phase, *, meta_gradient_steps: int | None, checkpoint_write_steps: bool) -> None:
        super().__init__(phase)
        self.steps, self.keeps_graph = meta_gradient_steps, not checkpoint_write_steps
        self._loss_and_gradient: LossAndGradient = loss_and_gradient

    def __call__(self, objective: Objective, memory: Tensor) -> tuple[Tensor, Tensor]:
        def with_graph(memory: Tensor) -> tuple[Tensor, Tensor]:
            with twice_differentiable():
                return self._loss_and_gradient(objective, memory)

        if self.keeps_graph:
            return with_graph(requiring_gradient(memory))
        parameters = objective.parameters
        if any(map(is_sharded, parameters)):
            return checkpoint(with_graph, requiring_gradient(memory), use_reentrant=False)
        return recomputed_gradient(objective, with_graph, memory, parameters)

    def compile(self, *arguments: Any, **options: Any) -> bool:
        self.phase.decoder.probe()
        self._loss_and_gradient = CompiledLossAndGradient(self.phase.active, *arguments, **options)
        return True
