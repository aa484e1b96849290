"""Contexts cut into the rows that are run: whole, or segment by segment, each with the segments before it."""

from collections.abc import Iterator
from dataclasses import dataclass, field, replace

import torch
from torch import distributed
from torch.nn import functional

from ..base.layout import reorder, token_order

Tensor = torch.Tensor

# A group of rows holds at most so many positions, which bounds the activations alive; and it is cut in two where that
# spares more padding than this, for a further run of the base is not free.
_POSITIONS_AT_ONCE = 2**14
_PADDING_WORTH_A_RUN = 2**10


@dataclass(frozen=True)
class ContextRows:
    """A batch of contexts cut into the rows that are reconstructed.

    Attributes:
        input_ids: `(rows, length)`, right-padded: a row's prefix, then its segment.
        attention_mask: `(rows, length)`, True at tokens.
        scored: `(rows, length)`, True at the tokens of the segment itself. Each context token is scored once.
        sample_index: `(rows,)`, the context that a row belongs to.
        segment_index: `(rows,)`, which of its segments a row is.
        segment_lengths: `(batch, segments)` tokens in each segment, 0 where a context has fewer.
        segment_starts: `(rows, length)`, where in its row a token's segment starts, if a row holds several
            ([`~hf_gradmem.writing.packing.pack_segments`]); padding starts at its own place.
        all_behind_memory: whether what is not scored stands behind the memory too, before what is.
        scored_positions: `(tokens,)`, where the scored tokens are among all of them: row · length + place.
        targets: `(tokens,)`, the scored tokens.
    """

    input_ids: Tensor
    attention_mask: Tensor
    scored: Tensor
    sample_index: Tensor
    segment_index: Tensor
    segment_lengths: Tensor
    segment_starts: Tensor | None = None
    all_behind_memory: bool = False
    scored_positions: Tensor = field(init=False)
    targets: Tensor = field(init=False)

    def __post_init__(self) -> None:
        # Indices, found once: to select by a mask waits for the device at every step, and cannot be compiled.
        object.__setattr__(self, "scored_positions", self.scored.flatten().nonzero()[:, 0])
        object.__setattr__(self, "targets", self.of_scored(self.input_ids))

    def of_scored(self, values: Tensor) -> Tensor:
        """`(rows, length, ...)` → what belongs to the scored tokens, `(tokens, ...)`."""
        return values.flatten(0, 1).index_select(0, self.scored_positions)

    @property
    def num_tokens(self) -> Tensor:
        """Tokens of each context, `(batch,)`."""
        return self.segment_lengths.sum(1)

    @property
    def num_turns(self) -> int:
        """Segments of the context that has the most."""
        return self.segment_lengths.shape[1]

    def take(self, rows: Tensor) -> "ContextRows":
        """Some of the rows, without the padding that only the others need. The contexts stay all there."""
        length = int(self.attention_mask[rows].sum(1).max())
        return replace(
            self,
            input_ids=self.input_ids[rows, :length],
            attention_mask=self.attention_mask[rows, :length],
            scored=self.scored[rows, :length],
            sample_index=self.sample_index[rows],
            segment_index=self.segment_index[rows],
            segment_starts=None if self.segment_starts is None else self.segment_starts[rows, :length],
        )

    def of_contexts(self, contexts: Tensor) -> "ContextRows":
        """The rows of some of the contexts, `(batch,)` True at these, as a batch of their own."""
        rows = contexts[self.sample_index].nonzero()[:, 0]
        numbers = contexts.cumsum(0) - 1
        return replace(
            self.take(rows),
            sample_index=numbers[self.sample_index[rows]],
            segment_lengths=self.segment_lengths[contexts],
        )

    def turns(self) -> Iterator[tuple[Tensor, "ContextRows"]]:
        """Segment after segment: which contexts have one, and its rows as contexts of their own."""
        for turn in range(self.num_turns):
            rows = (self.segment_index == turn).nonzero()[:, 0]
            contexts = self.sample_index[rows]
            yield (
                contexts,
                replace(
                    self.take(rows),
                    sample_index=torch.arange(len(rows), device=rows.device),
                    segment_index=torch.zeros_like(rows),
                    segment_lengths=self.segment_lengths[contexts, turn, None],
                ),
            )

    def grouped_by_length(self) -> list["ContextRows"]:
        """The rows in groups to run one after the other: less padding, and a bound on the positions alive."""
        if several_processes():
            return [self]  # a sharded base needs the same number of runs in every process
        of_rows = self.attention_mask.sum(1)
        order = of_rows.argsort(descending=True, stable=True)
        lengths = of_rows[order].tolist()
        firsts = [0]
        for row, length in enumerate(lengths):
            longest, so_far = lengths[firsts[-1]], row - firsts[-1]
            spared = (longest - length) * (len(lengths) - row)
            if so_far and ((so_far + 1) * longest > _POSITIONS_AT_ONCE or spared > _PADDING_WORTH_A_RUN):
                firsts.append(row)
        if len(firsts) == 1:
            return [self]
        return [self.take(order[i:j]) for i, j in zip(firsts, [*firsts[1:], len(lengths)], strict=True)]


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
        segment_index=segment_index,
        segment_lengths=lengths,
    )


def whole_rows(before: Tensor, input_ids: Tensor) -> ContextRows:
    """One row for each context, without padding: `input_ids` `(batch, length)` after the unscored `before`."""
    batch_size, length = input_ids.shape
    ids = torch.cat([before, input_ids], dim=1)
    mask = torch.ones_like(ids, dtype=torch.bool)
    return ContextRows(
        input_ids=ids,
        attention_mask=mask,
        scored=mask & (torch.arange(ids.shape[1], device=ids.device) >= before.shape[1]),
        sample_index=torch.arange(batch_size, device=ids.device),
        segment_index=torch.zeros(batch_size, dtype=torch.long, device=ids.device),
        segment_lengths=torch.full((batch_size, 1), length, device=ids.device),
    )


def several_processes() -> bool:
    """Whether this is one of several processes that compute together."""
    return distributed.is_available() and distributed.is_initialized() and distributed.get_world_size() > 1
