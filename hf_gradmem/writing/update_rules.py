"""Update rules of the inner loop, as pure functions of (memory, gradient, state, step size).

Each is differentiable in all its inputs, so that the outer loss can be taken through a write. `state` is `None` before
the first step and a tuple afterwards; shapes are `(batch, num_memory_tokens, width)` throughout.
"""

from collections.abc import Callable

import torch

Tensor = torch.Tensor
State = tuple | None
UpdateRule = Callable[[Tensor, Tensor, State, Tensor | float], tuple[Tensor, State]]

ADAM_EPSILON = 1e-8
CLIP_EPSILON = 1e-6  # torch.nn.utils.clip_grad_norm_ divides by the norm plus this


def sgd() -> UpdateRule:
    """M − α·g, the paper's rule (eq. 4)."""

    def rule(memory: Tensor, gradient: Tensor, state: State, step_size: Tensor | float) -> tuple[Tensor, State]:
        return memory - step_size * gradient, None

    return rule


def momentum(*, write_betas: tuple[float, float]) -> UpdateRule:
    """Heavy-ball momentum as `torch.optim.SGD(momentum=β₁)`: v ← β₁·v + g, M ← M − α·v."""
    beta, _ = write_betas

    def rule(memory: Tensor, gradient: Tensor, state: State, step_size: Tensor | float) -> tuple[Tensor, State]:
        velocity = gradient if state is None else beta * state[0] + gradient
        return memory - step_size * velocity, (velocity,)

    return rule


def adam(*, write_betas: tuple[float, float]) -> UpdateRule:
    """`torch.optim.Adam` with bias correction."""
    beta1, beta2 = write_betas

    def rule(memory: Tensor, gradient: Tensor, state: State, step_size: Tensor | float) -> tuple[Tensor, State]:
        first, second, count = (torch.zeros_like(gradient), torch.zeros_like(gradient), 0) if state is None else state
        count += 1
        first = beta1 * first + (1 - beta1) * gradient
        second = beta2 * second + (1 - beta2) * gradient.square()
        variance = second / (1 - beta2**count)
        # The root's slope at 0 is infinite and would make the meta-gradient NaN where a gradient is exactly 0.
        positive = variance > 0
        deviation = torch.where(positive, variance, 1.0).sqrt() * positive
        update = first / (1 - beta1**count) / (deviation + ADAM_EPSILON)
        return memory - step_size * update, (first, second, count)

    return rule


UPDATE_RULES: dict[str, Callable[..., UpdateRule]] = {"sgd": sgd, "momentum": momentum, "adam": adam}
"""The update rules by name, each made from the options that its keyword-only arguments name."""


def gradient_norm(gradient: Tensor) -> Tensor:
    """Norm of each sample's gradient, `(batch,)`."""
    return torch.linalg.vector_norm(gradient, dim=(1, 2))


def clip(gradient: Tensor, max_norm: float | None, max_value: float | None) -> Tensor:
    """Clip by each sample's own norm, then element-wise. Differentiable; samples do not touch each other."""
    if max_norm is not None:
        scale = (max_norm / (gradient_norm(gradient) + CLIP_EPSILON)).clamp(max=1.0)
        gradient = gradient * scale[:, None, None]
    if max_value is not None:
        gradient = gradient.clamp(-max_value, max_value)
    return gradient
