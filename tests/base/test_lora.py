"""LoRA by phase in PEFT's own layers."""

import torch
from peft.tuners.tuners_utils import BaseTunerLayer

from tests.support.tiny_models import tiny_tokens
from tests.support.writing import build

LORA = {"r": 2, "target_modules": ["q_proj", "up_proj", "embed_tokens"]}


def moved(**settings):
    model = build(**settings)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.copy_(0.3 * torch.randn_like(parameter))
    return model


def test_outside_the_phases_pefts_own_switches_decide():
    """PEFT runs, and merges, what the phase runs: the layers are its own."""
    model = moved(write_lora=LORA)
    ids = tiny_tokens(2, 7)
    layers = [module for module in model.base_model.modules() if isinstance(module, BaseTunerLayer)]

    def logits() -> torch.Tensor:
        with torch.no_grad():
            return model.base_model(input_ids=ids).logits

    plain = logits()
    with model.write_phase.active():
        on = logits()
    assert layers
    assert not torch.allclose(on, plain)
    torch.testing.assert_close(logits(), plain, rtol=0, atol=0)
    for layer in layers:
        layer.enable_adapters(True)
        layer.set_adapter("write")
    torch.testing.assert_close(logits(), on, rtol=0, atol=0)
    with model.read_phase.active():
        torch.testing.assert_close(logits(), plain, rtol=0, atol=0)
    for layer in layers:
        layer.merge(adapter_names=["write"])
        layer.base_layer.requires_grad_(False)
    torch.testing.assert_close(logits(), on, rtol=1e-9, atol=1e-9)


def test_a_lora_of_a_bare_parameter_is_on_in_its_phase_alone():
    model = moved(write_lora={"r": 2, "target_modules": [], "target_parameters": ["mlp.down_proj.weight"]})
    ids = tiny_tokens(2, 7)
    with torch.no_grad():
        plain = model.base_model(input_ids=ids).logits
        with model.write_phase.active():
            on = model.base_model(input_ids=ids).logits
        again = model.base_model(input_ids=ids).logits
    assert not torch.allclose(on, plain)
    torch.testing.assert_close(again, plain, rtol=0, atol=0)
