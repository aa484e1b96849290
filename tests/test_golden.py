"""Equality with the authors' implementation, in float64: outputs, every gradient, and no gradient where it has none."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModelForCausalLM

from hf_gradmem import GradMemConfig, get_gradmem_model
from hf_gradmem.writing.contexts import Contexts
from hf_gradmem.writing.update_rules import clip

GOLDEN = Path(__file__).parent / "golden"
CASES = sorted(path.stem for path in GOLDEN.glob("*.json"))
RELATIVE = 1e-10
# Llama and GPT-NeoX take the softmax of eager attention in float32 even in a float64 model, and so did the authors'
# run, on a processor with AVX-512: with shorter vectors it is rounded otherwise. SDPA keeps float64: it agrees with the
# cases to float32's precision, and to 1e-10 with an eager attention that keeps float64 as well.
FLOAT32_SOFTMAX = {"llama_first", "llama_second", "gpt_neox_control_truncated"}
ROUNDED_ALIKE = torch.backends.cpu.get_cpu_capability() == "AVX512"

OUR_NAMES = {
    "mem": "memory_init",
    "mem_proj.weight": "memory_projection.weight",
    "mem_proj.bias": "memory_projection.bias",
    "write_st": "write_start",
    "read_st": "read_start",
}


@pytest.fixture(autouse=True)
def threads_of_the_cases(request):
    """How a float32 softmax is rounded depends on how it is shared between threads; the cases were made with two."""
    before = torch.get_num_threads()
    values = request.node.callspec.params
    if values["case"] in FLOAT32_SOFTMAX and values.get("attn_implementation") == "eager":
        torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


def our_name(theirs: str) -> str:
    return theirs.replace("model.", "base_model.", 1) if theirs.startswith("model.") else OUR_NAMES.get(theirs, theirs)


def our_config(theirs: dict, **changes) -> GradMemConfig:
    modes = {"second": "exact", "first": "first_order", "none": "none"}
    settings = {
        "num_memory_tokens": theirs["n_mem_tokens"],
        "write_steps": theirs["K"],
        "write_learning_rate": theirs["lr"],
        "meta_gradient": modes[theirs["grad_mode"]],
        "meta_gradient_steps": theirs.get("last_K_second_order"),
        "write_max_grad_norm": theirs.get("inner_clip_norm"),
        "write_grad_clip_value": theirs.get("inner_clip_value"),
        "num_control_tokens": theirs.get("n_ctrl_tokens", 0),
        "memory_projection": theirs.get("use_mem_proj", False),
        "write_head": theirs.get("use_write_head", False),
        "reconstruction_loss_weight": theirs["inner_loss_weight"] if theirs.get("add_inner_loss_to_outer") else 0.0,
    }
    return GradMemConfig(**settings | changes)


def load_case(case: str, attn_implementation: str, **changes):
    description = json.loads((GOLDEN / f"{case}.json").read_text())
    tensors = load_file(GOLDEN / f"{case}.safetensors")
    base_config = dict(description["base_config"])
    base_config = AutoConfig.for_model(base_config.pop("model_type"), **base_config)
    # Cast after construction, as the cases were made: the rotary frequencies are then those of float32.
    base = AutoModelForCausalLM.from_config(base_config, attn_implementation=attn_implementation).double()
    model = get_gradmem_model(base, our_config(description["gradmem"], **changes))
    parameters = {
        our_name(name.removeprefix("param.")): value for name, value in tensors.items() if name.startswith("param.")
    }
    missing, unexpected = model.load_state_dict(parameters, strict=False)
    assert not unexpected
    assert all("lm_head" in name or "bias" in name or "rotary" in name for name in missing), missing
    model.requires_grad_(True)
    return model, tensors


def assert_equal(actual: torch.Tensor, expected: torch.Tensor, name: str, relative: float = RELATIVE) -> None:
    scale = expected.abs().max().clamp(min=1e-300)
    assert ((actual - expected).abs().max() / scale).item() <= relative, name


def relative_error(case: str, attn_implementation: str) -> float:
    """How far a result may be from the authors'."""
    alike = attn_implementation == "eager" and ROUNDED_ALIKE
    return RELATIVE if alike or case not in FLOAT32_SOFTMAX else 1e-6


def forward(model, tensors):
    context, query = tensors["context_input_ids"], tensors["input_ids"]
    return model(
        context_input_ids=context,
        context_attention_mask=(context != 0).long(),
        input_ids=query,
        attention_mask=(query != 0).long(),
        labels=tensors["labels"],
    )


@pytest.mark.parametrize("checkpointed", [True, False])
@pytest.mark.parametrize("attn_implementation", ["eager", "sdpa"])
@pytest.mark.parametrize("case", CASES)
def test_outputs_and_gradients_equal_the_authors(case, attn_implementation, checkpointed):
    model, tensors = load_case(case, attn_implementation, checkpoint_write_steps=checkpointed)
    relative = relative_error(case, attn_implementation)
    output = forward(model, tensors)
    real = tensors["input_ids"] != 0
    assert_equal(output.memory.embeddings, tensors["out.memory"], "memory", relative)
    # Their position j predicts query token j, ours token j + 1; at padding ours mean nothing.
    assert_equal(output.logits[real], tensors["out.logits"][:, 1:][real], "logits", relative)
    assert_equal(output.loss, tensors["out.loss"][0], "loss", relative)
    assert_equal(output.write_losses[:, -1].mean(), tensors["out.last_write_loss_mean"][0], "last write loss", relative)

    output.loss.backward()
    parameters = dict(model.named_parameters())
    expected = {our_name(name.removeprefix("grad.")): t for name, t in tensors.items() if name.startswith("grad.")}
    for name, parameter in parameters.items():
        if name in expected:
            assert_equal(parameter.grad, expected[name], name, relative)
        else:
            assert parameter.grad is None or not parameter.grad.any(), name
    assert not expected.keys() - parameters.keys()


@pytest.mark.parametrize("case", CASES)
def test_sdpa_equals_eager_where_eager_keeps_float64(case, monkeypatch):
    softmax = torch.nn.functional.softmax
    monkeypatch.setattr(torch.nn.functional, "softmax", lambda values, dim, **options: softmax(values, dim=dim))
    gradients = {}
    for attn_implementation in ("eager", "sdpa"):
        model, tensors = load_case(case, attn_implementation)
        forward(model, tensors).loss.backward()
        gradients[attn_implementation] = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    assert gradients["eager"].keys() == gradients["sdpa"].keys()
    for name, gradient in gradients["eager"].items():
        if gradient.any():
            assert_equal(gradients["sdpa"][name], gradient, name)


@pytest.mark.parametrize("case", CASES)
def test_gradient_norms_equal_the_authors(case):
    """Each step by plain autograd on the objective."""
    model, tensors = load_case(case, "eager")
    config, context = model.config, tensors["context_input_ids"]
    objective = model.writer.objective(model.writer.rows(Contexts(context, context != 0, None)))
    memory, norms = model.form.start(len(context)), []
    for _ in range(config.write_steps):
        memory = memory.detach().requires_grad_()
        (gradient,) = torch.autograd.grad(objective(memory).sum(), memory)
        norms.append(torch.linalg.vector_norm(gradient, dim=(1, 2)))
        clipped = clip(gradient, config.write_max_grad_norm, config.write_grad_clip_value)
        memory = memory - config.write_learning_rate * clipped
    expected, relative = tensors["out.write_grad_norm_mean"][0], relative_error(case, "eager")
    assert_equal(torch.stack(norms).mean(), expected, "gradient norm", relative)
