"""Memory that runs out: the message says what to lower."""

import pytest
import torch

from hf_gradmem.memory.phase import Phase
from tests.support.tiny_models import tiny_tokens
from tests.support.writing import build


@pytest.mark.parametrize(
    "error", [torch.OutOfMemoryError("CUDA out of memory."), RuntimeError("DefaultCPUAllocator: not enough memory")]
)
def test_out_of_memory_says_what_to_lower(error, monkeypatch):
    model = build()
    assert model.decoder.output_head is not None

    def fail(*arguments):
        raise error

    monkeypatch.setattr(model.decoder, "hidden_states", fail)
    with pytest.raises(torch.OutOfMemoryError, match=r"batch_size \(now 2 contexts\).*memory"):
        model.write(input_ids=tiny_tokens(5, 9), batch_size=2)


@pytest.mark.parametrize("in_backward", [False, True])
@pytest.mark.parametrize("meta_gradient", ["exact", "finite_difference"])
def test_out_of_memory_in_training_says_what_to_lower(meta_gradient, in_backward, monkeypatch):
    model = build(meta_gradient=meta_gradient)
    ids, runs = tiny_tokens(2, 9), 0
    plain = Phase.prefix

    def fail_at_last(*arguments):
        nonlocal runs
        runs += arguments[0].name == "write"  # once for each run of the objective
        if not in_backward or runs > model.config.write_steps:
            raise torch.OutOfMemoryError("CUDA out of memory.")
        return plain(*arguments)

    monkeypatch.setattr(Phase, "prefix", fail_at_last)
    with pytest.raises(torch.OutOfMemoryError, match=r"per_device_train_batch_size.*finite_difference"):
        model(context_input_ids=ids, input_ids=ids, labels=ids).loss.backward()


def test_out_of_memory_in_evaluation_says_nothing_of_training(monkeypatch):
    model = build()

    def fail(*arguments):
        raise torch.OutOfMemoryError("CUDA out of memory.")

    monkeypatch.setattr(Phase, "prefix", fail)
    ids = tiny_tokens(2, 9)
    with torch.no_grad(), pytest.raises(torch.OutOfMemoryError, match="per_device_eval_batch_size"):
        model(context_input_ids=ids, input_ids=ids)
