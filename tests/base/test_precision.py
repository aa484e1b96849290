"""Which precision a base is loaded in."""

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from hf_gradmem.base import precision
from hf_gradmem.commands.opening import load_model
from tests.support.command_line import save_base

CPU = torch.device("cpu")


@pytest.fixture
def seconds(monkeypatch):
    """What products take, by precision."""
    found = {torch.float32: 1.0, torch.bfloat16: 1.0}
    monkeypatch.setattr(precision, "_seconds", lambda dtype, width, device: found[dtype])
    precision.speedup.cache_clear()
    yield found
    precision.speedup.cache_clear()


@pytest.mark.parametrize(
    ("stored", "width", "bfloat16", "expected"),
    [
        (torch.float32, 576, 0.3, torch.bfloat16),
        (torch.float32, 576, 0.8, "auto"),
        (torch.float32, 576, 4.0, "auto"),
        (torch.bfloat16, 576, 4.0, torch.float32),
        (torch.bfloat16, 576, 1.2, "auto"),
        (torch.bfloat16, 576, 0.3, "auto"),
        (torch.float32, 64, 0.3, "auto"),
        (torch.float16, 576, 4.0, "auto"),
        (torch.float64, 576, 0.3, "auto"),
        (None, 576, 0.3, "auto"),
    ],
)
def test_the_faster_precision_is_chosen_where_it_is_worth_it(stored, width, bfloat16, expected, seconds):
    seconds[torch.bfloat16] = bfloat16
    assert precision.fastest_dtype(LlamaConfig(hidden_size=width, dtype=stored), CPU) == expected


def test_products_are_timed_once_on_this_machine():
    precision.speedup.cache_clear()
    first = precision.speedup(torch.float32, torch.bfloat16, 64, "cpu")
    assert first > 0
    assert precision.speedup(torch.float32, torch.bfloat16, 64, "cpu") == first


def test_a_base_is_loaded_in_it(seconds, tmp_path):
    config = LlamaConfig(
        hidden_size=256, intermediate_size=64, num_hidden_layers=1, num_attention_heads=4, vocab_size=256
    )
    save_base(tmp_path / "tiny", 0)
    LlamaForCausalLM(config).save_pretrained(tmp_path / "tiny")
    seconds[torch.bfloat16] = 0.3
    model = load_model(str(tmp_path / "tiny"))
    assert model.base_model.dtype == torch.bfloat16
    assert model.memory_init.dtype == torch.float32
    model.save_pretrained(tmp_path / "adapter")
    seconds[torch.bfloat16] = 4.0
    precision.speedup.cache_clear()
    assert load_model(str(tmp_path / "adapter")).base_model.dtype == torch.float32
