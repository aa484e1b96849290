"""The loss of the answers, read from the memories between the steps of WRITE as well.

So each step is told what it is for, and not the last one alone. The GradMem authors' auxiliary loss of that name (their
code, not the paper) weights the later memories more; here all count alike.
"""

import torch

from .loss import Passed, TrainingLoss

Tensor = torch.Tensor


def intermediate_read_loss(passed: Passed) -> Tensor | None:
    """Mean over M_1 … M_{K−1} of the answer loss read from each, in nats per token; `None` with fewer than two steps.

    Each is a mean over the batch's label tokens, as that of the last memory.
    """
    between = [] if passed.trace is None else passed.trace.memories[1:-1]
    return torch.stack([passed.read(memory) for memory in between]).mean() if between else None


INTERMEDIATE_READ = TrainingLoss(intermediate_read_loss, needs=("memories",))
