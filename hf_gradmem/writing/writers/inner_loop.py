"""The inner loop of WRITE: K gradient steps on the memory. How they are differentiated is the way back's affair."""

from dataclasses import dataclass

import torch

from ..meta_gradients.meta_gradient import MetaGradient
from ..objectives.objective import Objective
from ..update_rules import State, UpdateRule, clip
from .writer import Descent, WriteTrace

Tensor = torch.Tensor

# Of the samples that are run, the share that may be left for the others to be left out: each number of them is a shape
# of its own to what is compiled.
_WORTH_RUNNING = 7 / 8


@dataclass(frozen=True)
class InnerLoop:
    """Settings of the descent.

    Attributes:
        update_rule: how a gradient moves the memory.
        meta_gradient: how a step is differentiated, where it is.
        of_sum: whether the gradient is that of the sum over a sample's tokens, in place of their mean.
        max_grad_norm, grad_clip_value: clipping of one sample's gradient.
    """

    update_rule: UpdateRule
    meta_gradient: MetaGradient
    of_sum: bool
    max_grad_norm: float | None
    grad_clip_value: float | None

    def run(self, objective: Objective, memory: Tensor, descent: Descent) -> WriteTrace:
        """Take one step for each of the step sizes: M_{k+1} = M_k − α_k · ∇L(M_k).

        Args:
            objective: the loss to descend.
            memory: `(batch, num_memory_tokens, width)`, M_0.
            descent: what is asked for.
        """
        if descent.tolerance is not None:
            return self._run_until(objective, memory, descent, descent.tolerance)
        state: State = None
        last_loss = gradient = None
        losses: list[Tensor] = []
        memories = [memory]
        for k, step_size in enumerate(descent.step_sizes):
            last_loss, gradient = self._loss_and_gradient(objective.at_step(k), memory, k, descent)
            stepped, state = self.update_rule(memory, self._descended(objective, gradient), state, step_size)
            losses.append(last_loss.detach())
            detach = not descent.differentiate or self.meta_gradient.detaches
            memory = stepped.detach() if detach else stepped
            if "memories" in descent.keep:
                memories.append(memory)
            descent.on_step(losses[-1])
        columns = torch.stack(losses, dim=1) if losses else memory.new_zeros((memory.shape[0], 0))
        return WriteTrace(
            memory=memory,
            losses=columns,
            last_loss=last_loss,
            memories=memories if "memories" in descent.keep else (),
            last_gradient=gradient if "last_gradient" in descent.keep else None,
        )

    def _run_until(self, objective: Objective, memory: Tensor, descent: Descent, tolerance: float) -> WriteTrace:
        """The same, without a graph, each sample until its loss is below the tolerance. What has stopped is run no more
        once that leaves an eighth out."""
        memory = memory.detach().clone()
        state: State = None
        columns = memory.new_full((len(memory), len(descent.step_sizes)), torch.nan)
        last_loss = memory.new_full((len(memory),), torch.nan)
        running = torch.arange(len(memory), device=memory.device)  # the samples that the objective is of
        active = torch.ones_like(running, dtype=torch.bool)  # which of these have not stopped
        for k, step_size in enumerate(descent.step_sizes):
            losses, gradient = objective.at_step(k).value_and_gradient(memory[running])
            last_loss[running] = losses
            columns[running, k] = losses.where(active, torch.nan)
            stepped, state = self.update_rule(memory[running], self._descended(objective, gradient), state, step_size)
            active = active & ~(losses < tolerance)
            memory[running[active]] = stepped.detach()[active]
            descent.on_step(columns[:, k])
            left = int(active.sum())
            if not left:
                break
            if left <= len(running) * _WORTH_RUNNING:
                objective, state = objective.of_contexts(active), _of_samples(state, active)
                running, active = running[active], active[active]
        return WriteTrace(memory=memory, losses=columns, last_loss=last_loss if descent.step_sizes else None)

    def _descended(self, objective: Objective, gradient: Tensor) -> Tensor:
        """What the update rule is given, of the gradient of mean losses."""
        if self.of_sum:
            gradient = gradient * objective.rows.num_tokens[:, None, None]
        return clip(gradient, self.max_grad_norm, self.grad_clip_value)

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


def _of_samples(state: State, samples: Tensor) -> State:
    """What an update rule keeps, of some of the samples."""
    return None if state is None else tuple(part[samples] if isinstance(part, Tensor) else part for part in state)
