"""Token ids, masks and what goes with them, as the caller gives them: checked, on the device, and as copies.

A copy belongs to no `inference_mode`, whatever the caller runs under.
"""

import torch

Tensor = torch.Tensor
IGNORED_LABEL = -100


def checked_tokens(name: str, input_ids: Tensor, device: torch.device, dims: tuple[int, ...]) -> Tensor:
    """Token ids on `device`.

    Args:
        name: what to call them in an error.
        input_ids: whole numbers.
        device: where to.
        dims: how many dimensions they may have.

    Returns:
        The ids as int64, whatever whole numbers they came as.

    Raises:
        ValueError: they are no whole numbers, or have other dimensions.
    """
    input_ids = torch.as_tensor(input_ids)
    if input_ids.dim() not in dims or not is_whole(input_ids):
        raise ValueError(
            f"{name} must be a tensor of token ids with {' or '.join(map(str, dims))} dimensions, got shape "
            f"{tuple(input_ids.shape)} of {input_ids.dtype}."
        )
    return input_ids.to(device, torch.long, copy=True)


def check_vocabulary(name: str, input_ids: Tensor, vocab_size: int) -> None:
    """Refuse ids that no token has. On an accelerator nothing is looked at: that would wait for it.

    Args:
        name: what to call them in an error.
        input_ids: all that are looked up.
        vocab_size: tokens that the base has.

    Raises:
        ValueError: an id is negative, or not below `vocab_size`.
    """
    if input_ids.device.type != "cpu" or not input_ids.numel():
        return
    lowest, highest = (int(end) for end in input_ids.aminmax())
    if lowest < 0 or highest >= vocab_size:
        raise ValueError(
            f"{name} must lie in 0..{vocab_size - 1}, the base's vocabulary, got {lowest}..{highest}. Is the tokenizer "
            "that of the base? Tokens that were added to it need resize_token_embeddings."
        )


def is_whole(values: Tensor) -> bool:
    """Whether a tensor holds whole numbers, of however many bits; booleans are none."""
    return values.dtype != torch.bool and not values.is_floating_point() and not values.is_complex()


def checked_mask(name: str, mask: Tensor | None, input_ids: Tensor) -> Tensor:
    """A mask of the shape of its token ids as booleans; all True where none was given.

    Raises:
        ValueError: it has another shape, or is of floating point: one that is added to scores is 0 at tokens, and would
            be read the wrong way round.
    """
    if mask is None:
        return torch.ones_like(input_ids).bool()
    mask = checked_like(name, mask, input_ids, "1 at tokens and 0 at padding, as whole numbers or booleans")
    return mask.bool()


def checked_like(name: str, values: Tensor, input_ids: Tensor, kind: str = "whole numbers") -> Tensor:
    """Whole numbers or booleans of the shape of their token ids, on the same device, as int64.

    Args:
        name: what to call them in an error.
        values: whole numbers or booleans.
        input_ids: the token ids.
        kind: what they must be, in an error.

    Raises:
        ValueError: they have another shape, or are of floating point.
    """
    values = torch.as_tensor(values, device=input_ids.device)
    if values.shape != input_ids.shape:
        raise ValueError(
            f"{name} must have the shape of its input_ids, {tuple(input_ids.shape)}, got {tuple(values.shape)}."
        )
    if values.is_floating_point() or values.is_complex():
        raise ValueError(f"{name} must be {kind}, got {values.dtype}.")
    return values.to(torch.long, copy=True)
