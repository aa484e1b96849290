"""Teacher-forced scoring: how likely tokens are behind a memory, and which of an answer are the most likely ones."""

from typing import NamedTuple

import torch

from ..base.modes import evaluating
from ..base.output_head import cross_entropy, head_cross_entropy
from ..base.token_ids import IGNORED_LABEL
from ..memory.phase import Phase
from .queries import Queries
from .read import read_inputs, read_targets, within_window

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


@torch.no_grad()
def mean_log_probs(phase: Phase, memory: Tensor, queries: Queries) -> Tensor:
    """Mean over the labelled tokens of each row of log p(token | memory, tokens before it).

    Logits are made at no other position, and, where the base's head is all that makes them, of few positions at a time.

    Args:
        phase: READ.
        memory: `(memories, num_memory_tokens, width)`.
        queries: rows with labels, each with the memory that it reads.

    Returns:
        `(rows,)`, in nats, in float32 or better; NaN for a row without a label.
    """
    assert queries.labels is not None
    with evaluating():
        inputs, order = read_inputs(phase, memory, queries, "right")
        targets = read_targets(queries.labels, queries.attention_mask, order)
        scored = targets != IGNORED_LABEL
        head, window = phase.output_head, phase.decoder.window
        if head is None:
            losses = cross_entropy(within_window(phase.logits, inputs, window)[:, :-1][scored], targets[scored])
        else:
            hidden = within_window(phase.hidden_states, inputs, window)[:, :-1][scored].to(head.weight.dtype)
            losses = head_cross_entropy(hidden, head, targets[scored])
    sums = losses.new_zeros(len(scored)).index_add_(0, scored.nonzero()[:, 0], losses)
    return -sums / scored.sum(1)
