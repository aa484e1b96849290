"""Twice differentiable attention on fused kernels, against PyTorch's MATH backend in float64."""

import pytest
import torch
from torch.nn import functional
from torch.nn.attention import SDPBackend, sdpa_kernel

from hf_gradmem import GradMemConfig, get_gradmem_model
from hf_gradmem.base import fused_attention
from hf_gradmem.base.fused_attention import FusedTwiceDifferentiable
from tests.support.tiny_models import tiny_causal_lm
from tests.writing.test_packing import CONTEXT, IDS

BATCH, HEADS, LENGTH = 2, 2, 5
SEEN = torch.ones(BATCH, 1, LENGTH, LENGTH, dtype=torch.bool).tril()
SEEN[0, :, :, 0] = False  # the first position of the first row sees nothing
NUMBERS = torch.linspace(-2, 2, HEADS * LENGTH**2, dtype=torch.float64).view(1, HEADS, LENGTH, LENGTH)

CALLS = {
    "plain": {},
    "causal": {"is_causal": True},
    "mask": {"attn_mask": SEEN},
    "mask of numbers": {"attn_mask": NUMBERS},
    "scale": {"is_causal": True, "scale": 0.7},
    "grouped queries": {"enable_gqa": True},
}


@pytest.fixture(autouse=True)
def every_length(monkeypatch):
    monkeypatch.setattr(fused_attention, "_SHORTEST", 0)


def inputs(call: str, dtype: torch.dtype = torch.float64) -> list[torch.Tensor]:
    torch.manual_seed(0)
    key_heads = 1 if call == "grouped queries" else HEADS
    shapes = (BATCH, HEADS, LENGTH, 3), (BATCH, key_heads, LENGTH, 3), (BATCH, key_heads, LENGTH, 4)
    return [torch.randn(shape, dtype=torch.float64).to(dtype).requires_grad_() for shape in shapes]


def twice(tensors: list[torch.Tensor], mode, **call) -> list[torch.Tensor]:
    """Output, its gradients, and the gradients of a function of all of these."""
    with mode:
        output = functional.scaled_dot_product_attention(*tensors, **call)
        gradients = torch.autograd.grad(output.square().sum(), tensors, create_graph=True)
    results = [output, *gradients]
    weighted = (value * torch.arange(value.numel()).view_as(value).sin() for value in results)
    return [*results, *torch.autograd.grad(sum(value.sum() for value in weighted), tensors)]


@pytest.mark.parametrize("scores_at_once", [2**18, 7], ids=["one block", "many blocks"])
@pytest.mark.parametrize("call", CALLS)
def test_both_derivatives_are_those_of_math(call, scores_at_once, monkeypatch):
    monkeypatch.setitem(fused_attention._SCORES_AT_ONCE, "cpu", scores_at_once)
    tensors = inputs(call)
    values = twice(tensors, FusedTwiceDifferentiable(), **CALLS[call])
    expected = twice(tensors, sdpa_kernel(SDPBackend.MATH), **CALLS[call])
    for value, wanted in zip(values, expected, strict=True):
        assert wanted.isfinite().all()
        torch.testing.assert_close(value, wanted, rtol=1e-10, atol=1e-12)


def test_half_precision_is_as_close_as_math():
    wanted = twice(inputs("causal"), sdpa_kernel(SDPBackend.MATH), is_causal=True)
    errors = []
    for mode in (FusedTwiceDifferentiable(), sdpa_kernel(SDPBackend.MATH)):
        values = twice(inputs("causal", torch.bfloat16), mode, is_causal=True)
        assert all(value.dtype == torch.bfloat16 for value in values)
        errors.append(max((value - exact).norm() / exact.norm() for value, exact in zip(values, wanted, strict=True)))
    assert errors[0] < 1.5 * errors[1] + 0.01


def test_autocast_computes_in_its_own_precision():
    tensors = [tensor.float() for tensor in inputs("causal")]
    with torch.autocast("cpu", dtype=torch.bfloat16), FusedTwiceDifferentiable():
        assert functional.scaled_dot_product_attention(*tensors, is_causal=True).dtype == torch.bfloat16


def test_both_derivatives_under_autocast_are_those_outside():
    tensors = [tensor.to(torch.bfloat16).float().detach().requires_grad_() for tensor in inputs("causal")]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        values = twice(tensors, FusedTwiceDifferentiable(), is_causal=True)
    halves = [tensor.detach().bfloat16().requires_grad_() for tensor in tensors]
    for value, wanted in zip(values, twice(halves, FusedTwiceDifferentiable(), is_causal=True), strict=True):
        torch.testing.assert_close(value.float(), wanted.float(), rtol=0.02, atol=0.02)


def test_no_matrix_of_positions_is_kept():
    kept = []
    tensors = [torch.randn(BATCH, HEADS, LENGTH, 8, requires_grad=True) for _ in range(3)]
    with (
        FusedTwiceDifferentiable(),
        torch.autograd.graph.saved_tensors_hooks(
            lambda tensor: kept.append(tensor.shape) or tensor, lambda tensor: tensor
        ),
    ):
        output = functional.scaled_dot_product_attention(*tensors, is_causal=True)
        torch.autograd.grad(output.sum(), tensors, create_graph=True)
    assert kept
    assert all(shape[-2:] != (LENGTH, LENGTH) for shape in kept)


@pytest.mark.parametrize("call", [{"dropout_p": 0.5}, {"attn_mask": NUMBERS.clone().requires_grad_()}])
def test_what_it_does_not_do_is_left_to_pytorch(call):
    tensors = inputs("plain")
    with sdpa_kernel(SDPBackend.MATH), FusedTwiceDifferentiable():
        output = functional.scaled_dot_product_attention(*tensors, **call)
    assert "_Attention" not in type(output.grad_fn).__name__


@pytest.mark.parametrize("prefix_segments", [0, 1], ids=["packed", "apart"])
@pytest.mark.parametrize("model_type", ["gpt2", "gpt_neox", "llama"])
def test_meta_gradients_of_a_model_are_those_of_math(model_type, prefix_segments, monkeypatch):
    results, calls = [], []
    plain = fused_attention.fused_attention
    monkeypatch.setattr(fused_attention, "fused_attention", lambda call: calls.append(call) or plain(call))
    for shortest in (1000, 0):
        assert not calls
        monkeypatch.setattr(fused_attention, "_SHORTEST", shortest)
        torch.manual_seed(0)
        config = GradMemConfig(num_memory_tokens=3, write_steps=2, write_prefix_segments=prefix_segments)
        model = get_gradmem_model(tiny_causal_lm(model_type), config).requires_grad_(True)
        context = {f"context_{name}": value for name, value in CONTEXT.items()}
        model(input_ids=IDS[:, :4], labels=IDS[:, :4], **context).loss.backward()
        results.append({name: p.grad for name, p in model.named_parameters() if p.grad is not None})
    assert calls
    for name, expected in results[0].items():
        torch.testing.assert_close(results[1][name], expected, rtol=1e-6, atol=1e-9, msg=name)
