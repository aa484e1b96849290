"""The terms that the outer loss adds to the loss of the answers, each weighted by its `..._loss_weight` option."""

from .alignment import ALIGNMENT
from .distillation import DISTILLATION
from .intermediate_read import INTERMEDIATE_READ
from .loss import Passed, TrainingLoss, needed, outer_loss, weight_name
from .reconstruction import RECONSTRUCTION

LOSSES: dict[str, TrainingLoss] = {
    "reconstruction": RECONSTRUCTION,
    "alignment": ALIGNMENT,
    "intermediate_read": INTERMEDIATE_READ,
    "distillation": DISTILLATION,
}
"""The terms by name: `reconstruction` has the weight `reconstruction_loss_weight`."""

__all__ = ["LOSSES", "Passed", "TrainingLoss", "needed", "outer_loss", "weight_name"]
