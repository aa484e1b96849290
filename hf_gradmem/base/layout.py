"""Where things stand in a row: padding on either side, a query behind a memory, segments side by side."""

import torch

Tensor = torch.Tensor


def token_order(attention_mask: Tensor, padding_side: str) -> Tensor:
    """Order of positions that gathers each row's real tokens and keeps their sequence.

    Args:
        attention_mask: `(rows, length)`, non-zero at real tokens, which may lie anywhere.
        padding_side: `"right"` puts the padding last, `"left"` first.

    Returns:
        `(rows, length)` indices for [`reorder`].
    """
    return torch.argsort(attention_mask.bool(), dim=1, stable=True, descending=padding_side == "right")


def reorder(values: Tensor, order: Tensor) -> Tensor:
    """Take `values` `(rows, length, ...)` in the given order along the second dimension."""
    index = order.reshape(*order.shape, *[1] * (values.dim() - 2)).expand(-1, -1, *values.shape[2:])
    return values.gather(1, index)


def align_with_query(logits: Tensor, attention_mask: Tensor) -> Tensor:
    """Logits in the query's own layout: position i predicts token i + 1, or the first one where none came before.

    Args:
        logits: `(rows, prefix_length + query_length, vocab)`, memory first, padding last.
        attention_mask: `(rows, query_length)` of the query.

    Returns:
        `(rows, query_length, vocab)`. Behind the last token of a row, padding has no meaning.
    """
    real = attention_mask.bool()
    prefix_length = logits.shape[1] - real.shape[1]
    if bool(real[:, :1].all() & (real[:, 1:] <= real[:, :-1]).all()):  # they stand there already
        return logits[:, prefix_length:]
    return reorder(logits, prefix_length - 1 + real.cumsum(1))


def packed_layout(segment_starts: Tensor, prefix_length: int, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """How `[prefix; segments]` is run so that no segment sees another.

    Args:
        segment_starts: `(rows, length)`, where in its row a token's segment starts; padding starts at its own place.
        prefix_length: positions before the segments, which all of them see.
        dtype: of the mask.

    Returns:
        Mask `(rows, 1, positions, positions)` to add to the attention scores, position ids `(rows, positions)`, and the
        position `(rows, length)` that predicts each token.
    """
    length = segment_starts.shape[1]
    place = torch.arange(prefix_length + length, device=segment_starts.device)
    starts = torch.cat(
        [segment_starts.new_zeros((len(segment_starts), prefix_length)), prefix_length + segment_starts], dim=1
    )
    in_prefix = place < prefix_length
    seen = (place[:, None] >= place) & (in_prefix | (starts[:, :, None] == starts[:, None, :]))
    mask = torch.zeros(seen.shape, dtype=dtype, device=seen.device).masked_fill(~seen, torch.finfo(dtype).min)
    behind = place[prefix_length:]
    positions = torch.where(in_prefix, place, prefix_length + place - starts)
    predicting = torch.where(starts[:, prefix_length:] == behind, prefix_length, behind) - 1
    return mask[:, None], positions, predicting
