"""The reconstruction objective of WRITE, L(M; C): whole contexts and contexts in segments.

L(M; C) = (1/|C|) Σ_j Σ_i −log f_θ(s_j,i | [w_start; P(M); w_end; s_j−1; s_j,<i]). One segment is the paper's objective
(eq. 3). Segments are the rows of one batch; a row holds the unscored prefix, then the segment.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch.nn import functional

from ..padding import reorder, token_order

Tensor = torch.Tensor


@dataclass(frozen=True)
class ContextRows:
    """A batch of contexts cut into the rows that are reconstructed.

    Attributes:
        input_ids: `(rows, length)`, right-padded: a row's prefix, then its segment.
        attention_mask: `(rows, length)`, True at tokens.
        scored: `(rows, length)`, True at the tokens of the segment itself. Each context token is scored once.
        sample_index: `(rows,)`, the context that a row belongs to.
        segment_lengths: `(batch, segments)` tokens in each segment, 0 where a context has fewer.
    """

    input_ids: Tensor
    attention_mask: Tensor
    scored: Tensor
    sample_index: Tensor
    segment_lengths: Tensor

    @property
    def num_tokens(self) -> Tensor:
        """Tokens of each context, `(batch,)`."""
        return self.segment_lengths.sum(1)


def split_context(
    input_ids: Tensor,
    attention_mask: Tensor,
    segment_ids: Tensor | None = None,
    segment_length: int | None = None,
    prefix_segments: int = 1,
) -> ContextRows:
    """Cut contexts into segments and give each the segments before it as an unscored prefix.

    Args:
        input_ids: `(batch, length)` tokens, padded on either side.
        attention_mask: `(batch, length)`, non-zero at tokens.
        segment_ids: `(batch, length)`; a segment is a run of equal values.
        segment_length: cut every so many tokens where there are no `segment_ids`.
        prefix_segments: how many segments before each one form its prefix.
    """
    batch_size, length = input_ids.shape
    order = token_order(attention_mask, "right")
    input_ids, mask = reorder(input_ids, order), reorder(attention_mask.bool(), order)

    if segment_ids is not None:
        segment_ids = reorder(segment_ids, order)
        segment = functional.pad(segment_ids[:, 1:] != segment_ids[:, :-1], (1, 0)).cumsum(1)
    else:
        segment = (torch.arange(length, device=mask.device) // (segment_length or length)).expand_as(mask)
    num_segments = int(segment.masked_fill(~mask, 0).max()) + 1
    lengths = mask.new_zeros((batch_size, num_segments), dtype=torch.long)
    lengths.scatter_add_(1, segment.clamp(max=num_segments - 1), mask.long())

    sample_index, segment_index = (lengths > 0).nonzero(as_tuple=True)
    ends = lengths.cumsum(1)
    starts = ends - lengths
    first = starts[sample_index, (segment_index - prefix_segments).clamp(min=0)]
    start, end = starts[sample_index, segment_index], ends[sample_index, segment_index]
    position = first[:, None] + torch.arange(int((end - first).max()), device=mask.device)
    row_mask = position < end[:, None]
    return ContextRows(
        input_ids=input_ids[sample_index[:, None], position.clamp(max=length - 1)].masked_fill(~row_mask, 0),
        attention_mask=row_mask,
        scored=row_mask & (position >= start[:, None]),
        sample_index=sample_index,
        segment_lengths=lengths,
    )


@dataclass(frozen=True)
class ReconstructionObjective:
    """Per-sample reconstruction loss as a function of the memory.

    Attributes:
        rows: what is reconstructed.
        prefix: memory `(batch, num_memory_tokens, hidden_size)` → `[w_start; P(M); w_end]`.
        token_logits: prefix of each row → logits `(rows, length, vocab)`, position i predicting the row's token i.
    """

    rows: ContextRows
    prefix: Callable[[Tensor], Tensor]
    token_logits: Callable[[Tensor], Tensor]

    def __call__(self, memory: Tensor) -> Tensor:
        """Mean negative log-likelihood of each sample's tokens in nats, `(batch,)`.

        A mean for each sample, and never over the batch: a sample's memory must not depend on its neighbours.
        """
        rows = self.rows
        prefix = self.prefix(memory).index_select(0, rows.sample_index)
        logits = self.token_logits(prefix)
        token_losses = cross_entropy(logits[rows.scored], rows.input_ids[rows.scored])
        token_sample = rows.sample_index[:, None].expand_as(rows.scored)[rows.scored]
        sums = token_losses.new_zeros(memory.shape[0]).index_add(0, token_sample, token_losses)
        return sums / rows.num_tokens


def cross_entropy(logits: Tensor, targets: Tensor) -> Tensor:
    """Negative log-likelihood of each target, in float32 or better."""
    if logits.dtype in (torch.float16, torch.bfloat16):
        logits = logits.float()
    return functional.cross_entropy(logits, targets, reduction="none")
