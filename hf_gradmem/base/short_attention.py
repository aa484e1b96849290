"""Attention over few positions in float32 where a CPU runs the base in half precision: there it is the faster way.

PyTorch's fused kernel for half precision takes 1.3 to 1.7 times as long as the one for float32 at up to some two
hundred keys, forward and backward, casts included (`python -m benchmarks.run short_attention`). READ attends as WRITE
does, without a gradient too: a memory that was written through one kernel is read less well through another.
"""

from typing import Any

import torch
from torch.nn import functional
from torch.overrides import TorchFunctionMode
from transformers import PreTrainedModel

from .fused_attention import SdpaCall, in_own_precision

# Keys up to which it is the faster way; from some 260 on it is not (benchmarks/results/performance_cpu.md).
LONGEST = 192


def computes_in_half_on_cpu(base_model: PreTrainedModel) -> bool:
    """Whether runs of the base, where it stands, take the products in half precision and on a CPU."""
    half = base_model.dtype.itemsize == 2 or torch.is_autocast_enabled("cpu")
    return half and base_model.device.type == "cpu"


class ShortAttentionInFloat32(TorchFunctionMode):
    """For a span, this thread's calls of PyTorch's SDPA in half precision and over few keys are made in float32.

    Layers under activation checkpointing, which are run again outside the span, would not be as they were in it.
    """

    def __torch_function__(self, function: Any, types: Any, arguments: tuple = (), options: dict | None = None) -> Any:
        options = options or {}
        if function is functional.scaled_dot_product_attention:
            call = SdpaCall(*arguments, **options)
            if call.query.dtype.itemsize == 2 and call.key.shape[-2] <= LONGEST:
                with in_own_precision(call.query):
                    return function(**call.to(torch.float32)._asdict()).to(call.query.dtype)
        return function(*arguments, **options)
