"""The precision in which a device computes fastest, found by trying: not every processor has bfloat16 products."""

import functools
import logging
import time
from collections.abc import Callable

import torch
from transformers import PreTrainedConfig

FASTEST = "fastest"
"""What asks for [`fastest_dtype`] in place of a precision."""
_LOG = logging.getLogger(__name__)

# Much less is not worth a change of precision.
_WORTHWHILE = 1.5
_ROWS = 256
_SMALLEST = 256  # width of a base from which on products are what its time goes into
_CHOICES = (torch.float32, torch.bfloat16)


def fastest_dtype(config: PreTrainedConfig, device: torch.device | None = None) -> torch.dtype | str:
    """The precision to load a base in, as `from_pretrained` takes it. What was found is logged, once in a process.

    Args:
        config: the base's, with its checkpoint's precision; or what an adapter keeps of it, with the precision that
            it was loaded in when the adapter was saved.
        device: where it will run; this machine's accelerator by default, if there is one.

    Returns:
        Of float32 and bfloat16 the one in which products of the base's width are at least one and a half times as fast
        on this device, or the configuration's where neither is; `"auto"`, the checkpoint's own, where that is another,
        and for bases less than 256 wide.
    """
    stored, width = config.dtype, getattr(config.get_text_config(), "hidden_size", 0)
    if stored not in _CHOICES or width < _SMALLEST:
        return "auto"
    if device is None:
        device = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else torch.device("cpu")
    other = _CHOICES[1 - _CHOICES.index(stored)]
    factor = speedup(stored, other, width, str(device))
    tell(stored, other, factor, str(device))
    return other if factor >= _WORTHWHILE else stored


@functools.cache
def tell(stored: torch.dtype, other: torch.dtype, factor: float, device: str) -> None:
    """Say what was chosen and why."""
    own, tried = (str(dtype).removeprefix("torch.") for dtype in (stored, other))
    chosen = f"is loaded in {tried}, not in {own}" if factor >= _WORTHWHILE else f"stays in {own}"
    _LOG.info("The base %s: products in %s are %.2g times as fast here (%s).", chosen, tried, factor, device)


@functools.cache
def speedup(of: torch.dtype, to: torch.dtype, width: int, device: str) -> float:
    """How many times as fast products are in another precision, on a device."""
    return _seconds(of, width, device) / _seconds(to, width, device)


def _seconds(dtype: torch.dtype, width: int, device: str) -> float:
    """The shortest of a few products."""
    left = torch.randn(_ROWS, width, device=device).to(dtype)
    right = torch.randn(4 * width, width, device=device).to(dtype)
    return min(_timed(lambda: torch.nn.functional.linear(left, right), device) for _ in range(5))


def _timed(run: Callable[[], object], device: str) -> float:
    begin = time.perf_counter()
    run()
    if torch.device(device).type != "cpu":
        torch.accelerator.synchronize()
    return time.perf_counter() - begin
