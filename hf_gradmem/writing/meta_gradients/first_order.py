"""Steps whose gradient is a constant to the outer loss."""

import torch

from ..objectives.objective import Objective
from .meta_gradient import MetaGradient

Tensor = torch.Tensor


class FirstOrder(MetaGradient):
    """The outer gradient passes from one memory to the one before it, and not through the gradient between them."""

    steps = 0

    def __call__(self, objective: Objective, memory: Tensor) -> tuple[Tensor, Tensor]:
        return objective.kept_value_and_gradient(memory)


class Detached(FirstOrder):
    """The outer gradient reaches no further back than the last memory."""

    detaches = True

    def check_trainable(self) -> None:
        module = self.phase.module
        start = module.memory_init if module.memory_start is None else module.memory_start
        silent = [start, module.write_log_learning_rate]
        if not module.config.reconstruction_loss_weight:  # whose gradient is at a fixed memory
            silent += self.phase.own_parameters()
        trains = [p for p in module.parameters() if p.requires_grad and all(p is not other for other in silent)]
        if not trains:
            raise ValueError(
                'meta_gradient="none" cuts the outer gradient at every write step, and nothing trains here but the '
                "memory's start and what is WRITE's own. "
                'Use meta_gradient="exact" or "first_order", or train something else as well.'
            )
