"""A forward pass that asks nothing: the loss is that of the memory, L(M_K; C)."""

import pytest
import torch
from torch.nn import functional

from tests.support.gradients import CONTEXT_MASK, EVERYTHING, LORA, assert_gradient_is_the_slope, build, training
from tests.support.messages import says
from tests.support.tiny_models import tiny_tokens

CONTEXT = tiny_tokens(2, 9, seed=1)
BATCH = {"context_input_ids": CONTEXT, "context_attention_mask": CONTEXT_MASK}


@pytest.mark.parametrize("steps", [0, 1, 2])
def test_it_is_what_write_measures(steps):
    model = build()
    with torch.no_grad():
        output = model(**BATCH, write_steps=steps)
    memory = model.write(input_ids=CONTEXT, attention_mask=CONTEXT_MASK, write_steps=steps, measure_final_loss=True)
    torch.testing.assert_close(output.loss, memory.final_write_loss.mean())
    torch.testing.assert_close(output.memory.embeddings, memory.embeddings)
    assert output.logits is None
    assert output.read_loss is None
    assert model(**BATCH, write_steps=steps, return_dict=False)[0].item() == output.loss.item()


def test_its_gradient_goes_through_all_steps():
    model = training(**EVERYTHING)
    of_read = model.read_phase.extra_tensors()
    of_write = {name: value for name, value in model.named_parameters() if "write" in name or "memory" in name}
    assert_gradient_is_the_slope(model, of_write, asked=False)
    assert all(tensor.grad is None for tensor in of_read.values())


def test_first_order_takes_the_memory_as_it_is():
    """Of a LoRA it is the gradient of the loss of a memory that was written before."""
    model = build(write_lora=LORA, read_lora=LORA, meta_gradient="first_order")
    model(**BATCH).loss.backward()
    of_write = {name: value for name, value in model.named_parameters() if "lora_" in name and ".write." in name}
    found = {name: parameter.grad.clone() for name, parameter in of_write.items()}
    memory = model.write(input_ids=CONTEXT, attention_mask=CONTEXT_MASK)
    rows = [row[mask.bool()] for row, mask in zip(CONTEXT, CONTEXT_MASK, strict=True)]
    losses = []
    for vectors, tokens in zip(memory.embeddings, rows, strict=True):
        inputs = torch.cat([vectors, model.base_model.get_input_embeddings()(tokens)])[None]
        with model.write_phase.active():
            logits = model.base_model(inputs_embeds=inputs).logits[0]
        losses.append(functional.cross_entropy(logits[len(vectors) - 1 : -1], tokens))
    gradients = torch.autograd.grad(torch.stack(losses).mean(), list(of_write.values()))
    for name, gradient in zip(of_write, gradients, strict=True):
        torch.testing.assert_close(found[name], gradient, msg=lambda text, n=name: f"{n}: {text}")


def test_half_a_query_is_not_none():
    model = build()
    for given in ({"labels": CONTEXT}, {"context_index": [0, 1]}, {"attention_mask": CONTEXT_MASK}):
        with pytest.raises(ValueError, match=says("nothing to read with", "input_ids")):
            model(**BATCH, **given)
