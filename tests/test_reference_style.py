"""What the benchmarks measure against computes what the authors' implementation does: the golden cases, in float64."""

import json

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModelForCausalLM

from benchmarks.reference_style import ReferenceSettings, ReferenceStyle
from tests.test_golden import CASES, FLOAT32_SOFTMAX, GOLDEN, assert_equal


def reference(case: str) -> tuple[ReferenceStyle, dict[str, torch.Tensor]]:
    description, tensors = json.loads((GOLDEN / f"{case}.json").read_text()), load_file(GOLDEN / f"{case}.safetensors")
    config, theirs = dict(description["base_config"]), description["gradmem"]
    base = AutoModelForCausalLM.from_config(
        AutoConfig.for_model(config.pop("model_type"), **config), attn_implementation="eager"
    ).double()
    model = ReferenceStyle(
        base,
        ReferenceSettings(
            num_memory_tokens=theirs["n_mem_tokens"],
            write_steps=theirs["K"],
            write_learning_rate=theirs["lr"],
            second_order=theirs["grad_mode"] == "second",
            second_order_steps=theirs.get("last_K_second_order"),
            max_grad_norm=theirs.get("inner_clip_norm"),
            num_control_tokens=theirs.get("n_ctrl_tokens", 0),
            memory_projection=theirs.get("use_mem_proj", False),
            write_head=theirs.get("use_write_head", False),
            reconstruction_loss_weight=theirs.get("inner_loss_weight", 0.0),
        ),
    )
    parameters = {name.removeprefix("param."): value for name, value in tensors.items() if name.startswith("param.")}
    missing, unexpected = model.load_state_dict(parameters, strict=False)
    assert not unexpected
    assert all("lm_head" in name or "bias" in name or "rotary" in name for name in missing), missing
    return model.eval(), tensors


@pytest.mark.parametrize("case", CASES)
def test_reference_style_passes_the_golden_cases(case):
    model, tensors = reference(case)
    # A float32 softmax is rounded by how many threads share it (tests/test_golden.py).
    relative = 1e-6 if case in FLOAT32_SOFTMAX else 1e-10
    context, query = tensors["context_input_ids"], tensors["input_ids"]
    loss, logits, memory, write_losses = model(
        context, (context != 0).long(), query, (query != 0).long(), tensors["labels"]
    )
    real = query != 0
    assert_equal(memory, tensors["out.memory"], "memory", relative)
    assert_equal(logits[real], tensors["out.logits"][:, :-1][real], "logits", relative)
    assert_equal(loss, tensors["out.loss"][0], "loss", relative)
    assert_equal(write_losses.mean(), tensors["out.last_write_loss_mean"][0], "last write loss", relative)

    loss.backward()
    parameters = dict(model.named_parameters())
    for name, value in tensors.items():
        if name.startswith("grad."):
            assert_equal(parameters.pop(name.removeprefix("grad.")).grad, value, name, relative)
    assert all(p.grad is None or not p.grad.any() for p in parameters.values())
