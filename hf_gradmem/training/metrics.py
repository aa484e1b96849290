"""Teacher-forced exact match, cheap enough to follow a training run with."""

from typing import Any

import torch
from transformers import EvalPrediction, Trainer
from transformers.trainer_utils import EvalLoopOutput

from ..reading.scoring import count_right

Tensor = torch.Tensor


def most_likely_tokens(logits: Tensor, labels: Tensor | None = None) -> Tensor:
    """For `Trainer(preprocess_logits_for_metrics=...)`: `(batch, queries, query_length)` tokens in place of logits."""
    return logits.argmax(dim=-1)


class TeacherForcedExactMatch:
    """The share of answers whose every token is the most likely one, for `Trainer(compute_metrics=...)`.

    Takes an evaluation set batch by batch under `batch_eval_metrics=True`, or whole, where the collator gives all of
    its batches one width (`padding="queries"`): Trainer joins no others. Each token of an answer is predicted
    from the right ones before it, so no generation is needed; an answer counts if, and only if, greedy decoding would
    give it too. A label at the first token of a query is not scored: it is predicted from the memory, for which
    `logits` have no position.

    Counts of batches are kept up to the last one of a set: [`count_anew`] forgets those of an evaluation that had none.
    """

    def __init__(self) -> None:
        self.reset()

    def reset(self) -> None:
        """Forget what was counted."""
        self.answers = self.right_answers = self.tokens = self.right_tokens = 0

    def __call__(self, prediction: EvalPrediction, compute_result: bool = True) -> dict[str, float]:
        predictions, labels = (torch.as_tensor(values) for values in (prediction.predictions, prediction.label_ids))
        counts = count_right(predictions, labels)
        self.answers += counts.answers
        self.right_answers += counts.right_answers
        self.tokens += counts.tokens
        self.right_tokens += counts.right_tokens
        if not compute_result:
            return {}
        if not self.answers:
            raise ValueError("There is nothing to measure: no answer of the evaluation set has a label to predict.")
        result = {
            "exact_match": self.right_answers / self.answers,
            "token_accuracy": self.right_tokens / self.tokens,
        }
        self.reset()
        return result


def count_anew(trainer: Trainer, metric: TeacherForcedExactMatch) -> None:
    """Have a trainer begin each evaluation with nothing counted, also after one that was interrupted.

    `Trainer` has no event for the beginning of one.
    """
    loop = trainer.evaluation_loop

    def evaluation_loop(*arguments: Any, **options: Any) -> EvalLoopOutput:
        metric.reset()
        return loop(*arguments, **options)

    trainer.evaluation_loop = evaluation_loop  # type: ignore[method-assign]
