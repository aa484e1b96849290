"""Moving the real tokens of each row together, whichever side its padding is on."""

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
