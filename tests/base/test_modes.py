"""The modes that a base is run in, and what of them shows elsewhere."""

import torch
from torch.nn import functional

from hf_gradmem.base.modes import evaluating, settled, weights_frozen
from tests.support.writing import build


def test_frozen_weights_are_constants_and_require_a_gradient_all_the_same():
    model = build()
    model.base_model.requires_grad_(True)
    weight = model.get_input_embeddings().weight
    start = torch.ones(2, weight.shape[1], dtype=weight.dtype, requires_grad=True)
    with weights_frozen(model.base_model):
        alone = functional.linear(weight, weight).mean(), torch.cat([weight, weight]).mean()
        together = functional.linear(start, weight=weight).mean()
    assert not any(value.requires_grad for value in alone)
    assert all(parameter.requires_grad for parameter in model.base_model.parameters())
    together.backward()
    assert weight.grad is None
    assert start.grad.abs().sum() > 0


def test_a_run_is_in_eval_mode_where_that_is_asked_for_and_the_base_in_its_own_otherwise():
    model = build()
    model.base_model.requires_grad_(True)
    model.train()
    with evaluating():
        assert model.base_model.training
        with settled(model.base_model):
            assert not any(module.training for module in model.base_model.modules())
    assert all(module.training for module in model.base_model.modules())
