"""Memories of another model: told apart from this one's, and refused."""

import pytest
import torch

from hf_gradmem import GradMemConfig, get_gradmem_model
from tests.support.small_models import EVERY_OPTION, PLAIN, named_base, with_memory
from tests.support.tiny_models import tiny_tokens


def test_memory_of_another_base_is_refused_with_both_names(tmp_path):
    one = with_memory(named_base(tmp_path / "one"), **PLAIN)
    two = with_memory(named_base(tmp_path / "two", seed=1), **PLAIN)
    memory = one.write(input_ids=tiny_tokens(1, 6))
    for use in (two, two.generate, two.reconstruct, lambda memory, **_: two.export_prompt_tuning(memory, tmp_path)):
        arguments = {} if use == two.reconstruct else {"input_ids": tiny_tokens(1, 3)}
        with pytest.raises(ValueError, match=rf"(?s)written for {tmp_path / 'one'}@main.* is {tmp_path / 'two'}@main"):
            use(memory=memory, **arguments)
    with pytest.raises(ValueError, match="another base, or other weights in READ"):
        two.write(input_ids=tiny_tokens(1, 6), memory=memory)


def test_memory_is_refused_once_the_weights_of_read_changed(tmp_path):
    model = with_memory(named_base(tmp_path / "base"), **EVERY_OPTION)
    for parameter in (model.memory_projection.weight, model.read_start):
        memory = model.write(input_ids=tiny_tokens(1, 6))
        with torch.no_grad():
            parameter.add_(0.01)
        with pytest.raises(ValueError, match="other weights in READ"):
            model(input_ids=tiny_tokens(1, 3), memory=memory)


def test_memory_outlives_a_change_of_what_only_write_uses(tmp_path):
    model = with_memory(named_base(tmp_path / "base"), **EVERY_OPTION)
    memory = model.write(input_ids=tiny_tokens(1, 6))
    with torch.no_grad():
        for parameter in (model.memory_init, model.write_head.weight, model.write_start):
            parameter.add_(0.1)
    model(input_ids=tiny_tokens(1, 3), memory=memory)


def test_memory_of_another_size_is_refused_with_both_sizes(tmp_path):
    base = named_base(tmp_path / "base")
    memory = get_gradmem_model(base, GradMemConfig(num_memory_tokens=5)).write(input_ids=tiny_tokens(1, 6))
    model = get_gradmem_model(base, GradMemConfig(num_memory_tokens=3))
    with pytest.raises(ValueError, match="memory has 5 vectors of width 32, but this model reads 3 of width 32"):
        model(input_ids=tiny_tokens(1, 3), memory=memory)
