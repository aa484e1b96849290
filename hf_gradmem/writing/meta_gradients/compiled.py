"""The gradient of a WRITE step as one compiled graph that can itself be differentiated.

A compiled graph has no second derivative, so it must hold the inner gradient, traced together with the loss. What the
outer loss needs is then an ordinary backward pass of that graph.
"""

import warnings
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch._dynamo.exc import FailOnRecompileLimitHit, TorchDynamoException

from ...base.asked import asking
from ...base.fused_attention import FusedTwiceDifferentiable
from ..objectives.objective import Objective
from .replay import Conditions

Tensor = torch.Tensor
LossAndGradient = Callable[[Objective, Tensor], tuple[Tensor, Tensor]]


def loss_and_gradient(objective: Objective, memory: Tensor) -> tuple[Tensor, Tensor]:
    """Losses `(batch,)` and the gradient of their sum, of the memory's shape; both can be differentiated.

    A base that is compiled itself runs uncompiled here.
    """
    with asking(uncompiled=True), FusedTwiceDifferentiable():
        losses = objective(memory)
        (gradient,) = torch.autograd.grad(losses.sum(), memory, create_graph=True)
    return losses, gradient


class CompiledLossAndGradient:
    """[`loss_and_gradient`], compiled at its first call; where that fails it says so once and goes on uncompiled.

    Args:
        conditions: entered around each call: what decides how the base runs and cannot be traced.
        arguments, options: of `torch.compile`.
    """

    def __init__(self, conditions: Callable[[], AbstractContextManager], *arguments: Any, **options: Any) -> None:
        self._conditions = conditions
        self._tried = False
        # Graphs are counted, and limited, for each model by itself. A break in the graph would leave parts without a
        # second derivative: better no graph at all.
        options |= {"fullgraph": True, "isolate_recompiles": True}
        self._compiled: LossAndGradient | None = torch.compile(_traceable, *arguments, **options)

    def __call__(self, objective: Objective, memory: Tensor) -> tuple[Tensor, Tensor]:
        if self._compiled is not None:
            try:
                self._try_once(self._compiled, objective, memory)
                return self._run(self._compiled, objective, memory)
            except (TorchDynamoException, FailOnRecompileLimitHit, _BackwardPassError) as error:
                self._compiled = None
                warnings.warn(
                    "WRITE cannot be compiled here, so training goes on uncompiled, with the same results. To stop "
                    f"this message, leave compile() or torch_compile=True out. The reason: {_reason(error)}",
                    stacklevel=2,
                )
        return loss_and_gradient(objective, memory)

    def _run(self, compiled: LossAndGradient, objective: Objective, memory: Tensor) -> tuple[Tensor, Tensor]:
        with self._conditions(), torch._dynamo.config.patch(trace_autograd_ops=True):
            return compiled(objective, memory.clone(memory_format=torch.contiguous_format))

    def _try_once(self, compiled: LossAndGradient, objective: Objective, memory: Tensor) -> None:
        """Run both passes for nothing, once: the backward pass is compiled when it runs, too late to fall back."""
        if self._tried:
            return
        self._tried = True
        with Conditions(memory).again():
            results = self._run(compiled, objective, memory)
            try:
                torch.autograd.grad(results, memory, [torch.zeros_like(result) for result in results])
            except Exception as error:  # a compiler's own, of any type
                raise _BackwardPassError(str(error)) from error


class _BackwardPassError(Exception):
    """The backward pass could not be compiled."""


def _traceable(objective: Objective, memory: Tensor) -> tuple[Tensor, Tensor]:
    losses = objective(memory)
    (gradient,) = torch.autograd.grad(losses.sum(), memory, create_graph=True)
    return losses, gradient


def _reason(error: Exception) -> str:
    """The first two lines of what the compiler says: what it is about, and what was raised."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return " ".join(lines[:2]) or type(error).__name__
