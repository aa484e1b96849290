"""Recomputed steps: each is the step that was taken."""

import pytest
import torch
from torch._dynamo.utils import counters

from hf_gradmem import GradMemForCausalLM
from hf_gradmem.writing.objectives.reconstruction import ReconstructionObjective
from tests.support.gradients import assert_same, gradients_of, training
from tests.support.tiny_models import tiny_tokens


@pytest.fixture(autouse=True)
def nothing_compiled_before():
    torch.compiler.reset()
    counters.clear()


@pytest.fixture
def with_dropout() -> GradMemForCausalLM:
    model = training(write_steps=2)
    for module in model.train().modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.2
    return model


def test_recomputed_steps_drop_what_the_steps_dropped(with_dropout):
    gradients = []
    for checkpointed in (True, False):
        with_dropout.config.checkpoint_write_steps = checkpointed
        torch.manual_seed(3)
        gradients.append(gradients_of(with_dropout))
    assert_same(*gradients)


def test_recomputed_steps_do_not_rely_on_how_the_first_run_draws(with_dropout, monkeypatch):
    """Kernels differ in what they drop for the same seed: the step must be the one that is differentiated."""
    losses = []
    own = ReconstructionObjective.value_and_gradient
    for draws in (0, 1):

        def drawing(objective, memory, draws=draws):
            torch.rand(draws)
            return own(objective, memory)

        monkeypatch.setattr(ReconstructionObjective, "value_and_gradient", drawing)
        torch.manual_seed(3)
        ids = tiny_tokens(2, 9)
        losses.append(with_dropout(context_input_ids=ids, input_ids=ids).write_losses[:, 0])
    torch.testing.assert_close(losses[1], losses[0], rtol=0, atol=0)
