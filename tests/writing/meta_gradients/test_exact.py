"""Exact mode, and the forward-only writer, against finite differences in float64: every parameter that can train, every
optimiser, every way of segmenting, unrolled and checkpointed."""

import pytest
import torch
import transformers
from torch import distributed
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from tests.support.gradients import (
    LORA,
    SEGMENT_IDS,
    assert_gradient_is_the_slope,
    build,
    loss_of,
    once_differentiable_attention,
)


@pytest.mark.parametrize("checkpointed", [True, False], ids=["checkpointed", "unrolled"])
@pytest.mark.parametrize("learned", ["per_step", "per_token"])
def test_every_trainable_parameter(learned, checkpointed):
    model = build(
        memory_projection=True,
        write_head=True,
        num_control_tokens=2,
        learn_write_learning_rate=learned,
        write_lora=LORA,
        read_lora=LORA,
        checkpoint_write_steps=checkpointed,
    )
    model.requires_grad_(True)
    named = dict(model.named_parameters())
    assert {"memory_init", "write_start", "read_end", "write_log_learning_rate", "write_head.weight"} <= named.keys()
    assert any("lora_B.write" in name for name in named)
    assert any("lora_A.read" in name for name in named)
    assert_gradient_is_the_slope(model, named)


@pytest.mark.parametrize("checkpointed", [True, False], ids=["checkpointed", "unrolled"])
@pytest.mark.parametrize("phase", ["write_lora", "read_lora"])
def test_lora_of_one_phase_alone(phase, checkpointed):
    model = build(**{phase: LORA}, checkpoint_write_steps=checkpointed)
    lora = {name: p for name, p in model.named_parameters() if "lora_" in name}
    assert lora
    assert_gradient_is_the_slope(model, lora | {"memory_init": model.memory_init})


@pytest.mark.parametrize("checkpointed", [True, False], ids=["checkpointed", "unrolled"])
@pytest.mark.parametrize("clipping", [{}, {"write_max_grad_norm": 0.05}, {"write_grad_clip_value": 0.01}])
@pytest.mark.parametrize("optimizer", ["sgd", "momentum", "adam"])
def test_every_optimizer_and_clipping(optimizer, clipping, checkpointed):
    rate = 0.02 if optimizer == "adam" else 0.3
    model = build(
        write_optimizer=optimizer,
        write_learning_rate=rate,
        write_steps=3,
        learn_write_learning_rate="per_step",
        checkpoint_write_steps=checkpointed,
        **clipping,
    )
    named = {"memory_init": model.memory_init, "write_log_learning_rate": model.write_log_learning_rate}
    assert_gradient_is_the_slope(model, named)


@pytest.mark.parametrize("prefix_segments", [0, 1, 2])
@pytest.mark.parametrize("segments", ["whole", "given", "cut"])
def test_every_way_of_segmenting(segments, prefix_segments):
    model = build(
        write_prefix_segments=prefix_segments, write_segment_length=4 if segments == "cut" else None, write_head=True
    )
    named = {"memory_init": model.memory_init, "write_head.weight": model.write_head.weight}
    assert_gradient_is_the_slope(model, named, segment_ids=SEGMENT_IDS if segments == "given" else None)


def gradients(**settings) -> dict[str, torch.Tensor]:
    model = build(memory_projection=True, **settings)
    loss_of(model).backward()
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def test_no_second_order_steps_is_first_order():
    truncated = gradients(write_steps=3, meta_gradient_steps=0)
    first_order = gradients(write_steps=3, meta_gradient="first_order")
    exact = gradients(write_steps=3)
    for name, gradient in first_order.items():
        torch.testing.assert_close(truncated[name], gradient, rtol=1e-12, atol=0)
    assert not torch.allclose(exact["memory_init"], first_order["memory_init"], rtol=1e-3)


def test_truncation_moves_from_first_order_to_exact():
    exact = gradients(write_steps=3)["memory_init"]
    distances = [
        (gradients(write_steps=3, meta_gradient_steps=steps)["memory_init"] - exact).norm().item() for steps in range(4)
    ]
    assert distances[3] == 0
    assert all(distance > 0 for distance in distances[:3])


def test_mode_none_detaches_the_memory_but_keeps_the_loss_gradient():
    """What is left is READ's own gradient and that of L(M_{K−1}) at a fixed memory."""
    model = build(memory_projection=True, meta_gradient="none")
    loss_of(model).backward()
    assert model.memory_init.grad is None or not model.memory_init.grad.any()
    assert model.memory_projection.weight.grad.any()


@pytest.mark.parametrize("mode", ["exact", "first_order", "none"])
def test_the_last_reconstruction_loss_keeps_its_own_gradient(mode):
    with_loss = gradients(meta_gradient=mode, write_head=True, reconstruction_loss_weight=1.0)
    assert with_loss["write_head.weight"].any()
    if mode != "exact":
        without = gradients(meta_gradient=mode, write_head=True, reconstruction_loss_weight=0.0)
        assert "write_head.weight" not in without


