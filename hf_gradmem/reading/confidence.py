"""How sure an answer is, from 0 to 1: a logistic regression on what reading it leaves behind.

confidence = σ(b + Σ_j w_j · (x_j − mean_j) / scale_j)

The features x are the answer's mean log-probability, its gain over that under the unwritten memory M0, and the
context's reconstruction loss after the last step of WRITE. The coefficients are fitted on questions that were kept out
of training, and lie in the adapter's configuration.
"""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from numbers import Real
from typing import Any, Self

import torch
from torch.nn import functional

Tensor = torch.Tensor

FEATURES = ("log_prob", "gain", "write_loss")
"""What a confidence is made of, in this order."""
MEASURED = "measured"
"""Where a configuration keeps, beside the coefficients, how far they were found to hold: for people and the card."""
_NUMBERS = ("weights", "means", "scales")
_BIN = ("from", "to", "confidence", "right", "count")
_SMALLEST_SCALE = 1e-6


@dataclass(frozen=True)
class Calibration:
    """The coefficients of a confidence, and what they were fitted on.

    Attributes:
        features: their names, each one of [`FEATURES`].
        weights, means, scales: a number for each feature.
        bias: b.
        calibration_set: the questions that it was fitted on, for people to read.
        num_questions: how many these were.
    """

    features: tuple[str, ...]
    weights: tuple[float, ...]
    bias: float
    means: tuple[float, ...]
    scales: tuple[float, ...]
    calibration_set: str
    num_questions: int

    @classmethod
    def of(cls, value: Mapping[str, Any]) -> Self:
        """From a configuration.

        Raises:
            ValueError: a part is missing, unknown or of another kind.
        """
        check_confidence(value)
        lists = {name: tuple(value[name]) for name in ("features", *_NUMBERS)}
        return cls(**{name: each for name, each in value.items() if name != MEASURED} | lists)

    def to_dict(self) -> dict[str, Any]:
        """For a configuration."""
        return {name: list(value) if isinstance(value, tuple) else value for name, value in asdict(self).items()}

    def __call__(self, values: Tensor) -> Tensor:
        """Confidences `(answers,)` of answers with these features.

        Args:
            values: `(answers, 3)`, in the order of [`FEATURES`]. NaN stands for one that was not measured: it counts as
                the mean of the calibration set, so that it says nothing.
        """
        chosen = values.double()[:, [FEATURES.index(name) for name in self.features]]
        weights, means, scales = (torch.tensor(getattr(self, name), dtype=torch.float64) for name in _NUMBERS)
        return torch.sigmoid(((chosen - means) / scales).nan_to_num() @ weights + self.bias)


def check_confidence(value: Any) -> None:
    """Refuse what is no calibration.

    Raises:
        ValueError: names what is wrong, and what to do.
    """
    names = [field.name for field in fields(Calibration)]

    def refuse(what: str) -> None:
        raise ValueError(f"confidence {what}. Leave it at None, or have hf-gradmem calibrate fit it.")

    if not isinstance(value, Mapping) or set(value) - {MEASURED} != set(names):
        refuse(f"must be a mapping with {', '.join(names)}, got {value!r}")
    features = value["features"]
    if not isinstance(features, list | tuple) or not features or not set(features) <= set(FEATURES):
        refuse(f"features must be some of {', '.join(FEATURES)}, got {features!r}")
    for name in _NUMBERS:
        numbers = value[name]
        whole = isinstance(numbers, list | tuple) and all(isinstance(number, Real) for number in numbers)
        if not whole or len(numbers) != len(features):
            refuse(f"{name} must be a number for each of {', '.join(features)}, got {numbers!r}")
    if not all(scale > 0 for scale in value["scales"]):
        refuse(f"scales must be greater than 0, got {value['scales']!r}")
    if not isinstance(value["bias"], Real):
        refuse(f"bias must be a number, got {value['bias']!r}")
    if MEASURED in value and not _is_measured(value[MEASURED]):
        refuse(f"{MEASURED} must be what hf-gradmem calibrate measured, got {value[MEASURED]!r}")


def _is_measured(value: Any) -> bool:
    """Whether it is numbers by name, some of them missing, and a reliability table."""
    if not isinstance(value, Mapping) or not isinstance(value.get("reliability"), list):
        return False
    numbers = [number for name, number in value.items() if name != "reliability" and number is not None]
    rows = value["reliability"]
    if not all(isinstance(row, Mapping) and set(row) == set(_BIN) for row in rows):
        return False
    return all(isinstance(number, Real) for number in [*numbers, *(each for row in rows for each in row.values())])


def fit_confidence(values: Tensor, right: Tensor, calibration_set: str) -> Calibration:
    """Fit a logistic regression of right on features, with a unit Gaussian prior on the weights.

    Args:
        values: `(answers, 3)`, in the order of [`FEATURES`]; a feature that was never measured is left out.
        right: `(answers,)`, whether each answer is right.
        calibration_set: what they are, for people to read.

    Raises:
        ValueError: no answer was given.
    """
    if not len(values):
        raise ValueError("There is nothing to calibrate on: no answer was given.")
    values, targets = values.double(), right.double()
    measured = [index for index in range(len(FEATURES)) if not bool(values[:, index].isnan().all())]
    values = values[:, measured]
    means = values.nanmean(0)
    scales = (values - means).square().nanmean(0).sqrt().clamp(min=_SMALLEST_SCALE)
    inputs = ((values - means) / scales).nan_to_num()
    weights = torch.zeros(len(measured), dtype=torch.float64, requires_grad=True)
    bias = torch.zeros((), dtype=torch.float64, requires_grad=True)
    optimizer = torch.optim.LBFGS([weights, bias], max_iter=200, line_search_fn="strong_wolfe")

    def loss() -> Tensor:
        optimizer.zero_grad()
        fitted = functional.binary_cross_entropy_with_logits(inputs @ weights + bias, targets, reduction="sum")
        penalised = (fitted + (weights.square().sum() + bias.square()) / 2) / len(targets)
        penalised.backward()
        return penalised

    with torch.enable_grad():
        optimizer.step(loss)
    return Calibration(
        features=tuple(FEATURES[index] for index in measured),
        weights=_numbers(weights),
        bias=float(bias.detach()),
        means=_numbers(means),
        scales=_numbers(scales),
        calibration_set=calibration_set,
        num_questions=len(targets),
    )


def _numbers(values: Tensor) -> tuple[float, ...]:
    numbers: Sequence[float] = values.detach().tolist()
    return tuple(numbers)
