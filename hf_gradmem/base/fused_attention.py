"""Scaled dot-product attention on fused kernels with a second derivative.

A fused kernel has one backward pass, which cannot be differentiated. Here its forward and backward pass are used as
they are, and only the derivative of the backward pass is worked out by hand, on blocks of scores small enough to stay
in the cache. No matrix of positions × positions is kept, where PyTorch's own twice differentiable backend keeps many.

What a position that sees nothing gives is whatever the kernel gives it, in its derivatives too; nothing reads it here.

With S = scale·QKᵀ + mask, P = softmax(S), O = PV, and the gradient dO of the output:

    dP = dO·Vᵀ    dS = P∘(dP − rowsum(P∘dP))    dQ = scale·dS·K    dK = scale·dSᵀ·Q    dV = Pᵀ·dO
"""

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch.autograd.function import once_differentiable
from torch.nn import functional
from torch.overrides import TorchFunctionMode

Tensor = torch.Tensor

# Scores held at a time, in elements: what the caches of a CPU hold; on an accelerator few launches count for more.
_SCORES_AT_ONCE = {"cpu": 2**18}
_SCORES_AT_ONCE_ELSEWHERE = 2**26
_QUERIES_AT_ONCE = 256
# Keys from which on this is the faster way (benchmarks/results/performance_cpu.md).
_SHORTEST = 128


class FusedTwiceDifferentiable(TorchFunctionMode):
    """For a span, every call of PyTorch's SDPA that [`fused_attention`] can stand in for goes there."""

    def __torch_function__(self, function: Any, types: Any, arguments: tuple = (), options: dict | None = None) -> Any:
        options = options or {}
        if function is functional.scaled_dot_product_attention:
            call = SdpaCall(*arguments, **options)
            if call.fits():
                return fused_attention(call)
        return function(*arguments, **options)


class MathAttention(TorchFunctionMode):
    """For a span, PyTorch's SDPA is held to its MATH backend, plain operations that have every derivative.

    It is so in this thread alone, where `torch.nn.attention.sdpa_kernel` would hold the process to it.
    """

    def __torch_function__(self, function: Any, types: Any, arguments: tuple = (), options: dict | None = None) -> Any:
        options = options or {}
        if function is functional.scaled_dot_product_attention:
            return _math_attention(SdpaCall(*arguments, **options))
        return function(*arguments, **options)


class SdpaCall(NamedTuple):
    """The arguments of `scaled_dot_product_attention`."""

    query: Tensor
    key: Tensor
    value: Tensor
    attn_mask: Tensor | None = None
    dropout_p: float = 0.0
    is_causal: bool = False
    scale: float | None = None
    enable_gqa: bool = False

    def fits(self) -> bool:
        """Whether it is long enough, of `(batch, heads, length, width)`, and without dropout or a mask that learns."""
        mask = self.attn_mask
        return (
            not self.dropout_p
            and self.key.shape[-2] >= _SHORTEST
            and self.query.dim() == self.key.dim() == self.value.dim() == 4
            and not (self.is_causal and (mask is not None or self.query.shape[2] != self.key.shape[2]))
            and not (mask is not None and (mask.requires_grad or mask.dim() != 4))
        )

    def as_autocast(self) -> "SdpaCall":
        """In the precision that autocast asks of SDPA."""
        device = self.query.device.type
        if not torch.is_autocast_enabled(device) or self.query.dtype == torch.float64:
            return self
        return self.to(torch.get_autocast_dtype(device))

    def to(self, dtype: torch.dtype) -> "SdpaCall":
        """The same in another precision."""
        mask = self.attn_mask
        return self._replace(
            query=self.query.to(dtype),
            key=self.key.to(dtype),
            value=self.value.to(dtype),
            attn_mask=mask if mask is None or mask.dtype == torch.bool else mask.to(dtype),
        )


