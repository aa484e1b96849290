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

    Raises:
        ValueError: they are no whole numbers, or have other dimensions.
    """
    input_ids = torch.as_tensor(input_ids)
    if input_ids.dim() not in dims or input_ids.is_floating_point():
        raise ValueError(
            f"{name} must be a tensor of token ids with {' or '.join(map(str, dims))} dimensions, got shape "
            f"{tuple(input_ids.shape)} of {input_ids.dtype}."
        )
    return input_ids.to(device).clone()


def checked_mask(name: str, mask: Tensor | None, input_ids: Tensor) -> Tensor:
    """A mask of the shape of its token ids as booleans; all True where none was given.

    Raises:
        ValueError: it has another shape.
    """
    return torch.ones_like(input_ids).bool() if mask is None else checked_like(name, mask, input_ids).bool()


def checked_like(name: str, values: Tensor, input_ids: Tensor) -> Tensor:
    """Values of the shape of their token ids, on the same device.

    Raises:
        ValueError: they have another shape.
    """
    values = torch.as_tensor(values, device=input_ids.device)
    if values.shape != input_ids.shape:
        raise ValueError(
            f"{name} must have the shape of its input_ids, {tuple(input_ids.shape)}, got {tuple(values.shape)}."
        )
    return values.clone()
