"""The inner loop of WRITE: K gradient steps on the memory, and how the outer loss is taken through them."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import nn
from torch.distributed.tensor import DTensor
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel

from .attention import twice_differentiable
from .compiled import LossAndGradient, loss_and_gradient
from .finite_difference import RADIUS, differenced_gradient
from .objective import ReconstructionObjective
from .recomputed import recomputed_gradient
from .update_rules import State, UpdateRule, clip, gradient_norm

Tensor = torch.Tensor


@dataclass(frozen=True)
class WriteTrace:
    """What a write leaves behind.

    Attributes:
        memory: `(batch, num_memory_tokens, hidden_size)`, M_K.
        losses: `(batch, steps)`, each sample's loss before each step; NaN where the sample had already stopped.
        gradient_norms: `(batch, steps)`, norms before clipping.
        last_loss: `(batch,)`, L(M_{K−1}; C), with its graph if that was asked for; `None` without a step.
    """

    memory: Tensor
    losses: Tensor
    gradient_norms: Tensor
    last_loss: Tensor | None


@dataclass(frozen=True)
class InnerLoop:
    """Settings of the descent; the fields are those of [`GradMemConfig`] of the same meaning.

    `parameters` are those that train and that an objective may use: `"finite_difference"` gives them their gradients.
    `loss_and_gradient` is what `"exact"` differentiates through.
    """

    base_model: PreTrainedModel
    update_rule: UpdateRule
    max_grad_norm: float | None
    grad_clip_value: float | None
    meta_gradient: str
    meta_gradient_steps: int | None
    meta_gradient_radius: float | None
    checkpoint_steps: bool
    parameters: Sequence[nn.Parameter] = ()
    loss_and_gradient: LossAndGradient = loss_and_gradient

    def run(
        self,
        objective: ReconstructionObjective,
        memory: Tensor,
        step_sizes: Sequence[Tensor | float],
        *,
        differentiate: bool = False,
        keep_last_loss: bool = False,
        tolerance: float | None = None,
        on_step: Callable[[Tensor], object] = lambda losses: None,
    ) -> WriteTrace:
        """Take one step for each of `step_sizes`: M_{k+1} = M_k − α_k · ∇L(M_k).

        Args:
            objective: the loss to descend.
            memory: `(batch, num_memory_tokens, hidden_size)`, M_0.
            step_sizes: α of each step.
            differentiate: keep what the outer loss needs of the steps. Otherwise every graph is freed at once.
            keep_last_loss: also keep the graph of the last loss, whichever way the steps are differentiated.
            tolerance: stop a sample once its loss is below this.
            on_step: called after each step with the losses `(batch,)` before it, NaN for samples that had stopped.
        """
        steps = len(step_sizes)
        second_order_steps = steps if self.meta_gradient_steps is None else self.meta_gradient_steps
        active = torch.ones(memory.shape[0], dtype=torch.bool, device=memory.device)
        state: State = None
        last_loss = None
        losses, norms = [], []
        for k, step_size in enumerate(step_sizes):
            second_order = differentiate and k >= steps - second_order_steps
            if second_order and self.meta_gradient == "exact":
                stepped, state, last_loss, norm = self._second_order_step(objective, memory, state, step_size)
            elif second_order and self.meta_gradient == "finite_difference":
                stepped, state, last_loss, norm = self._differenced_step(objective, memory, state, step_size)
            else:
                keep = differentiate and keep_last_loss and k == steps - 1
                stepped, state, last_loss, norm = self._first_order_step(objective, memory, state, step_size, keep)
            losses.append(torch.where(active, last_loss.detach(), torch.nan))
            norms.append(torch.where(active, norm.detach(), torch.nan))
            if tolerance is not None:
                active = active & ~(last_loss < tolerance)
                stepped = torch.where(active[:, None, None], stepped, memory)
            detach = not differentiate or self.meta_gradient == "none"
            memory = stepped.detach() if detach else stepped
            on_step(losses[-1])
            if tolerance is not None and not active.any():
                break
        return WriteTrace(
            memory=memory,
            losses=_columns(losses, steps, memory),
            gradient_norms=_columns(norms, steps, memory),
            last_loss=last_loss,
        )

    def _second_order_step(
        self, objective: ReconstructionObjective, memory: Tensor, state: State, step_size: Tensor | float
    ) -> tuple[Tensor, State, Tensor, Tensor]:
        """A step whose gradient is itself differentiable, recomputed in the backward pass if asked for."""

        def loss_and_gradient(memory: Tensor) -> tuple[Tensor, Tensor]:
            with twice_differentiable(self.base_model):
                return self.loss_and_gradient(objective, memory)

        if self.checkpoint_steps and not any(map(is_sharded, self.parameters)):
            loss, gradient = recomputed_gradient(objective, loss_and_gradient, memory, self.parameters)
            return self._update(memory, gradient, state, step_size, loss)
        memory = _requiring_gradient(memory)
        if self.checkpoint_steps:
            loss, gradient = checkpoint(loss_and_gradient, memory, use_reentrant=False)
        else:
            loss, gradient = loss_and_gradient(memory)
        return self._update(memory, gradient, state, step_size, loss)

    def _differenced_step(
        self, objective: ReconstructionObjective, memory: Tensor, state: State, step_size: Tensor | float
    ) -> tuple[Tensor, State, Tensor, Tensor]:
        """A step whose gradient is differentiated by finite differences; the update rule itself by autograd."""
        radius = self.meta_gradient_radius or RADIUS[self._computation_dtype(memory.device.type)]
        gradient, loss = differenced_gradient(objective, memory, self.parameters, radius)
        return self._update(memory, gradient, state, step_size, loss)

    def _computation_dtype(self, device_type: str) -> torch.dtype:
        """The precision that the base computes in."""
        own = self.base_model.dtype
        autocast = torch.is_autocast_enabled(device_type) and own != torch.float64
        return torch.get_autocast_dtype(device_type) if autocast else own

    def _first_order_step(
        self,
        objective: ReconstructionObjective,
        memory: Tensor,
        state: State,
        step_size: Tensor | float,
        keep_loss: bool,
    ) -> tuple[Tensor, State, Tensor, Tensor]:
        """A step whose gradient is a constant to the outer loss; with `keep_loss` its loss is not."""
        if not keep_loss:
            loss, gradient = objective.value_and_gradient(memory)
            return self._update(memory, gradient, state, step_size, loss)
        start = _requiring_gradient(memory)
        loss = objective.first_order(start)
        (gradient,) = torch.autograd.grad(loss.sum(), start, retain_graph=True)
        return self._update(memory, gradient, state, step_size, loss)

    def _update(
        self, memory: Tensor, gradient: Tensor, state: State, step_size: Tensor | float, loss: Tensor
    ) -> tuple[Tensor, State, Tensor, Tensor]:
        clipped = clip(gradient, self.max_grad_norm, self.grad_clip_value)
        stepped, state = self.update_rule(memory, clipped, state, step_size)
        return stepped, state, loss, gradient_norm(gradient.detach())


def is_sharded(parameter: nn.Parameter) -> bool:
    """Whether this is a shard (of FSDP): a run uses other tensors, so it is no input of the run."""
    return isinstance(parameter, DTensor)


def _requiring_gradient(memory: Tensor) -> Tensor:
    return memory if memory.requires_grad else memory.detach().requires_grad_()


def _columns(values: list[Tensor], steps: int, memory: Tensor) -> Tensor:
    """Stack per-step values into `(batch, steps)`, NaN for the steps that were not taken."""
    missing = [memory.new_full((memory.shape[0],), torch.nan)] * (steps - len(values))
    return torch.stack([*values, *missing], dim=1) if steps else memory.new_zeros((memory.shape[0], 0))
