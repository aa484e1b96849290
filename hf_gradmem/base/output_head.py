"""Cross-entropy through an output head, without the logits of more than a few positions alive at a time.

A token's loss depends on one hidden state alone. So its gradient with respect to that hidden state is known as soon as
its logits are: it is taken there and then, the logits are dropped, and the backward pass is one product. The sums are
those of the plain path; only the order of the work differs. The second derivative, which a meta-gradient takes, depends
on a hidden state's own logits as well, and is made from them again.
"""

from typing import Any, NamedTuple

import torch
from torch.nn import functional

Tensor = torch.Tensor

# Logits held at a time, in elements, and the fewest positions that a product with the head is worth. On a CPU as many
# as the allocator keeps: larger blocks go back to the system each time, and their pages are made anew.
_LOGITS_AT_ONCE = {"cpu": 2**23}
_LOGITS_AT_ONCE_ELSEWHERE = 2**25
_FEWEST_POSITIONS = 128
# Logits that are in float32 at a time, in elements, where a head computes in less: what the caches of a CPU hold.
_IN_FLOAT32_AT_ONCE = {"cpu": 2**19}
_HALF_PRECISION = (torch.float16, torch.bfloat16)


class OutputHead(NamedTuple):
    """A linear head: logits = hidden · weightᵀ + bias.

    Attributes:
        weight: `(vocab, hidden_size)`.
        bias: `(vocab,)`, *optional*.
    """

    weight: Tensor
    bias: Tensor | None = None

    def __call__(self, hidden: Tensor) -> Tensor:
        return functional.linear(hidden, self.weight, self.bias)

    @property
    def trains(self) -> bool:
        """Whether a gradient of its weights is asked for."""
        return any(part is not None and part.requires_grad for part in self)


def head_cross_entropy(hidden: Tensor, head: OutputHead, targets: Tensor) -> Tensor:
    """Negative log-likelihood of each target in nats, `(positions,)`, in float32 or better.

    Differentiable with respect to the hidden states and to the head, and twice with respect to the hidden states alone
    where the head does not train; what is beyond raises.

    Args:
        hidden: `(positions, hidden_size)`, of the head's dtype.
        head: the output head.
        targets: `(positions,)` token ids.
    """
    if not len(targets):  # there is nothing to put together
        return hidden.sum(-1)
    # Views, since weights are frozen by what PyTorch's own operations make of them.
    weight, bias = (part if part is None else part.view_as(part) for part in (head.weight, head.bias))
    return _HeadCrossEntropy.apply(hidden, weight, bias, targets)


class _HeadCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor) -> Tensor:
        head, with_gradient = OutputHead(weight, bias), ctx.needs_input_grad[0]
        losses, gradients = [], []
        for part in _parts(targets, weight):
            loss, exponentials, total = _softmax_parts(head(hidden[part]), targets[part])
            losses.append(loss)
            if with_gradient:  # Σ_v softmax_v · w_v − w_target, normalised after the product: it is narrower
                expected = (exponentials @ weight).to(total.dtype) / total
                gradients.append((expected - weight[targets[part]]).to(hidden.dtype))
        ctx.save_for_backward(torch.cat(gradients) if with_gradient else None, hidden, weight, bias, targets)
        return torch.cat(losses)

    @staticmethod
    def backward(ctx: Any, of_losses: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor | None, None]:
        of_hidden, hidden, weight, bias, targets = ctx.saved_tensors
        trains_head = any(ctx.needs_input_grad[1:3])
        if torch.is_grad_enabled() and trains_head:  # create_graph=True: what follows would be a constant to it
            raise RuntimeError(
                "head_cross_entropy is differentiable once where its head trains. Take the plain loss for a second "
                "derivative."
            )
        if of_hidden is not None:
            of_hidden = _WeightedGradient.apply(of_losses, hidden, of_hidden, weight, bias)
        if not trains_head:
            return of_hidden, None, None, None
        of_weight, of_bias = _of_head(of_losses, ctx.needs_input_grad, hidden, weight, bias, targets)
        return of_hidden, of_weight, of_bias, None


