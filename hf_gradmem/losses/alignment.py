"""How far WRITE moves the memory otherwise than READ would: 1 − cosine of their gradients at M_{K−1}.

WRITE cannot see the questions, but outer training can, so it can shape what WRITE descends on until its last step goes
where the answers want it. Both gradients are taken at the memory that the last step starts from, before clipping and
the update rule, and both are differentiated: WRITE's as far as its way back is (where that is first order it is a
constant, and READ alone learns), READ's exactly. The GradMem authors' auxiliary loss (their reports, not the paper)
compares each step with READ's gradient at the memory behind it, and holds the latter fixed.
"""

import torch

from ..base.asked import asking
from ..base.attention import twice_differentiable
from ..base.fused_attention import FusedTwiceDifferentiable
from ..writing.objectives.objective import requiring_gradient
from .loss import Passed, TrainingLoss

Tensor = torch.Tensor


def misalignment(passed: Passed) -> Tensor | None:
    """Mean over the contexts, in 0..2; `None` without a step of WRITE.

    A context without a label, or without a gradient in either phase, has no direction and is left out.
    """
    if passed.trace is None or passed.trace.last_gradient is None:
        return None
    of_write = _directions(passed.trace.last_gradient)
    of_read = _directions(_read_gradient(passed, passed.trace.memories[-2]))
    both = of_write.any(dim=1) & of_read.any(dim=1)
    return (1 - (of_write * of_read).sum(dim=1)).where(both, 0).sum() / both.sum().clamp(min=1)


def _directions(gradient: Tensor) -> Tensor:
    """Each context's gradient as a row of length 1, `(batch, num_memory_tokens · width)`; 0 stays 0.

    Divided by its own length and no bound on it: where the answers are known, READ's gradient is very small.
    """
    rows = gradient.flatten(1)
    length = torch.linalg.vector_norm(rows, dim=1, keepdim=True)
    return rows / length.where(length > 0, 1)


def _read_gradient(passed: Passed, memory: Tensor) -> Tensor:
    """Of the answer loss with respect to a memory, of its shape; with its graph if gradients are enabled."""
    differentiate = torch.is_grad_enabled()
    with (
        torch.inference_mode(False),
        torch.enable_grad(),
        twice_differentiable(),
        asking(uncompiled=True),
        FusedTwiceDifferentiable(),
    ):
        start = requiring_gradient(memory)
        (gradient,) = torch.autograd.grad(passed.read(start), start, create_graph=differentiate)
    return gradient


ALIGNMENT = TrainingLoss(misalignment, needs=("memories", "last_gradient"))
