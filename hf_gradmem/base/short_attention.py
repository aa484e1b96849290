"""Attention over few positions in float32 where a CPU runs the base in half precision: there it is the faster way.

PyTorch's fused kernel for half precision takes 1.3 to 1.7 times as long as the one for float32 at up to some two
hundred keys, forward and backward, casts included (`python -m benchmarks.run short_attention`).
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch.nn import functional
from torch.overrides import TorchFunctionMode

from .asked import ASKED
from .fused_attention import SdpaCall, in_own_precision
from .modes import layers_recomputed

# Keys up to which it is the faster way; from some 260 on it is not (benchmarks/results/performance_cpu.md).
LONGEST = 192


@contextmanager
def short_attention_in_float32(base_model: torch.nn.Module) -> Iterator[None]:
    """For a span, this thread's short calls of SDPA in half precision on a CPU are made in float32.

    Not under activation checkpointing, whose layers are run again outside the span, nor in what is compiled.
    """
    if torch.compiler.is_compiling() or (not ASKED.evaluates and layers_recomputed(base_model)):
        yield
        return
    with _ShortAttentionInFloat32():
        yield


class _ShortAttentionInFloat32(TorchFunctionMode):
    def __torch_function__(self, function: Any, types: Any, arguments: tuple = (), options: dict | None = None) -> Any:
        options = options or {}
        if function is functional.scaled_dot_product_attention:
            call = SdpaCall(*arguments, **options)
            if call.query.device.type == "cpu" and call.query.dtype.itemsize == 2 and call.key.shape[-2] <= LONGEST:
                with in_own_precision(call.query):
                    return function(**call.to(torch.float32)._asdict()).to(call.query.dtype)
        return function(*arguments, **options)
