"""The loss through the output head, a few positions at a time."""

import pytest
import torch
from torch.nn import functional

from hf_gradmem.base import output_head
from hf_gradmem.base.output_head import OutputHead, head_cross_entropy


@pytest.mark.usefixtures("small_parts")
@pytest.mark.parametrize("with_bias", [False, True])
def test_loss_through_the_head_equals_plain_cross_entropy(with_bias):
    hidden, weight, bias = (torch.randn(*s, dtype=torch.float64, requires_grad=True) for s in ((11, 6), (17, 6), (17,)))
    targets, weights = torch.randint(17, (11,)), torch.randn(11, dtype=torch.float64)
    bias = bias if with_bias else None
    inputs = [tensor for tensor in (hidden, weight, bias) if tensor is not None]
    expected = functional.cross_entropy(functional.linear(hidden, weight, bias), targets, reduction="none")
    losses = head_cross_entropy(hidden, OutputHead(weight, bias), targets)
    torch.testing.assert_close(losses, expected, rtol=1e-13, atol=1e-13)
    pairs = zip(
        torch.autograd.grad((losses * weights).sum(), inputs),
        torch.autograd.grad((expected * weights).sum(), inputs),
        strict=True,
    )
    for actual, plain in pairs:
        torch.testing.assert_close(actual, plain, rtol=1e-12, atol=1e-13)


def test_no_positions_have_no_losses():
    head, hidden = OutputHead(torch.randn(7, 3)), torch.zeros((0, 3), requires_grad=True)
    losses = head_cross_entropy(hidden, head, torch.zeros(0, dtype=torch.long))
    assert losses.shape == (0,)
    losses.sum().backward()
    assert hidden.grad.shape == (0, 3)


@pytest.mark.parametrize("at_once", [{}, {"cpu": 40}])
def test_half_precision_is_near_to_float64_in_one_block_and_in_many(monkeypatch, at_once):
    monkeypatch.setattr(output_head, "_IN_FLOAT32_AT_ONCE", at_once)
    hidden, weight, targets = torch.randn(11, 6), torch.randn(17, 6), torch.randint(17, (11,))
    half, half_weight = hidden.bfloat16().requires_grad_(), weight.bfloat16()
    exact = half.detach().double().requires_grad_()
    losses = head_cross_entropy(half, OutputHead(half_weight), targets)
    truth = functional.cross_entropy(exact @ half_weight.double().T, targets, reduction="none")
    assert losses.dtype == torch.float32
    torch.testing.assert_close(losses.double(), truth, rtol=0.02, atol=0.02)
    (gradient,), (expected,) = torch.autograd.grad(losses.sum(), half), torch.autograd.grad(truth.sum(), exact)
    assert (gradient - expected).norm() < 0.01 * expected.norm()


@pytest.mark.usefixtures("small_parts")
@pytest.mark.parametrize("with_bias", [False, True])
def test_a_second_derivative_equals_that_of_plain_cross_entropy(monkeypatch, with_bias):
    monkeypatch.setattr(output_head, "_IN_FLOAT32_AT_ONCE", {"cpu": 40})
    hidden, weights = (torch.randn(*s, dtype=torch.float64, requires_grad=True) for s in ((11, 6), (11,)))
    weight, bias = (torch.randn(*shape, dtype=torch.float64) for shape in ((17, 6), (17,)))
    head = OutputHead(weight, bias if with_bias else None)
    targets = torch.randint(17, (11,))
    assert torch.autograd.gradgradcheck(
        lambda *given: head_cross_entropy(given[0], head, targets) * given[1], (hidden, weights)
    )
    along = torch.randn(11, 6, dtype=torch.float64)
    second = []
    for losses in (
        head_cross_entropy(hidden, head, targets),
        functional.cross_entropy(head(hidden), targets, reduction="none"),
    ):
        (gradient,) = torch.autograd.grad((losses * weights).sum(), hidden, create_graph=True)
        second.append(torch.autograd.grad((gradient * along).sum(), (hidden, weights)))
    for actual, plain in zip(*second, strict=True):
        torch.testing.assert_close(actual, plain, rtol=1e-11, atol=1e-12)


@pytest.mark.parametrize("at_once", [{}, {"cpu": 40}])
def test_a_second_derivative_in_half_precision_is_near_to_that_in_float64(monkeypatch, at_once):
    monkeypatch.setattr(output_head, "_IN_FLOAT32_AT_ONCE", at_once)
    weight, targets = torch.randn(17, 6).bfloat16(), torch.randint(17, (11,))
    half, along = torch.randn(11, 6).bfloat16().requires_grad_(), torch.randn(11, 6)
    exact = half.detach().double().requires_grad_()
    (gradient,) = torch.autograd.grad(
        head_cross_entropy(half, OutputHead(weight), targets).sum(), half, create_graph=True
    )
    truth = functional.cross_entropy(exact @ weight.double().T, targets, reduction="sum")
    (expected,) = torch.autograd.grad(truth, exact, create_graph=True)
    (second,) = torch.autograd.grad((gradient * along).sum(), half)
    (second_expected,) = torch.autograd.grad((expected * along).sum(), exact)
    assert (second - second_expected).norm() < 0.02 * second_expected.norm()


def test_derivatives_that_it_does_not_have_are_refused():
    hidden, weight = torch.randn(3, 4, requires_grad=True), torch.randn(5, 4)
    targets = torch.tensor([0, 1, 2])
    loss = head_cross_entropy(hidden, OutputHead(weight), targets).sum()
    (gradient,) = torch.autograd.grad(loss, hidden, create_graph=True)
    with pytest.raises(RuntimeError, match="differentiable twice"):
        torch.autograd.grad(gradient.sum(), hidden, create_graph=True)
    loss = head_cross_entropy(hidden, OutputHead(weight.requires_grad_()), targets).sum()
    with pytest.raises(RuntimeError, match="differentiable once where its head trains"):
        torch.autograd.grad(loss, hidden, create_graph=True)