def fused_attention(call: SdpaCall) -> Tensor:
    """`scaled_dot_product_attention`, differentiable twice on whatever kernel PyTorch chooses for it."""
    query, key, value, mask = call.as_autocast()[:4]
    if call.enable_gqa:
        key = key.repeat_interleave(query.shape[1] // key.shape[1], dim=1)
        value = value.repeat_interleave(query.shape[1] // value.shape[1], dim=1)
    scale = query.shape[-1] ** -0.5 if call.scale is None else call.scale
    with in_own_precision(query):
        return _Attention.apply(query, key, value, mask, call.is_causal, scale)


def _math_attention(call: SdpaCall) -> Tensor:
    call = call.as_autocast()
    query, mask = call.query, call.attn_mask
    if mask is not None and mask.dtype == torch.bool:
        mask = torch.zeros_like(mask, dtype=query.dtype).masked_fill(~mask, -torch.inf)
    with in_own_precision(query):
        return torch._scaled_dot_product_attention_math(
            query,
            call.key,
            call.value,
            mask,
            call.dropout_p,
            call.is_causal,
            scale=call.scale,
            enable_gqa=call.enable_gqa,
        )[0]


def in_own_precision(tensor: Tensor) -> torch.autocast:
    """No autocast for a span: its casts are made once, where attention is called."""
    return torch.autocast(tensor.device.type, enabled=False)


def _kernel(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, is_causal: bool, scale: float) -> Tensor:
    with torch._C.DisableTorchFunction():
        return functional.scaled_dot_product_attention(
            query, key, value, attn_mask=mask, is_causal=is_causal, scale=scale
        )


class _Attention(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, *settings: Any) -> Tensor:
        ctx.save_for_backward(query, key, value, mask)
        ctx.settings = settings
        return _kernel(query, key, value, mask, *settings)

    @staticmethod
    def backward(ctx: Any, of_output: Tensor) -> tuple[Tensor | None, ...]:
        query, key, value, mask = ctx.saved_tensors
        return *_AttentionBackward.apply(of_output, query, key, value, mask, *ctx.settings), None, None, None


class _AttentionBackward(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, of_output: Tensor, *inputs: Any) -> tuple[Tensor, ...]:
        query, key, value, mask, is_causal, scale = inputs
        ctx.save_for_backward(of_output, query, key, value, mask)
        ctx.settings = is_causal, scale
        with torch.enable_grad(), in_own_precision(of_output):
            leaves = [tensor.detach().requires_grad_() for tensor in (query, key, value)]
            output = _kernel(leaves[0], leaves[1], leaves[2], mask, is_causal, scale)
            return torch.autograd.grad(output, leaves, of_output)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *adjoints: Tensor) -> tuple[Tensor | None, ...]:
        of_output, query, key, value, mask = ctx.saved_tensors
        with in_own_precision(of_output):
            totals = _second_backward(query, key, value, of_output, adjoints, mask, *ctx.settings)
        return *totals, None, None, None


def _second_backward(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    of_output: Tensor,
    adjoints: tuple[Tensor, ...],
    mask: Tensor | None,
    is_causal: bool,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of ⟨dQ, adjoint of dQ⟩ + ⟨dK, …⟩ + ⟨dV, …⟩ with respect to dO, Q, K and V, block by block.

    With T the adjoint of dS and Z that of dP, u = rowsum(P∘T) and Z = P∘(T − u); the adjoint of P is what is left,
    T∘(dP − D) − u∘dP + dO·(adjoint of dV)ᵀ with D = rowsum(P∘dP), and goes through the softmax once more.
    """
    wide = torch.promote_types(query.dtype, torch.float32)
    shape = query.shape[:2]
    q, k, v, do, gq, gk, gv = (
        tensor.to(wide).flatten(0, 1) for tensor in (query * scale, key, value, of_output, *adjoints)
    )
    of_do, of_q, of_k, of_v = (torch.zeros_like(tensor) for tensor in (do, q, k, v))
    for heads, rows, columns in _blocks(len(q), q.shape[1], k.shape[1], is_causal, query.device.type):
        here, there = (heads, rows), (heads, columns)
        p = torch.bmm(q[here], k[there].mT)
        p = torch.softmax(_masked(p, mask, shape[1], heads, rows, columns, is_causal), dim=-1)
        if mask is not None:
            p = p.nan_to_num_()  # a position that sees nothing gives 0
        dp = torch.bmm(do[here], v[there].mT)
        centred = dp - (p * dp).sum(-1, keepdim=True)
        t = torch.bmm(gq[here], k[there].mT).mul_(scale).baddbmm_(q[here], gk[there].mT)
        u = (p * t).sum(-1, keepdim=True)
        of_p = torch.bmm(do[here], gv[there].mT).addcmul_(t, centred).addcmul_(u, dp, value=-1)
        z = t.sub_(u).mul_(p)
        ds = centred.mul_(p)
        of_s = of_p.sub_((p * of_p).sum(-1, keepdim=True)).mul_(p)
        of_do[here] += torch.bmm(p, gv[there]).baddbmm_(z, v[there])
        of_v[there] += torch.bmm(z.mT, do[here])
        of_q[here] += torch.bmm(of_s, k[there]).baddbmm_(ds, gk[there])
        of_k[there] += torch.bmm(of_s.mT, q[here]).baddbmm_(ds.mT, gq[here], alpha=scale)
    return tuple(
        total.unflatten(0, shape).to(like.dtype)
        for total, like in ((of_do, of_output), (of_q.mul_(scale), query), (of_k, key), (of_v, value))
    )


def _blocks(
    heads: int, queries: int, keys: int, is_causal: bool, device_type: str
) -> Iterator[tuple[slice, slice, slice]]:
    """Slices of heads, queries, and the keys that these can see, so small that a block of scores is cheap to hold."""
    at_once = _SCORES_AT_ONCE.get(device_type, _SCORES_AT_ONCE_ELSEWHERE)
    rows_at_once = max(1, min(queries, _QUERIES_AT_ONCE, at_once // keys))
    heads_at_once = max(1, at_once // (rows_at_once * keys))
    for first in range(0, heads, heads_at_once):
        for row in range(0, queries, rows_at_once):
            end = min(row + rows_at_once, queries)
            yield slice(first, first + heads_at_once), slice(row, end), slice(0, end if is_causal else keys)


def _masked(
    scores: Tensor, mask: Tensor | None, num_heads: int, heads: slice, rows: slice, columns: slice, is_causal: bool
) -> Tensor:
    """A block of scores, in place, with what may not be seen at −∞, and a mask of numbers added."""
    if is_causal:
        later = torch.ones(scores.shape[1:], dtype=torch.bool, device=scores.device).triu(rows.start + 1)
        return scores.masked_fill_(later, -torch.inf)
    if mask is None:
        return scores
    index = torch.arange(heads.start, heads.start + len(scores), device=scores.device)
    batch, head = index // num_heads, index % num_heads
    part = mask[batch % mask.shape[0], head % mask.shape[1]]  # either may be 1, for all
    part = part.expand(-1, max(part.shape[1], rows.stop), -1)[:, rows, columns]
    return scores.masked_fill_(~part, -torch.inf) if mask.dtype == torch.bool else scores.add_(part)
