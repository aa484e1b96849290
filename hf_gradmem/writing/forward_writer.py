"""The forward-only memory writer, a recurrent memory transformer (RMT): the baseline under the same interface.

The decoder reads `[w_start; P(M); w_end; context; P(M)]`, and its last hidden states at the trailing copy are the next
memory. Re-reading the context K times is the counterpart of K gradient steps (the paper's forward-only writer).
"""

from collections.abc import Callable

import torch
from torch.utils.checkpoint import checkpoint

from .inner_loop import WriteTrace

Tensor = torch.Tensor


def write_forward(
    read_back: Callable[[Tensor], Tensor],
    memory: Tensor,
    steps: int,
    *,
    checkpoint_steps: bool,
    on_step: Callable[[Tensor], object] = lambda losses: None,
) -> WriteTrace:
    """Read the context `steps` times, each time with the memory that the reading before it left.

    Args:
        read_back: memory `(batch, num_memory_tokens, hidden_size)` → the next memory, of the same shape.
        memory: the learned start.
        steps: how often the context is read.
        checkpoint_steps: recompute each reading in the backward pass.
        on_step: called after each reading with NaN for each sample: no loss is minimised here.
    """
    nothing = memory.new_full((memory.shape[0], steps), torch.nan)
    for step in range(steps):
        if checkpoint_steps and torch.is_grad_enabled():
            memory = checkpoint(read_back, memory, use_reentrant=False)
        else:
            memory = read_back(memory)
        on_step(nothing[:, step])
    return WriteTrace(memory=memory, losses=nothing, gradient_norms=nothing, last_loss=None)
