"""Which precision a base is loaded in."""

import logging

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from hf_gradmem import GradMemConfig, GradMemForCausalLM, get_gradmem_model
from hf_gradmem.base import precision
from hf_gradmem.commands.opening import load_model
from hf_gradmem.training.recipe import RecipeArguments
from hf_gradmem.training.run import build_model
from tests.support.command_line import run, save_base

CPU = torch.device("cpu")


@pytest.fixture
def seconds(monkeypatch):
    """What products take, by precision."""
    found = {torch.float32: 1.0, torch.bfloat16: 1.0}
    monkeypatch.setattr(precision, "_seconds", lambda dtype, width, device: found[dtype])
    precision.speedup.cache_clear()
    precision.tell.cache_clear()
    yield found
    precision.speedup.cache_clear()


@pytest.fixture
def wide_base(tmp_path):
    """A base in float32 that is wide enough for its precision to matter, in a directory."""
    config = LlamaConfig(
        hidden_size=256, intermediate_size=64, num_hidden_layers=1, num_attention_heads=4, vocab_size=256
    )
    save_base(tmp_path / "wide", 0)
    LlamaForCausalLM(config).save_pretrained(tmp_path / "wide")
    return str(tmp_path / "wide")


@pytest.mark.parametrize(
    ("stored", "width", "bfloat16", "expected"),
    [
        (torch.float32, 576, 0.3, torch.bfloat16),
        (torch.float32, 576, 0.8, torch.float32),
        (torch.float32, 576, 4.0, torch.float32),
        (torch.bfloat16, 576, 4.0, torch.float32),
        (torch.bfloat16, 576, 1.2, torch.bfloat16),
        (torch.bfloat16, 576, 0.3, torch.bfloat16),
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


def test_a_base_is_loaded_in_it(seconds, wide_base, tmp_path):
    seconds[torch.bfloat16] = 0.3
    model = load_model(wide_base)
    assert model.base_model.dtype == torch.bfloat16
    assert model.memory_init.dtype == torch.float32
    model.save_pretrained(tmp_path / "adapter")
    seconds[torch.bfloat16] = 4.0
    precision.speedup.cache_clear()
    assert load_model(str(tmp_path / "adapter")).base_model.dtype == torch.float32
    for name in (wide_base, str(tmp_path / "adapter")):
        assert load_model(name, dtype="fastest").dtype == torch.float32
        assert load_model(name, dtype="bfloat16").dtype == torch.bfloat16


def test_the_choice_is_logged_once_with_its_reason(seconds, caplog):
    config = LlamaConfig(hidden_size=576, dtype=torch.float32)
    seconds[torch.bfloat16] = 0.25
    with caplog.at_level(logging.INFO, "hf_gradmem"):
        precision.fastest_dtype(config, CPU)
        precision.fastest_dtype(config, CPU)
    assert caplog.messages == [
        "The base is loaded in bfloat16, not in float32: products in bfloat16 are 4 times as fast here (cpu)."
    ]


def test_the_command_line_tells_it_and_a_quiet_one_does_not(seconds, wide_base):
    def told(*options: str) -> list[str]:
        precision.tell.cache_clear()
        lines = run(*options, "write", "A text.", "--model", wide_base, "--output", wide_base + "-memory").stderr
        return [line for line in lines.splitlines() if "bfloat16" in line]

    seconds[torch.bfloat16] = 4.0
    assert told() == ["The base stays in float32: products in bfloat16 are 0.25 times as fast here (cpu)."]
    assert told("--quiet") == []


def test_an_adapter_takes_the_fastest_for_its_base_and_leaves_trained_weights_alone(seconds, wide_base, tmp_path):
    seconds[torch.bfloat16] = 0.3
    model = load_model(wide_base)
    model.save_pretrained(tmp_path / "adapter")
    loaded = GradMemForCausalLM.from_pretrained(tmp_path / "adapter", dtype="fastest")
    assert loaded.base_model.dtype == torch.bfloat16
    whole = get_gradmem_model(LlamaForCausalLM.from_pretrained(wide_base), GradMemConfig(num_memory_tokens=2))
    whole.base_model.requires_grad_(True)
    whole.save_pretrained(tmp_path / "whole")
    assert GradMemForCausalLM.from_pretrained(tmp_path / "whole", dtype="fastest").base_model.dtype == torch.float32


def test_a_recipe_leaves_the_precision_to_the_machine_unless_the_base_trains(seconds, wide_base):
    seconds[torch.bfloat16] = 0.3
    stages = [{"steps": 1}]
    recipe = RecipeArguments(task="facts", base_model=wide_base, stages=stages, base_dtype="fastest")
    assert build_model(recipe, device=CPU).base_model.dtype == torch.bfloat16
    recipe = RecipeArguments(task="facts", base_model=wide_base, stages=stages)
    assert build_model(recipe, device=CPU).base_model.dtype == torch.float32
    with pytest.raises(ValueError, match="small updates of weights are lost"):
        RecipeArguments(task="facts", base_model=wide_base, stages=stages, base_dtype="fastest", train_base=True)
