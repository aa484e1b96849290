"""A confidence: the fit, what it is kept as, and what is refused."""

import pytest
import torch

from hf_gradmem import GradMemConfig
from hf_gradmem.reading.confidence import Calibration, fit_confidence

NAN = float("nan")


def drawn(count: int = 4000) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Features, whether each answer is right, and the probability that it was drawn with."""
    generator = torch.Generator().manual_seed(0)
    values = torch.randn((count, 3), generator=generator, dtype=torch.float64) * torch.tensor([1.0, 3.0, 0.5]) - 1
    probability = torch.sigmoid(2 * values[:, 0] + 0.5 * values[:, 1] + 2.0)
    return values, torch.rand(count, generator=generator) < probability, probability


def test_the_fit_recovers_the_probabilities_that_were_drawn_with():
    values, right, probability = drawn()
    fitted = fit_confidence(values, right, "drawn")
    assert float((fitted(values) - probability).abs().mean()) < 0.02
    assert abs(fitted.weights[2]) < 0.15  # a feature that says nothing
    # The derivative of the penalised likelihood by the bias is 0 at its largest.
    assert float((fitted(values) - right.double()).sum()) == pytest.approx(-fitted.bias, abs=1e-3)


def test_a_feature_that_was_not_measured_says_nothing():
    values, right, _ = drawn(500)
    unmeasured = values.clone()
    unmeasured[:, 2] = NAN
    without = fit_confidence(unmeasured, right, "drawn")
    assert without.features == ("log_prob", "gain")
    fitted = fit_confidence(values, right, "drawn")
    average = torch.tensor([[values[0, 0], values[0, 1], fitted.means[2]]])
    torch.testing.assert_close(fitted(torch.tensor([[values[0, 0], values[0, 1], NAN]])), fitted(average))


def test_answers_that_are_told_apart_without_an_exception_have_finite_coefficients():
    values = torch.tensor([[-1.0, 0.0, NAN], [-2.0, 0.0, NAN], [-8.0, 0.0, NAN], [-9.0, 0.0, NAN]])
    fitted = fit_confidence(values, torch.tensor([True, True, False, False]), "four")
    sure = fitted(values)
    assert sure[0] > sure[1] > 0.5 > sure[2] > sure[3] > 0


def test_a_configuration_keeps_it(tmp_path):
    values, right, _ = drawn(200)
    fitted = fit_confidence(values, right, "drawn")
    GradMemConfig(confidence=fitted.to_dict()).save_pretrained(tmp_path)
    kept = GradMemConfig.from_pretrained(tmp_path).confidence
    assert Calibration.of(kept) == fitted
    assert (kept["calibration_set"], kept["num_questions"]) == ("drawn", 200)


WHOLE = {
    "features": ["log_prob"],
    "weights": [1.0],
    "bias": 0.0,
    "means": [0.0],
    "scales": [1.0],
    "calibration_set": "none",
    "num_questions": 1,
}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"features": ["loss"]}, "features must be some of log_prob, gain, write_loss"),
        ({"weights": [1.0, 2.0]}, "weights must be a number for each of log_prob"),
        ({"scales": [0]}, "scales must be greater than 0"),
        ({"bias": "high"}, "bias must be a number"),
        ({"slope": 1}, "must be a mapping with features"),
        ({"measured": {"auroc": 0.5}}, "measured must be what hf-gradmem calibrate measured"),
        ({"measured": {"auroc": "high", "reliability": []}}, "measured must be what hf-gradmem calibrate measured"),
        ({"measured": {"reliability": [{"from": 0.0}]}}, "measured must be what hf-gradmem calibrate measured"),
    ],
    ids=str,
)
def test_what_is_no_calibration_is_refused(change, message):
    GradMemConfig(confidence=WHOLE)
    with pytest.raises(ValueError, match=f"{message}.*hf-gradmem calibrate"):
        GradMemConfig(confidence=WHOLE | change)
