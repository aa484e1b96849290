"""A base whose backward pass can itself be differentiated, for a span of code."""

from collections.abc import Iterator
from contextlib import contextmanager

from .asked import asking
from .fused_attention import MathAttention


@contextmanager
def twice_differentiable() -> Iterator[None]:
    """Hold this thread's runs of the base to operations that have a second derivative, for a span.

    Fused attention kernels implement a first backward only. SDPA is held to its MATH backend whatever the base's
    `attn_implementation` says, because some models call SDPA under "eager"; an implementation other than these two is
    replaced by "eager" for each run. Where nothing is compiled, `FusedTwiceDifferentiable` takes over the longer calls
    of SDPA. The base's activation checkpointing is off as well: it would recompute layers later, outside the span;
    recomputing whole steps takes its place.
    """
    with asking(twice_differentiable=True), MathAttention():
        yield
