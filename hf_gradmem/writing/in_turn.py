"""Segments written one after the other: the memory that one leaves is where the next one starts.

Segments that are written together are a sum over a set, blind to their order. In turn, a later segment is written into
what the earlier ones left, and its gradient corrects what no longer holds: the memory keeps the order of what it was
told. It is as if each segment were appended by a `write` of its own, with the outer loss taken through all of them.
"""

from collections.abc import Callable

import torch

from .inner_loop import WriteTrace
from .objective import ContextRows

Tensor = torch.Tensor


def write_in_turn(rows: ContextRows, memory: Tensor, write: Callable[[ContextRows, Tensor], WriteTrace]) -> WriteTrace:
    """Write the segments of each context in their order.

    Args:
        rows: of [`~hf_gradmem.writing.objective.split_context`].
        memory: `(batch, num_memory_tokens, hidden_size)`, the start.
        write: rows of one segment of some contexts, and the memories of these → what writing them leaves.

    Returns:
        The last memory. Losses and gradient norms are means over a context's tokens, each in the turn of its segment.
    """
    traces = []
    for contexts, segment in rows.turns():
        trace = write(segment, memory[contexts])
        memory = memory.index_copy(0, contexts, trace.memory)
        traces.append((contexts, segment.num_tokens, trace))

    def mean_over_tokens(values: str) -> Tensor:
        total = share = 0
        for contexts, num_tokens, trace in traces:
            of_segment = getattr(trace, values)
            taken = ~of_segment.detach().isnan()  # a segment that stopped early has no loss at later steps
            shape = (len(memory), *of_segment.shape[1:])
            tokens = num_tokens.view(-1, *[1] * (of_segment.dim() - 1)) * taken
            total = total + memory.new_zeros(shape).index_copy(0, contexts, of_segment.where(taken, 0) * tokens)
            share = share + memory.new_zeros(shape).index_copy(0, contexts, tokens.to(memory.dtype))
        return total / share

    return WriteTrace(
        memory=memory,
        losses=mean_over_tokens("losses"),
        gradient_norms=mean_over_tokens("gradient_norms"),
        last_loss=None if traces[0][2].last_loss is None else mean_over_tokens("last_loss"),
    )
