"""The terms that are made from the steps of WRITE, against plain autograd written out, and against differences."""

import pytest
import torch
from torch.nn import functional
from torch.nn.attention import SDPBackend, sdpa_kernel

from hf_gradmem import GradMemConfig, get_gradmem_model
from tests.support.gradients import (
    BATCH,
    CONTEXT,
    CONTEXT_MASK,
    EVERYTHING,
    LABELS,
    QUERIES,
    assert_gradient_is_the_slope,
    build,
    loss_of,
)
from tests.support.messages import says
from tests.support.tiny_models import tiny_causal_lm, tiny_tokens

ALIGNED = {"alignment_loss_weight": 0.7}
READ_BETWEEN = {"intermediate_read_loss_weight": 0.4}
BOTH = ALIGNED | READ_BETWEEN
WEIGHTS = pytest.mark.parametrize("weights", [ALIGNED, READ_BETWEEN, BOTH], ids=["alignment", "between", "both"])


def reference(model, steps: int, first_order: bool = False, detach: bool = False) -> dict[str, torch.Tensor]:
    """The three parts of the outer loss by a loop of plain operations, one context and one question at a time."""
    base, embed = model.base_model, model.base_model.get_input_embeddings()

    def losses(memory: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
        logits = base(inputs_embeds=torch.cat([memory, embed(tokens)])[None]).logits[0]
        return functional.cross_entropy(logits[len(memory) - 1 : -1], tokens, reduction="none")

    def answers(memory: torch.Tensor, index: int) -> torch.Tensor:
        of_each = [
            losses(memory, query)[labels != -100].sum()
            for query, labels in zip(QUERIES[index], LABELS[index], strict=True)
        ]
        return torch.stack(of_each).sum() / (LABELS != -100).sum()

    memories, misaligned = [[] for _ in range(steps + 1)], []
    for index, length in enumerate(CONTEXT_MASK.sum(1)):
        memory = model.memory_init
        memories[0].append(memory)
        for step in range(steps):
            memory = memory if memory.requires_grad else memory.requires_grad_()
            loss = losses(memory, CONTEXT[index, :length]).mean()
            (of_write,) = torch.autograd.grad(loss, memory, create_graph=True)
            of_write = of_write.detach() if first_order else of_write
            if step == steps - 1:
                (of_read,) = torch.autograd.grad(answers(memory, index), memory, create_graph=True)
                misaligned.append(1 - functional.cosine_similarity(of_write.flatten(), of_read.flatten(), dim=0))
            memory = memory - 0.3 * of_write
            memory = memory.detach() if detach else memory
            memories[step + 1].append(memory)
    read = [sum(answers(memory, index) for index, memory in enumerate(of_step)) for of_step in memories]
    between = torch.stack(read[1:-1]).mean() if steps > 1 else torch.zeros(())
    return {"read": read[-1], "alignment": torch.stack(misaligned).mean(), "between": between}


def gradients(model, loss: torch.Tensor) -> dict[str, torch.Tensor]:
    model.zero_grad()
    loss.backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def assert_is_reference(weights: dict, steps: int, rtol: float = 1e-8, wanted: dict | None = None, **settings) -> None:
    model = build(write_steps=steps, reconstruction_loss_weight=0, **weights, **settings).requires_grad_(True)
    output = model(**BATCH)
    own = gradients(model, output.loss)
    with sdpa_kernel(SDPBackend.MATH):
        parts = reference(model, steps, **wanted or {})
        loss = (
            parts["read"]
            + weights.get("alignment_loss_weight", 0) * parts["alignment"]
            + weights.get("intermediate_read_loss_weight", 0) * parts["between"]
        )
        expected = gradients(model, loss)
    torch.testing.assert_close(output.loss, loss, rtol=1e-10, atol=0)
    torch.testing.assert_close(output.read_loss, parts["read"], rtol=1e-10, atol=0)
    for name, gradient in expected.items():
        size = gradient.abs().max().item()
        torch.testing.assert_close(own[name], gradient, rtol=rtol, atol=rtol * size + 1e-14, msg=name)


@pytest.mark.parametrize("checkpointed", [True, False], ids=["checkpointed", "unrolled"])
@pytest.mark.parametrize("steps", [1, 2, 3])
@WEIGHTS
def test_loss_and_gradients_are_those_of_plain_autograd(weights, steps, checkpointed):
    assert_is_reference(weights, steps, checkpoint_write_steps=checkpointed)


@pytest.mark.parametrize(("meta_gradient", "detach"), [("first_order", False), ("none", True)])
def test_where_a_step_is_first_order_writes_gradient_is_a_constant(meta_gradient, detach):
    wanted = {"first_order": True, "detach": detach}
    assert_is_reference(BOTH, 2, wanted=wanted, meta_gradient=meta_gradient)


def test_finite_differences_come_to_the_same():
    assert_is_reference(BOTH, 2, rtol=1e-5, meta_gradient="finite_difference")


def test_the_last_step_alone_may_carry_the_second_order_term():
    losses, all_gradients = [], []
    for settings in ({}, {"checkpoint_write_steps": False}, {"meta_gradient_steps": 2}):
        model = build(**BOTH, **{"meta_gradient_steps": 1} | settings).requires_grad_(True)
        losses.append(model(**BATCH).loss)
        all_gradients.append(gradients(model, losses[-1])["memory_init"])
    torch.testing.assert_close(losses[0], losses[1], rtol=1e-12, atol=0)
    torch.testing.assert_close(all_gradients[0], all_gradients[1], rtol=1e-9, atol=1e-13)
    assert not torch.allclose(all_gradients[0], all_gradients[2], rtol=1e-3)


@pytest.mark.parametrize("checkpointed", [True, False], ids=["checkpointed", "unrolled"])
@WEIGHTS
def test_gradient_is_the_slope_of_the_whole_outer_loss(weights, checkpointed):
    model = build(**EVERYTHING, **weights, checkpoint_write_steps=checkpointed).requires_grad_(True)
    names = ("memory_init", "write_start", "read_end", "write_log_learning_rate", "write_head.weight")
    loras = (".h.1.attn.c_proj.lora_A.read.", ".h.1.attn.c_proj.lora_B.write.")
    named = {
        name: parameter
        for name, parameter in model.named_parameters()
        if name in names or any(lora in name for lora in loras)
    }
    assert len(named) == 7
    assert_gradient_is_the_slope(model, named)


@WEIGHTS
def test_keys_and_values_have_the_slope_too(weights):
    model = build(memory_form="key_values", **weights)
    assert_gradient_is_the_slope(model, {"memory_init": model.memory_init})


def test_the_forward_writer_is_read_between_its_readings():
    model = build(writer="forward", write_steps=3, **READ_BETWEEN)
    assert_gradient_is_the_slope(model, {"memory_init": model.memory_init})
    more = loss_of(build(writer="forward", write_steps=3)).item()
    assert loss_of(model).item() > more


def test_a_long_question_is_aligned_on_fused_attention():
    """From 128 positions on the second derivative is worked out by hand."""
    question = tiny_tokens(2, 130, seed=4)
    batch = {"context_input_ids": CONTEXT, "input_ids": question, "labels": question}
    results = []
    for implementation in ("sdpa", "eager"):
        torch.manual_seed(0)
        base = tiny_causal_lm("llama")
        base.config.max_position_embeddings = 256
        model = get_gradmem_model(base, GradMemConfig(num_memory_tokens=3, **ALIGNED))
        model.base_model.set_attn_implementation(implementation)
        results.append(gradients(model, model(**batch).loss)["memory_init"])
    # Llama's norms compute in float32.
    torch.testing.assert_close(*results, rtol=1e-4, atol=1e-6 * results[0].abs().max().item())


@pytest.mark.parametrize("without_gradients", [torch.no_grad, torch.inference_mode])
def test_evaluation_gives_the_same_loss_and_no_graph(without_gradients):
    model = build(**BOTH)
    expected = model(**BATCH).loss
    with without_gradients():
        loss = model(**BATCH).loss
    torch.testing.assert_close(loss, expected.detach(), rtol=1e-12, atol=0)
    assert not loss.requires_grad


def test_a_memory_that_is_given_leaves_the_answers_loss_alone():
    model = build(**BOTH)
    memory = model.write(input_ids=CONTEXT)
    output = model(memory=memory, input_ids=QUERIES, labels=LABELS)
    assert output.loss.item() == output.read_loss.item()


def test_one_step_has_no_memory_between_and_none_no_gradient():
    one = build(write_steps=1, reconstruction_loss_weight=0, **READ_BETWEEN)(**BATCH)
    assert one.loss.item() == one.read_loss.item()
    none = build(write_steps=0, reconstruction_loss_weight=0, **BOTH)(**BATCH)
    assert none.loss.item() == none.read_loss.item()


def test_a_context_without_an_answer_has_no_direction():
    """Its READ gradient is 0: it is left out of the mean, and nothing is divided by its length."""
    labels = LABELS.clone()
    labels[1] = -100
    whole, terms = BATCH | {"labels": labels}, []
    for batch in (whole, {name: tensor[:1] for name, tensor in whole.items()}):
        model = build(reconstruction_loss_weight=0, alignment_loss_weight=1.0)
        output = model(**batch)
        assert gradients(model, output.loss)["memory_init"].isfinite().all()
        terms.append((output.loss - output.read_loss).item())
    assert terms[0] == pytest.approx(terms[1], rel=1e-9)
    nobody = build(reconstruction_loss_weight=0, **BOTH)(**BATCH | {"labels": torch.full_like(LABELS, -100)})
    assert nobody.loss.item() == 0


def test_alignment_falls_when_it_is_trained():
    model = build(reconstruction_loss_weight=0, alignment_loss_weight=1.0).requires_grad_(True)
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    terms = []
    for _ in range(12):
        output = model(**BATCH)
        terms.append((output.loss - output.read_loss).item())
        optimizer.zero_grad()
        (output.loss - output.read_loss).backward()
        optimizer.step()
    assert 0 <= terms[-1] < 0.7 * terms[0] < 2


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (ALIGNED | {"writer": "forward"}, ("alignment_loss_weight=0.7", 'writer="gradient"', 'writer="forward"')),
        (ALIGNED | {"writer": "pooled"}, ("alignment_loss_weight=0.7", 'writer="pooled"')),
        (
            READ_BETWEEN | {"writer": "pooled"},
            ("intermediate_read_loss_weight=0.4", '"gradient" or "forward"', 'writer="pooled"'),
        ),
        (ALIGNED | {"write_segments_in_turn": True}, ("alignment_loss_weight=0.7", "write_segments_in_turn")),
        (READ_BETWEEN | {"write_segments_in_turn": True}, ("intermediate_read_loss_weight", "whole context")),
    ],
)
def test_a_term_that_the_writer_leaves_nothing_for_is_refused(options, message):
    with pytest.raises(ValueError, match=says(*message)):
        GradMemConfig(**options)
