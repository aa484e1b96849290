"""The meta-gradient by finite differences against the exact one, in float64 on random bases and in float32 on a trained
one; and what it is for: first-order kernels, and one gradient for each parameter in a backward pass."""

import json
import warnings
from pathlib import Path

import pytest
import torch
import transformers

import hf_gradmem
from hf_gradmem import DataCollatorForGradMem, GradMemForCausalLM
from hf_gradmem.tasks import load_task
from hf_gradmem.tasks.kv_retrieval import build_tokenizer
from hf_gradmem.training.run import run_training
from tests.support.gradients import (
    EVERYTHING,
    SEGMENT_IDS,
    build,
    gradients_of,
    loss_of,
    once_differentiable_attention,
)
from tests.support.tiny_training import TINY, assert_same_weights, on_two_processes, tiny_recipe, weights


def gradients(mode: str = "finite_difference", segment_ids=None, **settings) -> dict[str, torch.Tensor]:
    model = build(meta_gradient=mode, **settings)
    model.requires_grad_(True)
    return gradients_of(model, segment_ids=segment_ids)


def relative_error(values: dict, reference: dict) -> float:
    assert values.keys() == reference.keys()
    difference = sum((values[name] - reference[name]).square().sum() for name in reference)
    return (difference / sum(gradient.square().sum() for gradient in reference.values())).sqrt().item()


def assert_equal_but_for_curvature(values: dict, reference: dict) -> None:
    """At the radius of float64 the remainder is below one part in a million, for each parameter on its own."""
    assert values.keys() == reference.keys()
    for name, expected in reference.items():
        assert expected.any(), name
        assert (values[name] - expected).norm() <= 1e-6 * expected.norm(), name


@pytest.mark.parametrize("learned", ["per_step", "per_token"])
def test_every_trainable_parameter(learned):
    settings = EVERYTHING | {"learn_write_learning_rate": learned, "write_steps": 3}
    assert_equal_but_for_curvature(gradients(**settings), gradients("exact", **settings))


@pytest.mark.parametrize("clipping", [{}, {"write_max_grad_norm": 0.05}, {"write_grad_clip_value": 0.01}])
@pytest.mark.parametrize("optimizer", ["sgd", "momentum", "adam"])
def test_every_optimizer_and_clipping(optimizer, clipping):
    settings = clipping | {
        "write_optimizer": optimizer,
        "write_learning_rate": 0.02 if optimizer == "adam" else 0.3,
        "write_steps": 3,
        "learn_write_learning_rate": "per_step",
    }
    assert_equal_but_for_curvature(gradients(**settings), gradients("exact", **settings))


@pytest.mark.parametrize("prefix_segments", [0, 1, 2])
@pytest.mark.parametrize("segments", ["whole", "given", "cut"])
def test_every_way_of_segmenting(segments, prefix_segments):
    settings = {
        "write_prefix_segments": prefix_segments,
        "write_segment_length": 4 if segments == "cut" else None,
        "segment_ids": SEGMENT_IDS if segments == "given" else None,
    }
    assert_equal_but_for_curvature(gradients(**settings), gradients("exact", **settings))


@pytest.mark.parametrize("second_order_steps", [0, 1, 2])
def test_truncation_is_that_of_exact(second_order_steps):
    settings = {"write_steps": 3, "meta_gradient_steps": second_order_steps, "write_head": True}
    assert_equal_but_for_curvature(gradients(**settings), gradients("exact", **settings))


def test_without_the_reconstruction_loss():
    settings = {"reconstruction_loss_weight": 0, "memory_projection": True}
    assert_equal_but_for_curvature(gradients(**settings), gradients("exact", **settings))


def test_only_what_trains_gets_a_gradient():
    model = build(meta_gradient="finite_difference", memory_projection=True)
    model.memory_init.requires_grad_(False)
    assert gradients_of(model).keys() == {"memory_projection.weight", "memory_projection.bias"}
    model.requires_grad_(False)
    assert not loss_of(model).requires_grad


def test_sample_that_the_outer_loss_does_not_see_is_no_division_by_zero():
    model = build(meta_gradient="finite_difference", reconstruction_loss_weight=0)
    query = torch.tensor([[20, 30, 40], [50, 60, 70]])
    labels = query.clone()
    labels[1] = -100
    context = torch.tensor([[21, 31, 41, 51], [22, 32, 42, 52]])
    model(context_input_ids=context, input_ids=query, labels=labels).loss.backward()
    both = model.memory_init.grad.clone()
    model.zero_grad()
    model(context_input_ids=context[:1], input_ids=query[:1], labels=query[:1]).loss.backward()
    torch.testing.assert_close(both, model.memory_init.grad, rtol=1e-6, atol=0)


def test_a_memory_of_zeros_can_be_moved():
    results = []
    for mode in ("exact", "finite_difference"):
        model = build(meta_gradient=mode)
        with torch.no_grad():
            model.memory_init.zero_()
        results.append(gradients_of(model))
    assert relative_error(results[1], results[0]) < 1e-4


