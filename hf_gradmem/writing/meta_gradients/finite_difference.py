"""The second-order terms of a WRITE step from first-order gradients alone.

A step takes g = ∇_M L(M; θ). Given v, the outer gradient with respect to g, its backward pass needs v·∂g/∂M = H v and
v·∂g/∂θ. Both are the slope of the first-order gradient as the memory moves along v, so central differences give them:

    (H_i v_i, ∂(g_i·v_i)/∂θ) ≈ ‖v_i‖ / 2ρ_i · [∇_{M,θ} L_i(M_i + ρ_i v_i/‖v_i‖) − ∇_{M,θ} L_i(M_i − ρ_i v_i/‖v_i‖)]

for each sample i, with ρ_i = r·‖M_i‖ and an error of order r². Nothing is differentiated twice, so the base keeps its
own attention kernels and activation checkpointing, and a step leaves nothing behind but its memory.
"""

import warnings
from collections.abc import Sequence
from typing import Any

import torch
from torch.autograd.function import once_differentiable

from ...memory.phase import Phase
from ..objectives.objective import Objective
from ..out_of_memory import IN_TRAINING, out_of_memory_explained
from .meta_gradient import MetaGradient, is_sharded
from .replay import Conditions

Tensor = torch.Tensor

# r for the precision that the base computes in: below it rounding, above it curvature makes the larger error on a
# trained model (benchmarks/results/meta_gradient.md). float16 is set between its neighbours by its rounding.
RADIUS = {torch.float64: 1e-4, torch.float32: 5e-4, torch.float16: 6e-3, torch.bfloat16: 1e-2}

# A median bend (see `_warn_if_bent`) above this goes with an error of a quarter and more.
_LARGEST_BEND = 0.5


class FiniteDifference(MetaGradient):
    """The second-order terms from first-order gradients on either side of the memory."""

    def __init__(self, phase: Phase, *, meta_gradient_steps: int | None, meta_gradient_radius: float | None) -> None:
        super().__init__(phase)
        self.steps, self.radius = meta_gradient_steps, meta_gradient_radius

    def __call__(self, objective: Objective, memory: Tensor) -> tuple[Tensor, Tensor]:
        radius = self.radius or RADIUS[self._computation_dtype(memory.device.type)]
        return differenced_gradient(objective, memory, objective.parameters, radius)

    def check_trainable(self) -> None:
        if any(parameter.requires_grad and is_sharded(parameter) for parameter in self.phase.module.parameters()):
            raise ValueError(
                'meta_gradient="finite_difference" gives sharded parameters no gradient, and some that train are. Keep '
                'what trains unsharded, as DDP does, or use meta_gradient="exact".'
            )

    def _computation_dtype(self, device_type: str) -> torch.dtype:
        """The precision that the base computes in."""
        own = self.phase.decoder.base_model.dtype
        autocast = torch.is_autocast_enabled(device_type) and own != torch.float64
        return torch.get_autocast_dtype(device_type) if autocast else own


def differenced_gradient(
    objective: Objective, memory: Tensor, parameters: Sequence[Tensor], radius: float
) -> tuple[Tensor, Tensor]:
    """Each sample's loss and its memory gradient, both differentiable once in the memory and the parameters.

    Args:
        objective: the per-sample losses; evaluated again, on either side, in the backward pass.
        memory: `(batch, num_memory_tokens, width)`.
        parameters: the leaves that train and that `objective` may use. They are inputs of the step, so that each gets
            its gradient once in a backward pass and distributed wrappers see it.
        radius: r, how far the memory is moved to either side, relative to each sample's own norm.

    Returns:
        `(batch,)` and `(batch, num_memory_tokens, width)`.
    """
    return _DifferencedGradient.apply(objective, radius, memory, *parameters)


class _DifferencedGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, objective: Objective, radius: float, memory: Tensor, *parameters: Tensor):
        ctx.objective, ctx.radius, ctx.parameters = objective, radius, parameters
        ctx.conditions = Conditions(memory)
        with torch.enable_grad(), ctx.conditions.now():
            loss, gradient = objective.value_and_gradient(memory)
        ctx.save_for_backward(memory, gradient)
        return loss, gradient

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, loss_adjoint: Tensor, adjoint: Tensor):
        memory, middle = ctx.saved_tensors
        size = torch.linalg.vector_norm(adjoint, dim=(1, 2), keepdim=True)
        scale = torch.linalg.vector_norm(memory, dim=(1, 2), keepdim=True)
        distance = ctx.radius * torch.where(scale > 0, scale, 1.0)
        offset = distance * adjoint / torch.where(size > 0, size, 1.0)
        slope = (size / (2 * distance)).flatten()
        totals: list[Tensor | None] = [None] * (1 + len(ctx.parameters))
        sides = []
        for sign in (1, -1):
            # The loss's own gradient is the mean of those at either side, to the same order: no third pass.
            weights = sign * slope + loss_adjoint / 2
            with out_of_memory_explained(IN_TRAINING), torch.enable_grad(), ctx.conditions.again():
                start = (memory + sign * offset).detach().requires_grad_()
                gradients = torch.autograd.grad(
                    ctx.objective.first_order(start), (start, *ctx.parameters), weights, allow_unused=True
                )
            sides.append(gradients[0] / weights[:, None, None])
            for index, gradient in enumerate(gradients):
                before = totals[index]
                totals[index] = gradient if before is None else before + gradient
        _warn_if_bent(sides[0], middle, sides[1], slope > 0, ctx.radius)
        return None, None, *totals


def _warn_if_bent(above: Tensor, middle: Tensor, below: Tensor, moved: Tensor, radius: float) -> None:
    """Warn where the memory gradient is no straight line over the distance it was moved: its slope then means little.

    A sample's bend is how far the middle lies from the mean of the ends, over half the ends' distance. It grows with r
    where curvature makes the larger error, and with 1/r where rounding does.
    """
    bend = torch.linalg.vector_norm((above + below) / 2 - middle, dim=(1, 2))
    bend = bend / torch.linalg.vector_norm((above - below) / 2, dim=(1, 2))
    bend = bend[moved & bend.isfinite()]
    if len(bend) and bend.median() > _LARGEST_BEND:
        warnings.warn(
            f'meta_gradient="finite_difference" is inaccurate here: over meta_gradient_radius={radius:g} the memory '
            f"gradient bends by {float(bend.median()):.2g} of its own change. Lower the radius; raise it if the base "
            'computes in half precision, whose rounding does the same; or use meta_gradient="exact".',
            stacklevel=2,
        )
