"""The precision in which a device computes fastest, found by trying: not every processor has bfloat16 products."""

import functools
import time
from collections.abc import Callable

import torch

# Much less is not worth a change of precision.
_WORTHWHILE = 1.5
_ROWS, _WIDTH, _WIDE = 256, 576, 1536  # products as a small decoder has them
_CHOICES = (torch.float32, torch.bfloat16)


def fastest_dtype(stored: torch.dtype | None, device: torch.device) -> torch.dtype | None:
    """The precision to load a base in.

    Args:
        stored: the precision of its checkpoint.
        device: where it will run.

    Returns:
        Of float32 and bfloat16 the one whose products are at least one and a half times as fast on this device; the
        stored one where neither is, and where it is another.
    """
    if stored not in _CHOICES:
        return stored
    other = _CHOICES[1 - _CHOICES.index(stored)]
    return other if speedup(stored, other, str(device)) >= _WORTHWHILE else stored


@functools.cache
def speedup(of: torch.dtype, to: torch.dtype, device: str) -> float:
    """How many times as fast products are in another precision, on a device."""
    return _seconds(of, device) / _seconds(to, device)


def _seconds(dtype: torch.dtype, device: str) -> float:
    """The shortest of a few products."""
    left = torch.randn(_ROWS, _WIDTH, device=device).to(dtype)
    right = torch.randn(_WIDE, _WIDTH, device=device).to(dtype)
    return min(_timed(lambda: torch.nn.functional.linear(left, right), device) for _ in range(5))


def _timed(run: Callable[[], object], device: str) -> float:
    begin = time.perf_counter()
    run()
    if torch.device(device).type != "cpu":
        torch.accelerator.synchronize()
    return time.perf_counter() - begin