@pytest.mark.parametrize(("radius", "warned"), [(1e-4, False), (1.0, True), (2e-16, True)])
def test_radius_of_no_use_is_warned_of(radius, warned):
    model = build(meta_gradient="finite_difference", meta_gradient_radius=radius)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        gradients_of(model)
    assert any(f"meta_gradient_radius={radius:g}" in str(each.message) for each in caught) == warned


def test_dropout_is_the_same_on_either_side():
    results = []
    for mode in ("exact", "finite_difference"):
        model = build(meta_gradient=mode, write_steps=3)
        model.base_model.requires_grad_(True)
        for module in model.train().modules():
            if isinstance(module, torch.nn.Dropout):
                module.p = 0.2
        torch.manual_seed(3)
        results.append(gradients_of(model))
        after = torch.rand(1)
    torch.manual_seed(3)
    loss_of(model)
    assert torch.equal(after, torch.rand(1)), "the backward pass used up random numbers"
    assert_equal_but_for_curvature(results[1], results[0])


def test_fused_attention_and_activation_checkpointing_are_kept():
    calls = []

    def counted(*arguments, **options):
        calls.append(arguments)
        return once_differentiable_attention(*arguments, **options)

    transformers.AttentionInterface.register("counted", counted)
    transformers.AttentionMaskInterface.register("counted", transformers.masking_utils.eager_mask)
    model = build(meta_gradient="finite_difference")
    model.requires_grad_(True)
    model.train()
    expected = gradients("exact")
    gradients_of(model)  # probes the base, once
    model.set_attn_implementation("counted")
    assert_equal_but_for_curvature(gradients_of(model), expected)
    layers, steps, evaluations = len(model.base_model.transformer.h), 2, 3
    assert len(calls) == layers * (steps * evaluations + 1)  # and READ
    plain = len(calls)
    model.activation_checkpointing_enable()
    assert_equal_but_for_curvature(gradients_of(model), expected)
    assert len(calls) == 3 * plain  # each layer again in its backward pass


@pytest.mark.filterwarnings("ignore:meta_gradient")  # rounding: it is the precision that is tested
def test_autocast_of_the_step_is_that_of_its_backward_pass():
    model = build(meta_gradient="exact", memory_projection=True).float()
    model.base_model.requires_grad_(True)
    exact, dtypes = gradients_of(model), []
    model.config.meta_gradient = "finite_difference"
    model.base_model.transformer.h[0].attn.register_forward_hook(lambda *call: dtypes.append(call[2][0].dtype))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = loss_of(model)
    model.zero_grad()
    loss.backward()
    assert dtypes == [torch.bfloat16] * 7
    assert relative_error({name: p.grad for name, p in model.named_parameters()}, exact) < 0.25


def test_each_parameter_gets_its_gradient_once():
    model = build(meta_gradient="finite_difference", write_steps=3, **EVERYTHING)
    model.requires_grad_(True)
    counts = {name: 0 for name, _ in model.named_parameters()}
    for name, parameter in model.named_parameters():
        parameter.register_post_accumulate_grad_hook(lambda _, name=name: counts.__setitem__(name, counts[name] + 1))
    loss_of(model).backward()
    assert set(counts.values()) == {1}


def test_a_trained_model_in_float32():
    """The gate: curvature is far larger once a memory has learnt to be read."""
    adapter = Path(hf_gradmem.__file__).parent / "pretrained" / "gradmem-kv-tiny"
    model = GradMemForCausalLM.from_pretrained(adapter)
    model.requires_grad_(True)
    model.train()
    rows = load_task("kv_retrieval", num_contexts=16, num_pairs=8, key_length=1, value_length=1, end_mark=False, seed=5)
    batch = DataCollatorForGradMem(build_tokenizer(), queries_per_context=8)(list(rows))
    results = []
    for mode in ("exact", "finite_difference"):
        model.config.meta_gradient = mode
        model.zero_grad()
        model(**batch).loss.backward()
        results.append({name: p.grad.double() for name, p in model.named_parameters()})
    assert relative_error(results[1], results[0]) <= 1e-3
    flat = [torch.cat([gradient.flatten() for gradient in result.values()]) for result in results]
    assert torch.cosine_similarity(*flat, dim=0) >= 0.9999


def test_two_processes_have_the_gradients_of_one(tmp_path):
    plain = {"optim": "sgd", "learning_rate": 0.1, "stages": [{"steps": 2}, {"steps": 1, "write_steps": 1}]}
    plain["task_arguments"] = TINY["task_arguments"] | {"num_pairs": [1, 4], "queries_per_context": 1}
    plain["gradmem"] = TINY["gradmem"] | {"meta_gradient": "finite_difference", "memory_projection": True}
    run_training(tiny_recipe(tmp_path / "one", per_device_train_batch_size=4, **plain))
    values = TINY | plain | {"output_dir": str(tmp_path / "two"), "per_device_train_batch_size": 2}
    on_two_processes("train", json.dumps(values))
    assert_same_weights(weights(tmp_path / "one"), weights(tmp_path / "two"), tolerance=1e-5)
