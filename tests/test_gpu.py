"""What a CUDA device computes is what the CPU does: WRITE, the meta-gradient, READ, a run of Trainer."""

import copy

import pytest
import torch

from hf_gradmem.training.run import build_trainer
from tests.support.small_models import EVERY_OPTION, named_base, with_memory
from tests.support.tiny_models import FIRST_ORDINARY_TOKEN, VOCAB_SIZE
from tests.support.tiny_training import tiny_recipe

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA device")]

DEVICE = "cuda"
IN_VALUES = {"memory_form": {"name": "key_values", "write": "values"}, "write_optimizer": "adam", "write_steps": 2}


@pytest.fixture(params=[EVERY_OPTION, IN_VALUES], ids=["every option", "values, Adam"])
def models(request, tmp_path):
    """The same model on the CPU and on the device."""
    model = with_memory(named_base(tmp_path / "base"), **request.param).eval()
    return model, copy.deepcopy(model).to(DEVICE)


@pytest.fixture
def batch():
    ids = torch.randint(FIRST_ORDINARY_TOKEN, VOCAB_SIZE, (2, 30))
    return {"context_input_ids": ids[:, :24], "input_ids": ids[:, 20:], "labels": ids[:, 20:]}


def on_device(batch):
    return {name: values.to(DEVICE) for name, values in batch.items()}


def assert_close(found, expected):
    torch.testing.assert_close(found.cpu(), expected, rtol=1e-3, atol=1e-4)


def test_write_and_read_give_what_they_give_on_the_cpu(models, batch):
    memories, answers = [], []
    for model, given in zip(models, (batch, on_device(batch)), strict=True):
        memories.append(model.write(input_ids=given["context_input_ids"]))
        answers.append(model.generate(given["input_ids"], memory=memories[-1], max_new_tokens=4, do_sample=False))
    assert memories[1].embeddings.device.type == DEVICE
    assert_close(memories[1].embeddings, memories[0].embeddings)
    assert answers[1].cpu().equal(answers[0])


@pytest.mark.parametrize("meta_gradient", ["exact", "first_order"])
def test_the_meta_gradient_is_that_of_the_cpu(models, batch, meta_gradient):
    gradients = []
    for model, given in zip(models, (batch, on_device(batch)), strict=True):
        model.config.meta_gradient = meta_gradient
        model(**given).loss.backward()
        gradients.append({name: p.grad for name, p in model.named_parameters() if p.grad is not None})
    assert gradients[0].keys() == gradients[1].keys()
    for name, gradient in gradients[0].items():
        assert_close(gradients[1][name], gradient)


def test_write_in_bfloat16_is_near_that_in_float32(batch, tmp_path):
    losses = []
    for dtype in ("float32", "bfloat16"):
        model = with_memory(named_base(tmp_path / "base", dtype=dtype).to(DEVICE), num_memory_tokens=3, write_steps=2)
        losses.append(model.write(input_ids=batch["context_input_ids"].to(DEVICE)).write_losses)
    torch.testing.assert_close(losses[1], losses[0], rtol=2e-2, atol=0)


def test_trainer_trains_on_the_device(tmp_path):
    trainer = build_trainer(tiny_recipe(tmp_path, use_cpu=False))
    before = trainer.model.memory_init.detach().clone()
    trainer.train()
    assert trainer.model.memory_init.device.type == DEVICE
    assert not trainer.model.memory_init.cpu().equal(before.cpu())
