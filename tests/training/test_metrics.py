"""What is counted while training."""

import pytest
import torch
from transformers import EvalPrediction

from hf_gradmem.training.metrics import TeacherForcedExactMatch


def test_teacher_forced_match_wants_every_token_of_an_answer():
    labels = torch.tensor([[[-100, 5, 6, -100], [-100, -100, 7, 8]], [[-100, 5, 6, 7], [-100] * 4]])
    predictions = torch.tensor([[[5, 6, 0, 0], [0, 7, 9, 0]], [[5, 6, 7, 0], [1, 1, 1, 1]]])
    metric = TeacherForcedExactMatch()
    assert metric(EvalPrediction(predictions, labels)) == {
        "exact_match": pytest.approx(2 / 3),
        "token_accuracy": pytest.approx(6 / 7),
    }
    assert metric(EvalPrediction(predictions[:1], labels[:1]), compute_result=False) == {}
    assert metric(EvalPrediction(predictions[1:], labels[1:]))["exact_match"] == pytest.approx(2 / 3)
    with pytest.raises(ValueError, match="nothing to measure"):
        metric(EvalPrediction(predictions, torch.full_like(labels, -100)))
