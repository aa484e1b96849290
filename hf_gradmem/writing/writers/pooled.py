"""A memory that is read off the context's embeddings: the floor under every writer that runs the decoder."""

from dataclasses import replace

import torch
from torch.nn import functional

from ...memory.phase import Phase
from ..contexts import Contexts
from ..rows import ContextRows
from .writer import Descent, Writer, WriteTrace

Tensor = torch.Tensor
_NO_STEP = 'writer="pooled" takes no step: it has no write_steps, write_learning_rate or tolerance.'


class PooledWriter(Writer):
    """Each memory vector is the mean embedding of its share of the context, in order. Nothing is learned."""

    runs_base = False

    def __init__(self, phase: Phase) -> None:
        super().__init__(phase, write_steps=0)
        if not phase.form.holds_vectors:
            raise ValueError(
                'writer="pooled" gives input vectors, and memory_form="key_values" holds none. Use '
                'memory_form="input_vectors".'
            )

    def rows(self, contexts: Contexts) -> ContextRows:
        return self._split(replace(contexts, segment_ids=None), "Shorten it.")

    def step_sizes(self, write_steps: int | None, write_learning_rate: float | None) -> list[Tensor | float]:
        if write_steps or write_learning_rate is not None:
            raise ValueError(_NO_STEP)
        return []

    def write(self, rows: ContextRows, memory: Tensor, descent: Descent) -> WriteTrace:
        """The memory that is given has no influence; there are no losses."""
        if descent.tolerance is not None:
            raise ValueError(_NO_STEP)
        embedded = self.phase.decoder.tokens(rows.input_ids, rows.attention_mask).embeddings
        pooled = [
            functional.adaptive_avg_pool1d(row[mask].T.to(memory.dtype), memory.shape[1]).T
            for row, mask in zip(embedded, rows.attention_mask.bool(), strict=True)
        ]
        nothing = memory.new_zeros((memory.shape[0], 0))
        return WriteTrace(memory=torch.stack(pooled), losses=nothing, last_loss=None)
