"""Segments of one context side by side in one row, so that they share one copy of the memory.

Each sees the memory and itself, from the positions right behind the memory, as if it had a row of its own. With short
segments that spares nearly half the work: eight pairs of seven tokens on eight memory tokens are 64 positions in place
of 120. It needs segments without a prefix, for a prefix stands before the memory, and a base that keeps segments apart,
which `Decoder.keeps_segments_apart` finds out.
"""

from dataclasses import replace

import torch

from .rows import ContextRows

Tensor = torch.Tensor

# Tokens in a row at most: in longer ones attention to what is masked costs more than copies of the memory. And the
# share of the positions that must be spared, for a row of one segment needs no mask.
LONGEST_ROW = 128
_WORTH_SPARING = 1 / 8


def pack_segments(rows: ContextRows, prefix_length: int, longest: int) -> ContextRows:
    """The same segments in fewer positions, or `rows` themselves where packing spares too few.

    Args:
        rows: whole segments without prefixes, one context's after another's.
        prefix_length: positions of the memory and its control tokens in each row.
        longest: tokens in a row at most.
    """
    lengths, contexts = rows.attention_mask.sum(1).tolist(), rows.sample_index.tolist()
    if max(lengths) > longest:
        return rows
    packed_row, starts, first = [], [], []
    filled: list[int] = []  # tokens in each packed row so far
    for index, (length, context) in enumerate(zip(lengths, contexts, strict=True)):
        if not index or context != contexts[index - 1] or filled[-1] + length > longest:
            filled.append(0)
            first.append(index)
        packed_row.append(len(filled) - 1)
        starts.append(filled[-1])
        filled[-1] += length
    packed, apart = (len(each) * (prefix_length + max(each)) for each in (filled, lengths))
    if packed > (1 - _WORTH_SPARING) * apart:
        return rows

    device, width = rows.input_ids.device, rows.input_ids.shape[1]
    token_row = rows.scored_positions // width
    start = torch.tensor(starts, device=device)[token_row]
    place = torch.tensor(packed_row, device=device)[token_row], start + rows.scored_positions % width
    shape = len(filled), max(filled)
    mask = torch.zeros(shape, dtype=torch.bool, device=device).index_put(
        place, torch.ones_like(start, dtype=torch.bool)
    )
    own = torch.arange(shape[1], device=device).expand(shape)
    return replace(
        rows,
        input_ids=torch.zeros_like(own).index_put(place, rows.targets),
        attention_mask=mask,
        scored=mask,
        sample_index=rows.sample_index[first],
        segment_index=rows.segment_index[first],
        segment_starts=own.index_put(place, start),
    )
