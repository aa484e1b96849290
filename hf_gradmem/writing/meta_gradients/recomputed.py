"""A WRITE step that keeps nothing but its memory and is run again in the backward pass.

The first run needs no second derivative: it is the lean one of test-time WRITE. Only when the step's turn comes in the
backward pass is it run with the graph of its gradient, and that graph is gone before the step before it is run.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch.autograd.function import once_differentiable

from ..objectives.objective import Objective
from ..out_of_memory import IN_TRAINING, out_of_memory_explained
from .replay import Conditions

Tensor = torch.Tensor


def recomputed_gradient(
    objective: Objective,
    loss_and_gradient: Callable[[Tensor], tuple[Tensor, Tensor]],
    memory: Tensor,
    parameters: Sequence[Tensor],
) -> tuple[Tensor, Tensor]:
    """Each sample's loss and its memory gradient, both differentiable once in the memory and the parameters.

    Args:
        objective: the per-sample losses.
        loss_and_gradient: memory → the same two with their graph, for the backward pass.
        memory: `(batch, num_memory_tokens, width)`.
        parameters: the leaves that train and that `objective` may use. They are inputs of the step, so that each gets
            its gradient once in a backward pass and distributed wrappers see it.

    Returns:
        `(batch,)` and `(batch, num_memory_tokens, width)`.
    """
    return _RecomputedGradient.apply(objective, loss_and_gradient, memory, *parameters)


class _RecomputedGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, objective: Objective, loss_and_gradient: Callable, memory: Tensor, *parameters):
        ctx.loss_and_gradient, ctx.parameters, ctx.conditions = loss_and_gradient, parameters, Conditions(memory)
        ctx.save_for_backward(memory)
        with torch.enable_grad():
            with ctx.conditions.now():
                results = objective.value_and_gradient(memory)
            if ctx.conditions.numbers_were_drawn():  # dropout, and another kernel may draw otherwise: run what will be
                with ctx.conditions.again():
                    results = loss_and_gradient(memory.detach().requires_grad_())
        return tuple(result.detach() for result in results)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, of_loss: Tensor, of_gradient: Tensor):
        (memory,) = ctx.saved_tensors
        with out_of_memory_explained(IN_TRAINING):
            with torch.enable_grad(), ctx.conditions.again():
                start = memory.detach().requires_grad_()
                outputs = ctx.loss_and_gradient(start)
            inputs, of_outputs = (start, *ctx.parameters), (of_loss, of_gradient)
            return None, None, *torch.autograd.grad(outputs, inputs, of_outputs, allow_unused=True)
