"""The last loss of WRITE, L(M_{K−1}; C), in the outer loss (the authors' newest scripts use the weight 0.5)."""

import torch

from .loss import Passed, TrainingLoss

Tensor = torch.Tensor


def last_write_loss(passed: Passed) -> Tensor | None:
    """Mean over the contexts, in nats per token; `None` without a step of WRITE."""
    last_loss = None if passed.trace is None else passed.trace.last_loss
    return None if last_loss is None else last_loss.mean()


RECONSTRUCTION = TrainingLoss(last_write_loss, needs=("last_loss",))
