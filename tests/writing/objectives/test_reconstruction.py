"""The objective's fast paths beside the plain one."""

import pytest
import torch

from hf_gradmem import GradMemForCausalLM
from tests.support.writing import build, objective_of

LORA = {"r": 2, "lora_alpha": 8, "target_modules": ["lm_head"]}


# What each base's head is: the product alone (with a bias in phi), or capped or scaled behind it.
HEADS = {"llama": True, "gpt2": True, "phi": True, "mamba": True, "gemma2": False, "granite": False, "cohere": False}


@pytest.mark.usefixtures("small_parts")
@pytest.mark.parametrize("model_type", HEADS)
def test_the_first_order_path_equals_the_plain_one(model_type):
    model = build(model_type)
    objective = objective_of(model, torch.tensor([0, 0, 0, 1, 1, 2, 2, 2, 2]).expand(5, -1))
    assert (objective.phase.output_head is not None) == HEADS[model_type]
    assert len(objective.rows.grouped_by_length()) > 1
    assert_paths_agree(model, objective)


def assert_paths_agree(model, objective):
    memory = (model.memory_init + torch.randn(5, 1, 1, dtype=torch.float64)).detach().requires_grad_()
    weights = [p for p in model.parameters() if p.requires_grad and p is not model.memory_init]
    plain = objective(memory)
    expected = torch.autograd.grad(plain.sum(), [memory, *weights], allow_unused=True)
    once = objective.first_order(memory)
    # Some bases cast their logits to float32 whatever they compute in, mamba among them.
    torch.testing.assert_close(once, plain.to(once), rtol=1e-6, atol=1e-7)
    for actual, wanted in zip(
        torch.autograd.grad(once.sum(), [memory, *weights], allow_unused=True), expected, strict=True
    ):
        if wanted is not None:
            torch.testing.assert_close(actual, wanted, rtol=1e-5, atol=1e-7)
    losses, gradient = objective.value_and_gradient(memory)
    torch.testing.assert_close(losses, plain.detach().to(losses), rtol=1e-6, atol=1e-7)
    torch.testing.assert_close(gradient, expected[0], rtol=1e-5, atol=1e-7)


@pytest.mark.usefixtures("small_parts")
@pytest.mark.parametrize(
    "settings",
    [{"write_head": True, "memory_projection": True, "num_control_tokens": 1}, {"write_lora": LORA}],
    ids=["head of its own", "LoRA on the head"],
)
def test_the_first_order_path_equals_the_plain_one_with(settings):
    model = build(**settings)
    model.requires_grad_(True)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name or "write_head" in name:
                parameter.add_(0.3 * torch.randn_like(parameter))
    objective = objective_of(model)
    assert (objective.phase.output_head is None) == ("write_lora" in settings)
    assert_paths_agree(model, objective)


def saved_tensors(model: GradMemForCausalLM) -> list[torch.Tensor]:
    """What a step keeps for its backward pass, weights aside."""
    weights = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: kept.append(tensor) or tensor, lambda tensor: tensor):
        objective_of(model).value_and_gradient(model.memory_init.expand(5, -1, -1))
    return [tensor for tensor in kept if tensor.untyped_storage().data_ptr() not in weights]


def test_a_step_keeps_no_logits_and_nothing_for_a_weight_s_sake():
    frozen, trained = build(write_head=True), build(write_head=True)
    trained.requires_grad_(True)
    shapes = [tensor.shape for tensor in saved_tensors(frozen)]
    assert [tensor.shape for tensor in saved_tensors(trained)] == shapes
    assert not any(frozen.decoder.vocab_size in shape for shape in shapes)
    assert all(parameter.requires_grad for parameter in trained.parameters())
