"""LoRA by phase in PEFT's own layers."""

import copy
from unittest.mock import Mock

import pytest
import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from safetensors.torch import save_file

from hf_gradmem import GradMemConfig, get_gradmem_model
from hf_gradmem.memory.phase import Phase
from tests.support.messages import says
from tests.support.small_models import EVERY_OPTION, named_base, nameless_base, with_memory
from tests.support.tiny_models import tiny_causal_lm, tiny_tokens
from tests.support.writing import build

LORA = {"r": 2, "target_modules": ["q_proj", "up_proj", "lm_head"]}


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


@pytest.mark.parametrize("variant", [{}, {"use_dora": True}])
def test_lora_of_a_base_in_half_precision_multiplies_in_it_and_trains_in_float32(variant):
    """Against the same weights in float64; no input of a layer is kept in float32 but where DoRA needs it."""
    model = moved(dtype=torch.bfloat16, read_lora={"r": 2, "target_modules": ["down_proj"], **variant})
    width = model.base_model.config.intermediate_size
    results = []
    for each in (model, copy.deepcopy(model).double()):
        own = [weight for name, weight in each.named_parameters() if "lora_" in name]
        kept = []
        with (
            each.read_phase.active(),
            torch.autograd.graph.saved_tensors_hooks(lambda x, kept=kept: kept.append(x) or x, lambda x: x),
        ):
            logits = each.base_model(input_ids=tiny_tokens(2, 7)).logits
        gradients = torch.autograd.grad(logits.double().square().mean(), own)
        if each is model:
            assert {gradient.dtype for gradient in gradients} == {torch.float32}
            inputs = [x for x in kept if x.dtype == torch.float32 and x.numel() == 14 * width]
            assert bool(inputs) == bool(variant)
        results.append([logits.double(), torch.cat([gradient.double().flatten() for gradient in gradients])])
    for half, exact in zip(*results, strict=True):
        assert (half - exact).norm() / exact.norm() < 0.06


@pytest.mark.parametrize(
    "arguments",
    [
        {"modules_to_save": ["lm_head"]},
        {"bias": "lora_only"},
        {"trainable_token_indices": [4, 5]},
        {"layer_replication": [(0, 1)]},
        *({"init_lora_weights": name} for name in ("pissa", "pissa_niter_2", "olora", "OLoRA", "corda", "loftq")),
    ],
    ids=str,
)
def test_what_would_reach_out_of_the_phase_is_refused_and_the_base_stays_as_it_was(arguments):
    assert_refused({"target_modules": ["q_proj"]} | arguments, next(iter(arguments)))


@pytest.mark.parametrize(
    "targets",
    [
        {"target_modules": ["q_proj", "embed_tokens"]},
        {"target_modules": r"model\.(embed_tokens|layers.*q_proj)"},
        {"target_modules": [], "target_parameters": ["embed_tokens.weight"]},
    ],
    ids=str,
)
def test_the_token_embedding_has_no_lora_since_tokens_are_looked_up_outside_the_phases(targets):
    assert_refused(targets, "model.embed_tokens is the base's token embedding")


@pytest.mark.parametrize(
    "targets", [{"target_modules": ["lm_head"]}, {"target_parameters": ["lm_head.weight"]}], ids=str
)
def test_a_head_that_is_tied_to_the_token_embedding_has_no_lora_either(targets):
    assert_refused({"target_modules": ["q_proj"]} | targets, "lm_head is the base's token embedding (", tied=True)


@pytest.mark.parametrize(
    "options",
    [
        {"read_lora": {"r": 2, "target_modules": ["q_proj", "missing"], "target_parameters": ["down_proj.weight"]}},
        {"read_lora": {"r": 2, "target_modules": ["missing"]}},
        {"read_lora": {"r": 2, "target_modules": ["self_attn"]}},
        {"memory_form": "key_values", "num_memory_tokens": 9, "model_type": "mistral"},
    ],
    ids=str,
)
def test_a_base_that_gets_no_memory_keeps_no_lora(options, monkeypatch):
    options = dict(options)
    base = tiny_causal_lm(options.pop("model_type", "llama"))
    before = copy.deepcopy(base.state_dict())
    monkeypatch.setattr(Phase, "check", Mock(side_effect=ValueError("no")))  # where nothing else is wrong
    write_lora = {"r": 2, "target_modules": ["q_proj"], "target_parameters": ["up_proj.weight"]}
    with pytest.raises(ValueError):  # noqa: PT011
        get_gradmem_model(base, GradMemConfig(write_lora=write_lora, **options))
    assert_as_before(base, before)
    monkeypatch.undo()
    get_gradmem_model(base, GradMemConfig(write_lora=write_lora))


def test_a_base_that_gets_no_adapter_keeps_no_lora(tmp_path):
    named_base(tmp_path / "base")
    with_memory(named_base(tmp_path / "base"), **EVERY_OPTION).save_pretrained(tmp_path / "adapter")
    save_file({}, tmp_path / "adapter" / "model.safetensors")
    base = named_base(tmp_path / "base")
    before = copy.deepcopy(base.state_dict())
    with pytest.raises(ValueError, match="is not the adapter that its"):
        get_gradmem_model(base, tmp_path / "adapter")
    assert_as_before(base, before)


@pytest.mark.parametrize("phase", ["write", "read"])
def test_a_base_has_the_lora_of_the_model_that_it_was_given_to_last(phase, tmp_path):
    earlier = moved(**{f"{phase}_lora": {"r": 2, "target_modules": ["q_proj"]}})
    base, ids = earlier.base_model, tiny_tokens(1, 7)
    torch.manual_seed(0)
    plain = get_gradmem_model(base, GradMemConfig())
    assert not any("lora" in name for name in plain.state_dict())
    alone = get_gradmem_model(copy.deepcopy(base), GradMemConfig())
    alone.load_state_dict(plain.state_dict())
    memory = plain.write(input_ids=ids)
    assert torch.equal(memory.embeddings, alone.write(input_ids=ids).embeddings)
    for use in (lambda: earlier.write(input_ids=ids), lambda: earlier.save_pretrained(tmp_path)):
        with pytest.raises(RuntimeError, match=r"was given to another GradMem since.* Load the base once for each"):
            use()
    later = get_gradmem_model(base, earlier.config)  # as in a cell of a notebook that is run again
    later.write(input_ids=ids)
    with pytest.raises(RuntimeError, match="was given to another GradMem since"):
        plain(input_ids=ids, memory=memory)


def test_models_without_lora_share_a_base():
    first = moved()
    second = get_gradmem_model(first.base_model, GradMemConfig())
    ids = tiny_tokens(1, 7)
    for model in (first, second):
        model(input_ids=ids, memory=model.write(input_ids=ids))


def assert_refused(arguments, message, tied=False):
    base = nameless_base(tied)
    before = copy.deepcopy(base.state_dict())
    with pytest.raises(ValueError, match=says("write_lora=", "does not fit LlamaForCausalLM", message)):
        get_gradmem_model(base, GradMemConfig(write_lora={"r": 2, **arguments}))
    assert_as_before(base, before)


def assert_as_before(base, before):
    after = base.state_dict()
    assert after.keys() == before.keys()
    assert all(torch.equal(after[name], weight) for name, weight in before.items())
