"""Which precision a base is loaded in."""

import pytest
import torch

from hf_gradmem.base import precision

CPU = torch.device("cpu")


@pytest.fixture
def seconds(monkeypatch):
    """What products take, by precision."""
    found = {torch.float32: 1.0, torch.bfloat16: 1.0}
    monkeypatch.setattr(precision, "_seconds", lambda dtype, device: found[dtype])
    precision.speedup.cache_clear()
    yield found
    precision.speedup.cache_clear()


@pytest.mark.parametrize(
    ("stored", "bfloat16", "expected"),
    [
        (torch.float32, 0.3, torch.bfloat16),
        (torch.float32, 0.8, torch.float32),
        (torch.float32, 4.0, torch.float32),
        (torch.bfloat16, 4.0, torch.float32),
        (torch.bfloat16, 1.2, torch.bfloat16),
        (torch.bfloat16, 0.3, torch.bfloat16),
        (torch.float16, 4.0, torch.float16),
        (torch.float64, 0.3, torch.float64),
        (None, 0.3, None),
    ],
)
def test_the_faster_precision_is_chosen_where_it_is_worth_it(stored, bfloat16, expected, seconds):
    seconds[torch.bfloat16] = bfloat16
    assert precision.fastest_dtype(stored, CPU) == expected


def test_products_are_timed_once_on_this_machine():
    precision.speedup.cache_clear()
    first = precision.speedup(torch.float32, torch.bfloat16, "cpu")
    assert first > 0
    assert precision.speedup(torch.float32, torch.bfloat16, "cpu") == first
