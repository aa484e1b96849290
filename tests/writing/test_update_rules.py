"""Update rules and clipping against torch.optim and torch.nn.utils, in float64."""

import pytest
import torch

from hf_gradmem.variants import options_of
from hf_gradmem.writing.update_rules import UPDATE_RULES, UpdateRule, clip

REFERENCES = {
    "sgd": lambda parameters: torch.optim.SGD(parameters, lr=0.1),
    "momentum": lambda parameters: torch.optim.SGD(parameters, lr=0.1, momentum=0.8),
    "adam": lambda parameters: torch.optim.Adam(parameters, lr=0.1, betas=(0.8, 0.7)),
}


def made(name: str, betas: tuple[float, float]) -> UpdateRule:
    """The rule, made from those of its options that it reads."""
    values = {"write_betas": betas}
    return UPDATE_RULES[name](**{option: values[option] for option in options_of(UPDATE_RULES[name])})


@pytest.mark.parametrize("name", UPDATE_RULES)
def test_steps_equal_torch_optim(name):
    memory = torch.randn(2, 3, 4, dtype=torch.float64)
    reference = torch.nn.Parameter(memory.clone())
    optimizer = REFERENCES[name]([reference])
    rule, state = made(name, (0.8, 0.7)), None
    for _ in range(5):
        gradient = torch.randn_like(memory)
        memory, state = rule(memory, gradient, state, 0.1)
        reference.grad = gradient
        optimizer.step()
        torch.testing.assert_close(memory, reference.detach(), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("name", UPDATE_RULES)
def test_two_steps_pass_gradcheck(name):
    rule = made(name, (0.8, 0.7))

    def two_steps(memory, first, second, rate):
        memory, state = rule(memory, first, None, rate)
        return rule(memory, second, state, rate)[0]

    inputs = [torch.randn(2, 3, 2, dtype=torch.float64, requires_grad=True) for _ in range(3)]
    rate = torch.tensor(0.3, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(two_steps, (*inputs, rate))


@pytest.mark.parametrize("name", UPDATE_RULES)
def test_a_gradient_of_zero_has_a_finite_derivative(name):
    gradient = torch.zeros(1, 2, 2, dtype=torch.float64, requires_grad=True)
    memory, _ = made(name, (0.9, 0.9))(torch.ones_like(gradient), gradient, None, 0.1)
    (derivative,) = torch.autograd.grad(memory.sum(), gradient)
    assert derivative.isfinite().all()


def test_clipping_by_norm_equals_torch_for_each_sample():
    gradient = torch.randn(3, 2, 4, dtype=torch.float64) * torch.tensor([0.01, 1.0, 10.0])[:, None, None]
    clipped = clip(gradient, max_norm=0.5, max_value=None)
    for sample, expected in zip(clipped, gradient, strict=True):
        parameter = torch.nn.Parameter(torch.zeros_like(expected))
        parameter.grad = expected.clone()
        torch.nn.utils.clip_grad_norm_([parameter], 0.5)
        torch.testing.assert_close(sample, parameter.grad, rtol=1e-12, atol=0)


def test_clipping_by_value_bounds_every_element():
    gradient = torch.randn(3, 2, 4, dtype=torch.float64)
    clipped = clip(gradient, max_norm=None, max_value=0.3)
    assert torch.equal(clipped, gradient.clamp(-0.3, 0.3))
    assert clipped.abs().max() == 0.3
