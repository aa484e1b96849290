"""A model whose loss is smooth in float64 in everything that can train, and its gradients."""

import pytest
import torch

from hf_gradmem import GradMemConfig, GradMemForCausalLM, get_gradmem_model
from tests.support.tiny_models import tiny_causal_lm, tiny_tokens

LORA = {"r": 2, "lora_alpha": 4, "target_modules": ["c_attn", "c_proj"], "fan_in_fan_out": True}
SEGMENT_IDS = torch.tensor([[0, 0, 0, 1, 1, 2, 2, 2, 2], [5, 5, 6, 6, 6, 6, 7, 0, 0]])
CONTEXT_MASK = torch.tensor([[1] * 9, [1] * 7 + [0] * 2])
# Two contexts with two questions each.
CONTEXT, QUERIES = tiny_tokens(2, 9, seed=1), torch.stack([tiny_tokens(2, 5, seed=seed) for seed in (2, 3)], dim=1)
LABELS = QUERIES.clone()
LABELS[0, :, :2] = LABELS[1, 1] = -100  # of the second context's questions one has no answer
BATCH = {
    "context_input_ids": CONTEXT,
    "context_attention_mask": CONTEXT_MASK,
    "input_ids": QUERIES,
    "labels": LABELS,
}


def build(**settings) -> GradMemForCausalLM:
    """GPT-2 computes in float64 throughout, so that nothing rounds the differences."""
    torch.manual_seed(0)
    defaults = {"num_memory_tokens": 3, "write_steps": 2, "write_learning_rate": 0.3}
    model = get_gradmem_model(tiny_causal_lm("gpt2"), GradMemConfig(**defaults | settings))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name or name.startswith(("memory_projection", "write_head", "write_log")):
                parameter.add_(0.1 * torch.randn_like(parameter))  # off the point where terms vanish
    return model


def loss_of(model: GradMemForCausalLM, segment_ids: torch.Tensor | None = None, asked: bool = True) -> torch.Tensor:
    query = tiny_tokens(2, 5, seed=2)
    return model(
        context_input_ids=tiny_tokens(2, 9, seed=1),
        context_attention_mask=CONTEXT_MASK,
        context_segment_ids=segment_ids,
        **({"input_ids": query, "labels": query} if asked else {}),
    ).loss


def assert_gradient_is_the_slope(model: GradMemForCausalLM, parameters: dict, **inputs) -> None:
    """Compare with central differences along two random directions of each parameter."""
    model.zero_grad()
    loss_of(model, **inputs).backward()
    for name, parameter in parameters.items():
        gradient = parameter.grad.clone()
        assert gradient.any(), f"{name} has no gradient"
        start = parameter.detach().clone()
        for _ in range(2):
            direction = torch.randn_like(start)
            direction /= direction.norm()
            values = []
            for offset in (1e-5, -1e-5):
                with torch.no_grad():
                    parameter.copy_(start + offset * direction)
                    values.append(loss_of(model, **inputs).item())
            with torch.no_grad():
                parameter.copy_(start)
            measured = (values[0] - values[1]) / 2e-5
            expected = (gradient * direction).sum().item()
            assert measured == pytest.approx(expected, rel=1e-5, abs=1e-7), name


def once_differentiable_attention(module, query, key, value, attention_mask, scaling=None, dropout=0.0, **kwargs):
    output = OnceDifferentiable.apply(query, key, value, attention_mask, scaling)
    return output.transpose(1, 2).contiguous(), None


class OnceDifferentiable(torch.autograd.Function):
    """A fused kernel's manners: a backward pass that has no backward pass."""

    @staticmethod
    def forward(ctx, query, key, value, mask, scaling):
        ctx.save_for_backward(query, key, value)
        ctx.rest = mask, scaling
        return torch.nn.functional.scaled_dot_product_attention(query, key, value, attn_mask=mask, scale=scaling)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, gradient):
        inputs = [tensor.detach().requires_grad_() for tensor in ctx.saved_tensors]
        with torch.enable_grad():
            mask, scaling = ctx.rest
            output = torch.nn.functional.scaled_dot_product_attention(*inputs, attn_mask=mask, scale=scaling)
        return *torch.autograd.grad(output, inputs, gradient), None, None


EVERYTHING = {
    "memory_projection": True,
    "write_head": True,
    "num_control_tokens": 2,
    "learn_write_learning_rate": "per_token",
    "write_lora": LORA,
    "read_lora": LORA,
}


def gradients_of(model: GradMemForCausalLM, **inputs) -> dict[str, torch.Tensor]:
    model.zero_grad()
    loss_of(model, **inputs).backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def training(**settings) -> GradMemForCausalLM:
    model = build(**settings)
    return model.requires_grad_(True)


def assert_same(values: dict, expected: dict) -> None:
    assert values.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(values[name], value, rtol=1e-9, atol=1e-12, msg=name)
