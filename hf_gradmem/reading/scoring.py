"""Teacher-forced scoring: which tokens of the answers are the most likely ones after the right ones before them."""

from typing import NamedTuple

import torch

from ..base.token_ids import IGNORED_LABEL

Tensor = torch.Tensor


class RightCounts(NamedTuple):
    """How many answers, and how many of their tokens, were scored, and how many of them are right.

    Attributes:
        answers: rows with a token that is scored.
        right_answers: those whose every scored token is right.
        tokens: scored tokens.
        right_tokens: scored tokens that are right.
    """

    answers: int
    right_answers: int
    tokens: int
    right_tokens: int


def count_right(predicted: Tensor, labels: Tensor) -> RightCounts:
    """Compare predicted tokens with labels.

    The label of the first position is not scored: no position of `predicted` predicts it.

    Args:
        predicted: `(..., length)`, the most likely next tokens: position i predicts token i + 1.
        labels: `(..., length)`, not shifted; −100 is not scored.
    """
    predicted, expected = predicted[..., :-1], labels[..., 1:]
    scored = expected != IGNORED_LABEL
    right = (predicted == expected) & scored
    answered = scored.any(dim=-1)
    return RightCounts(
        answers=int(answered.sum()),
        right_answers=int(((right == scored).all(dim=-1) & answered).sum()),
        tokens=int(scored.sum()),
        right_tokens=int(right.sum()),
    )
