"""Metrics on texts as `evaluate.Metric`s, usable without a network (`evaluate.load` fetches its scripts)."""

import re
import string
from collections import Counter
from typing import Any

import datasets
import evaluate
import numpy as np

_ARTICLES = re.compile(r"\b(a|an|the)\b")
_NOTHING = "There is nothing to measure: no prediction was given."
_PUNCTUATION = str.maketrans("", "", string.punctuation)


class _TextMetric(evaluate.Metric):
    """`predictions` is a list of texts, `references` a list of lists of texts, any of which is right."""

    description = ""

    def _info(self) -> evaluate.MetricInfo:
        return evaluate.MetricInfo(
            description=self.description,
            citation="",
            inputs_description="predictions: list of texts; references: list of lists of texts.",
            features=datasets.Features(
                {"predictions": datasets.Value("string"), "references": datasets.Sequence(datasets.Value("string"))}
            ),
        )

    def compute(
        self, *, predictions: list[str] | None = None, references: list[list[str]] | None = None, **kwargs: Any
    ) -> dict[str, float] | None:
        """The scores of these predictions, or of those that were added before.

        Raises:
            ValueError: there is no prediction, a prediction has no reference answer, or their numbers differ.
        """
        if predictions is None and self.writer is None:
            raise ValueError(_NOTHING)
        return super().compute(predictions=predictions, references=references, **kwargs)

    def _compute(self, predictions: list[str], references: list[list[str]]) -> dict[str, float]:
        if not predictions:
            raise ValueError(_NOTHING)
        for index, answers in enumerate(references):
            if not answers:
                raise ValueError(f"Prediction {index}, {predictions[index]!r}, has no reference answer.")
        scores = [
            [self.score(prediction, answer) for answer in answers]
            for prediction, answers in zip(predictions, references, strict=True)
        ]
        return {
            name: sum(max(score[name] for score in of_one) for of_one in scores) / len(scores) for name in scores[0][0]
        }

    def score(self, prediction: str, answer: str) -> dict[str, float]:
        """Scores of a prediction against one reference answer, each in 0..1."""
        raise NotImplementedError


class ExactMatch(_TextMetric):
    """Share of predictions that equal one of their reference answers, surrounding white space aside.

    Examples:

        >>> ExactMatch().compute(predictions=["hallway"], references=[["hallway", "hall"]])
        {'exact_match': 1.0}
    """

    description = "Share of predictions that equal one of their reference answers."

    def score(self, prediction: str, answer: str) -> dict[str, float]:
        return {"exact_match": float(prediction.strip() == answer.strip())}


class SquadMetric(_TextMetric):
    """Exact match and F1 of SQuAD v1.1 (Rajpurkar et al., 2016), as shares in 0..1.

    Both ignore case, punctuation, articles and spacing; F1 is that of the bags of words, for the best reference answer.
    """

    description = "Exact match and F1 of SQuAD v1.1."

    def score(self, prediction: str, answer: str) -> dict[str, float]:
        predicted, expected = _normalised_words(prediction), _normalised_words(answer)
        common = sum((Counter(predicted) & Counter(expected)).values())
        f1 = 2 * common / (len(predicted) + len(expected)) if predicted or expected else 1.0
        return {"exact_match": float(predicted == expected), "f1": f1}


def _normalised_words(text: str) -> list[str]:
    return _ARTICLES.sub(" ", text.lower().translate(_PUNCTUATION)).split()


def auroc(scores: np.ndarray, positive: np.ndarray) -> float | None:
    """Area under the ROC curve: the share of pairs of a positive and a negative that scores rank rightly, ties half.

    Args:
        scores: `(n,)`.
        positive: `(n,)`, booleans.

    Returns:
        `None` where there are no such pairs.
    """
    num_positive, num_negative = int(positive.sum()), int((~positive).sum())
    if not num_positive or not num_negative:
        return None
    _, places, counts = np.unique(scores, return_inverse=True, return_counts=True)
    ranks = (np.cumsum(counts) - (counts - 1) / 2)[places]
    above = ranks[positive].sum() - num_positive * (num_positive + 1) / 2
    return float(above / (num_positive * num_negative))