@pytest.mark.parametrize("checkpointed", [True, False], ids=["checkpointed", "unrolled"])
@pytest.mark.parametrize("mode", ["exact", "first_order"])
def test_activation_checkpointing_of_the_base_changes_no_gradient(mode, checkpointed):
    results = []
    for recomputed in (False, True):
        model = build(checkpoint_write_steps=checkpointed, meta_gradient=mode)
        model.base_model.requires_grad_(True)
        model.train()
        if recomputed:
            model.activation_checkpointing_enable()
        loss_of(model).backward()
        results.append({name: p.grad for name, p in model.named_parameters() if p.grad is not None})
    assert results[0].keys() == results[1].keys()
    for name, gradient in results[0].items():
        torch.testing.assert_close(results[1][name], gradient, rtol=1e-8, atol=1e-12, msg=name)


@pytest.mark.parametrize("option", [{"write_lora": LORA}, {"read_lora": LORA}, {"memory_form": "key_values"}], ids=str)
def test_what_is_on_in_a_run_refuses_activation_checkpointing_of_the_base(option):
    model = build(**option)
    model.activation_checkpointing_enable()
    model.train()
    loss_of(model)  # a frozen base stays in eval mode, in which no layer is recomputed
    model.base_model.requires_grad_(True)
    model.train()
    memory = model.write(input_ids=torch.ones(2, 4, dtype=torch.long))
    if "write_lora" not in option:
        with pytest.raises(ValueError, match="activation"):
            model(memory=memory, input_ids=torch.ones(2, 3, dtype=torch.long))
    with pytest.raises(ValueError, match="activation"):
        loss_of(model)


def test_fused_attention_is_replaced_where_a_second_derivative_is_needed():
    transformers.AttentionInterface.register("once", once_differentiable_attention)
    transformers.AttentionMaskInterface.register("once", transformers.masking_utils.eager_mask)
    expected = gradients()
    model = build(memory_projection=True)
    model.set_attn_implementation("once")
    loss_of(model).backward()
    assert model.base_model.config._attn_implementation == "once"
    torch.testing.assert_close(model.memory_init.grad, expected["memory_init"], rtol=1e-8, atol=1e-12)


@pytest.mark.parametrize("checkpointed", [True, False], ids=["checkpointed", "unrolled"])
def test_forward_only_writer(checkpointed):
    model = build(
        writer="forward",
        memory_projection=True,
        num_control_tokens=2,
        write_lora=LORA,
        read_lora=LORA,
        checkpoint_write_steps=checkpointed,
    )
    model.requires_grad_(True)
    assert_gradient_is_the_slope(model, dict(model.named_parameters()))


@pytest.mark.parametrize("checkpointed", [True, False], ids=["checkpointed", "unrolled"])
@pytest.mark.parametrize("prefix_segments", [0, 1])
def test_segments_in_turn(prefix_segments, checkpointed):
    model = build(
        write_segments_in_turn=True,
        write_prefix_segments=prefix_segments,
        learn_write_learning_rate="per_token",
        reconstruction_loss_weight=1.0,
        checkpoint_write_steps=checkpointed,
    )
    model.base_model.requires_grad_(True)
    trained = {
        name: parameter
        for name, parameter in model.named_parameters()
        if name in ("memory_init", "write_log_learning_rate", "base_model.transformer.wte.weight")
    }
    assert len(trained) == 3
    assert_gradient_is_the_slope(model, trained, segment_ids=SEGMENT_IDS)


@pytest.fixture
def group_of_one():
    distributed.init_process_group("gloo", rank=0, world_size=1, store=distributed.HashStore())
    yield
    distributed.destroy_process_group()


@pytest.mark.parametrize("lora", [{}, {"write_lora": LORA}], ids=["everything", "lora"])
def test_sharded_parameters_get_their_gradients(lora, group_of_one):
    """FSDP runs a block on other tensors than the parameters that it is given gradients for."""
    gradients = []
    for shard in (False, True):
        model = build(**lora, reconstruction_loss_weight=0).float()
        if not lora:
            model.requires_grad_(True)
        model.decoder.probe()
        if shard:
            for block in model.base_model.transformer.h:
                fully_shard(block, mesh=init_device_mesh("cpu", (1,)))
        loss_of(model).backward()
        found = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
        gradients.append({name: g.full_tensor() if hasattr(g, "full_tensor") else g for name, g in found.items()})
    assert gradients[1].keys() == gradients[0].keys()
    for name, expected in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], expected, rtol=1e-3, atol=1e-5, msg=name)
    model.config.meta_gradient = "finite_difference"
    with pytest.raises(ValueError, match="sharded"):
        loss_of(model)


@pytest.mark.parametrize("meta_gradient", ["exact", "finite_difference", "first_order"])
def test_a_compiled_base_trains_as_it_does_uncompiled(meta_gradient):
    """In exact mode it is compiled in READ alone: a compiled graph has no second derivative."""
    model = build(meta_gradient=meta_gradient, reconstruction_loss_weight=0)
    model.base_model.requires_grad_(True)
    gradients = []
    for _ in range(2):
        model.zero_grad()
        loss_of(model).backward()
        gradients.append({name: parameter.grad for name, parameter in model.named_parameters()})
        torch._dynamo.reset()
        model.get_decoder().compile(backend="aot_eager")
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], gradient, rtol=1e-6, atol=1e-9, msg=name)
