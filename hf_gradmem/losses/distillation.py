"""What the base says of the answers with the context in its prompt, which it is to say from the memory as well.

Context distillation (Snell et al., arXiv 2209.15189) into a memory: the teacher is the plain base, without a LoRA of
either phase, behind the context's tokens and the query's. It may know what an answer could have been as well.
"""

import torch
from torch.nn import functional

from .loss import Passed, TrainingLoss

Tensor = torch.Tensor


def divergence_from_prompt(passed: Passed) -> Tensor | None:
    """Mean over the label tokens of KL(base with the context ‖ reader with the memory), in nats; `None` without one.

    The teacher is a constant. Where a memory was given without its context, there is no teacher.
    """
    if passed.prompted is None:
        return None
    precision = torch.promote_types(passed.scored.dtype, torch.float32)
    of_base, of_reader = (logits.to(precision).log_softmax(-1) for logits in (passed.prompted(), passed.scored))
    return functional.kl_div(of_reader, of_base, log_target=True, reduction="sum") / max(len(of_reader), 1)


DISTILLATION = TrainingLoss(divergence_from_prompt)