class _WeightedGradient(torch.autograd.Function):
    """The gradient of each hidden state's own loss, times the weight of that loss."""

    @staticmethod
    def forward(
        ctx: Any, of_losses: Tensor, hidden: Tensor, gradient: Tensor, weight: Tensor, bias: Tensor | None
    ) -> Tensor:
        ctx.save_for_backward(of_losses, hidden, gradient, weight, bias)
        return (gradient * of_losses[:, None]).to(gradient.dtype)

    @staticmethod
    def backward(ctx: Any, along: Tensor) -> tuple[Tensor, Tensor, None, None, None]:
        if torch.is_grad_enabled():
            raise RuntimeError(
                "head_cross_entropy is differentiable twice. Take the plain loss for a third derivative."
            )
        of_losses, hidden, gradient, weight, bias = ctx.saved_tensors
        of_weights = (along * gradient).sum(1, dtype=of_losses.dtype)
        of_hidden = [
            _times_hessian(OutputHead(weight, bias), hidden[part], along[part]) for part in _parts(hidden, weight)
        ]
        of_hidden = (torch.cat(of_hidden) * of_losses[:, None]).to(hidden.dtype)
        return of_weights, of_hidden, None, None, None


def _times_hessian(head: OutputHead, hidden: Tensor, along: Tensor) -> Tensor:
    """Wᵀ · (diag(p) − p·pᵀ) · W · `along` of each position, p the softmax of its logits; of the shape of `hidden`."""
    logits, directions = head(hidden), along.to(hidden.dtype) @ head.weight.T
    for own, direction in zip(_few(logits), _few(directions), strict=True):
        softmax = (own.float() if own.dtype in _HALF_PRECISION else own).softmax(dim=1)
        own.copy_(softmax * (direction - (softmax * direction).sum(dim=1, keepdim=True)))
    return logits @ head.weight


def _of_head(
    of_losses: Tensor,
    needed: tuple[bool, ...],
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    targets: Tensor,
) -> tuple[Tensor | None, Tensor | None]:
    """Gradients of the head. They depend on the weight of each loss, so the logits are computed again."""
    of_weight = torch.zeros_like(weight, dtype=of_losses.dtype) if needed[1] else None
    of_bias = torch.zeros_like(bias, dtype=of_losses.dtype) if bias is not None and needed[2] else None
    for part in _parts(targets, weight):
        _, exponentials, total = _softmax_parts(OutputHead(weight, bias)(hidden[part]), targets[part])
        of_logits = exponentials.to(total.dtype).mul_(of_losses[part, None] / total)
        of_logits.scatter_add_(1, targets[part, None], -of_losses[part, None])
        if of_weight is not None:
            of_weight += of_logits.to(hidden.dtype).T @ hidden[part]
        if of_bias is not None:
            of_bias += of_logits.sum(0)
    return (
        None if of_weight is None else of_weight.to(weight.dtype),
        None if bias is None or of_bias is None else of_bias.to(bias.dtype),
    )


def _softmax_parts(logits: Tensor, targets: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Loss `(positions,)`, exp(logits − their largest) and its sum `(positions, 1)`; `logits` is used up.

    The exponentials take the place of the logits, in their dtype; the loss and the sum are in float32 or better.
    """
    if logits.dtype not in _HALF_PRECISION:
        return _softmax_in_place(logits, targets)
    losses, totals = [], []
    parts = _few(logits)
    for own, of_own in zip(parts, targets.split(len(parts[0])), strict=True):
        loss, exponentials, total = _softmax_in_place(own.float(), of_own)
        own.copy_(exponentials)
        losses.append(loss)
        totals.append(total)
    return torch.cat(losses), logits, torch.cat(totals)


def _few(logits: Tensor) -> tuple[Tensor, ...]:
    """Views of the logits of as many positions as are computed with in float32 or better at a time."""
    at_once = _IN_FLOAT32_AT_ONCE.get(logits.device.type, logits.numel())
    return logits.split(max(at_once // logits.shape[1], 1))


def _softmax_in_place(logits: Tensor, targets: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """What [`_softmax_parts`] gives, of logits in float32 or better."""
    of_targets = logits.gather(1, targets[:, None])
    largest = logits.amax(dim=1, keepdim=True)
    exponentials = logits.sub_(largest).exp_()
    total = exponentials.sum(dim=1, keepdim=True)
    return (total.log() + largest - of_targets).squeeze(1), exponentials, total


def _parts(positions: Tensor, weight: Tensor) -> list[slice]:
    at_once = _LOGITS_AT_ONCE.get(weight.device.type, _LOGITS_AT_ONCE_ELSEWHERE)
    size = max(at_once // weight.shape[0], _FEWEST_POSITIONS)
    return [slice(start, start + size) for start in range(0, len(positions), size)]


def cross_entropy(logits: Tensor, targets: Tensor) -> Tensor:
    """Negative log-likelihood of each target, in float32 or better."""
    if logits.dtype in _HALF_PRECISION:
        logits = logits.float()
    return functional.cross_entropy(logits, targets, reduction="none")
