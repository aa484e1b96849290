"""The inner loop of WRITE: K gradient steps on the memory. How they are differentiated is the way back's affair."""

from dataclasses import dataclass

import torch

from ..meta_gradients.meta_gradient import MetaGradient
from ..objectives.objective import Objective
from ..update_rules import State, UpdateRule, clip
from .writer import Descent, WriteTrace

Tensor = torch.Tensor


@dataclass(frozen=True)
class InnerLoop:
    """Settings of the descent.

    Attributes:
        update_rule: how a gradient moves the memory.
        meta_gradient: how a step is differentiated, where it is.
        max_grad_norm, grad_clip_value: clipping of one sample's gradient.
    """

    update_rule: UpdateRule
    meta_gradient: MetaGradient
    max_grad_norm: float | None
    grad_clip_value: float | None

    def run(self, objective: Objective, memory: Tensor, descent: Descent) -> WriteTrace:
        """Take one step for each of the step sizes: M_{k+1} = M_k − α_k · ∇L(M_k).

        Args:
            objective: the loss to descend.
            memory: `(batch, num_memory_tokens, width)`, M_0.
            descent: what is asked for.
        """
        steps = len(descent.step_sizes)
        active = torch.ones(memory.shape[0], dtype=torch.bool, device=memory.device)
        state: State = None
        last_loss = gradient = None
        losses: list[Tensor] = []
        memories = [memory]
        for k, step_size in enumerate(descent.step_sizes):
            last_loss, gradient = self._loss_and_gradient(objective, memory, k, descent)
            clipped = clip(gradient, self.max_grad_norm, self.grad_clip_value)
            stepped, state = self.update_rule(memory, clipped, state, step_size)
            losses.append(torch.where(active, last_loss.detach(), torch.nan))
            if descent.tolerance is not None:
                active = active & ~(last_loss < descent.tolerance)
                stepped = torch.where(active[:, None, None], stepped, memory)
            detach = not descent.differentiate or self.meta_gradient.detaches
            memory = stepped.detach() if detach else stepped
            if "memories" in descent.keep:
                memories.append(memory)
            descent.on_step(losses[-1])
            if descent.tolerance is not None and not active.any():
                break
        missing = [memory.new_full((memory.shape[0],), torch.nan)] * (steps - len(losses))
        columns = torch.stack([*losses, *missing], dim=1) if steps else memory.new_zeros((memory.shape[0], 0))
        return WriteTrace(
            memory=memory,
            losses=columns,
            last_loss=last_loss,
            memories=memories if "memories" in descent.keep else (),
            last_gradient=gradient if "last_gradient" in descent.keep else None,
        )

    def _loss_and_gradient(
        self, objective: Objective, memory: Tensor, k: int, descent: Descent
    ) -> tuple[Tensor, Tensor]:
        """Of step k, with as much of a graph as the outer loss needs."""
        steps, way_back = len(descent.step_sizes), self.meta_gradient
        if descent.differentiate and k >= steps - (steps if way_back.steps is None else way_back.steps):
            return way_back(objective, memory)
        if descent.differentiate and "last_loss" in descent.keep and k == steps - 1:
            return objective.kept_value_and_gradient(memory)
        return objective.value_and_gradient(memory)
