"""A base whose backward pass can itself be differentiated, for a span of code."""

from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from transformers import PreTrainedModel

# Implementations made of plain tensor operations once SDPA is held to its MATH backend.
_TWICE_DIFFERENTIABLE = ("eager", "sdpa")


@contextmanager
def twice_differentiable(base_model: PreTrainedModel) -> Iterator[None]:
    """Hold `base_model` to operations that have a second derivative, and restore its own settings afterwards.

    Fused attention kernels implement a first backward only. SDPA's MATH backend is entered whatever the base's
    `attn_implementation` says, because some models call SDPA under "eager"; an implementation other than these two is
    replaced by "eager" for the span. Where nothing is compiled, `FusedTwiceDifferentiable` takes over the longer calls
    of SDPA. The base's activation checkpointing is off as well: it would recompute layers later, outside the span;
    recomputing whole steps takes its place.
    """
    chosen = base_model.config._attn_implementation
    replace = chosen not in (*_TWICE_DIFFERENTIABLE, None)
    recomputed = layers_recomputed(base_model)
    if replace:
        base_model.set_attn_implementation("eager")
    for module in recomputed:  # the type of `nn.Module` knows no attributes but tensors and modules
        module.gradient_checkpointing = False  # type: ignore[assignment]
    try:
        with sdpa_kernel(SDPBackend.MATH):
            yield
    finally:
        for module in recomputed:
            module.gradient_checkpointing = True  # type: ignore[assignment]
        if replace:
            base_model.set_attn_implementation(chosen)


def layers_recomputed(base_model: PreTrainedModel) -> list[nn.Module]:
    """The base's modules that are under activation checkpointing."""
    return [module for module in base_model.modules() if getattr(module, "gradient_checkpointing", False)]
