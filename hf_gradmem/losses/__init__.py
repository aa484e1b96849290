"""The terms that the outer loss adds to the loss of the answers, each weighted by its `..._loss_weight` option."""

from .loss import Passed, TrainingLoss, needs_last_loss, outer_loss
from .reconstruction import RECONSTRUCTION

LOSSES: dict[str, TrainingLoss] = {"reconstruction": RECONSTRUCTION}
"""The terms by name: `reconstruction` has the weight `reconstruction_loss_weight`."""

__all__ = ["LOSSES", "Passed", "TrainingLoss", "needs_last_loss", "outer_loss"]
