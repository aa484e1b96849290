"""Short attention of a base in half precision on a CPU, made in float32."""

import pytest
import torch
from torch.nn import functional

from hf_gradmem import GradMemConfig, get_gradmem_model
from hf_gradmem.base import short_attention
from hf_gradmem.base.short_attention import ShortAttentionInFloat32
from tests.base.test_fused_attention import CALLS, LENGTH, inputs
from tests.support.tiny_models import tiny_causal_lm, tiny_tokens


def attention(call: str, dtype: torch.dtype) -> list[torch.Tensor]:
    """Output and gradients of one call."""
    tensors = inputs(call, dtype)
    arguments = dict(CALLS[call])
    mask = arguments.get("attn_mask")
    if mask is not None and mask.dtype != torch.bool:
        arguments["attn_mask"] = mask.to(dtype)
    output = functional.scaled_dot_product_attention(*tensors, **arguments)
    return [output, *torch.autograd.grad(output.square().sum(), tensors)]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("call", [name for name in CALLS if name != "mask"])
def test_it_is_what_float32_gives_rounded_once(call, dtype):
    with ShortAttentionInFloat32():
        values = attention(call, dtype)
    exact = attention(call, torch.float64)
    for value, wanted in zip(values, exact, strict=True):
        assert value.dtype == dtype
        # the inputs are rounded once, the output once, and each gradient once
        error = (value.double() - wanted).norm() / wanted.norm()
        assert error < 4 * torch.finfo(dtype).eps


def test_a_position_that_sees_nothing_is_finite_where_pytorch_is():
    with ShortAttentionInFloat32():
        assert all(value.isfinite().all() for value in attention("mask", torch.bfloat16))


@pytest.mark.parametrize("unchanged", ["float32", "float64", "long"])
def test_the_rest_is_left_to_pytorch(unchanged, monkeypatch):
    dtype = torch.bfloat16 if unchanged == "long" else getattr(torch, unchanged)
    monkeypatch.setattr(short_attention, "LONGEST", LENGTH - 1 if unchanged == "long" else LENGTH)
    with ShortAttentionInFloat32():
        values = attention("causal", dtype)
    for value, wanted in zip(values, attention("causal", dtype), strict=True):
        assert torch.equal(value, wanted)


def test_autocast_does_not_cast_back():
    with ShortAttentionInFloat32():
        output = attention("causal", torch.bfloat16)[0]
        with torch.autocast("cpu", dtype=torch.bfloat16):
            assert torch.equal(attention("causal", torch.bfloat16)[0], output)


def memory_of_half_precision() -> torch.Tensor:
    torch.manual_seed(0)
    base = tiny_causal_lm("llama").to(torch.bfloat16)
    model = get_gradmem_model(base, GradMemConfig(num_memory_tokens=3, write_steps=3))
    return model.write(input_ids=tiny_tokens(2, 9)).embeddings.detach()


def test_a_base_in_half_precision_attends_so(monkeypatch):
    with_it = memory_of_half_precision()
    monkeypatch.setattr(short_attention, "LONGEST", 0)
    without = memory_of_half_precision()
    assert not torch.equal(with_it, without)
    torch.testing.assert_close(with_it, without, rtol=0.1, atol=0.05)


def test_layers_under_activation_checkpointing_are_run_again_as_they_were():
    base = tiny_causal_lm("llama").to(torch.bfloat16)
    model = get_gradmem_model(base, GradMemConfig(num_memory_tokens=3, write_steps=1))
    base.requires_grad_(True).train()
    base.activation_checkpointing_enable({"use_reentrant": False})
    query = tiny_tokens(2, 5)
    model(input_ids=query, labels=query, memory=model.write(input_ids=tiny_tokens(2, 9))).loss.backward()
    assert all(weight.grad.isfinite().all() for weight in base.parameters() if weight.grad is not None)
    assert any(weight.grad is not None for weight in base.parameters())
