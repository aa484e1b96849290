"""Attention that can be differentiated twice, for a span of code."""

from collections.abc import Iterator
from contextlib import contextmanager

from torch.nn.attention import SDPBackend, sdpa_kernel
from transformers import PreTrainedModel

# Implementations made of plain tensor operations once SDPA is held to its MATH backend.
_TWICE_DIFFERENTIABLE = ("eager", "sdpa")


@contextmanager
def twice_differentiable_attention(base_model: PreTrainedModel) -> Iterator[None]:
    """Hold `base_model` to an attention that has a second derivative, and restore its own afterwards.

    Fused kernels implement a first backward only. SDPA's MATH backend is entered whatever the base's
    `attn_implementation` says, because some models call SDPA under "eager"; an implementation other than these two is
    replaced by "eager" for the span.
    """
    chosen = base_model.config._attn_implementation
    replace = chosen not in (*_TWICE_DIFFERENTIABLE, None)
    if replace:
        base_model.set_attn_implementation("eager")
    try:
        with sdpa_kernel(SDPBackend.MATH):
            yield
    finally:
        if replace:
            base_model.set_attn_implementation(chosen)
