"""Whether a confidence can be acted on: how it ranks right answers above wrong ones, and how often it is kept.

Each question is asked twice: of the memory of its own context, and of another context's, which does not hold the
answer. There, an answer is right only if it says that nothing is told, where the task knows such an answer.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from tqdm.auto import tqdm

from ..memory.written import GradMemMemory
from ..modeling_gradmem import GradMemForCausalLM
from ..reading.answering import generate_answers
from ..reading.confidence import Calibration, fit_confidence
from ..tasks.facts import NOT_TOLD
from ..tasks.rows import context_numbers
from ..template import get_template
from .measure import METRICS, longest_answer, references_of
from .metrics import auroc
from .others import OtherMemories, other_rows
from .results import Record

Tensor = torch.Tensor
_BINS = 10
_FOLDS = 5


@dataclass(frozen=True)
class Asked:
    """Answers to the questions of a set, each of its own context's memory and of another's.

    Attributes:
        features: `(answers, 3)`, of [`~hf_gradmem.reading.confidence`].
        right: `(answers,)`.
        own: `(answers,)`, whether the memory is that of the question's context.
        context: `(answers,)`, the number of the question's context.
    """

    features: Tensor
    right: Tensor
    own: Tensor
    context: Tensor

    @classmethod
    def cat(cls, parts: Sequence["Asked"]) -> "Asked":
        """Several sets as one, whose contexts were numbered together."""
        return cls(*(torch.cat([getattr(part, name) for part in parts]) for name in cls.__annotations__))


def ask_rows(
    model: GradMemForCausalLM,
    rows: Sequence[dict[str, Any]],
    metric: str,
    numbers: dict[str, int] | None = None,
    *,
    batch_size: int = 64,
    show_progress: bool = False,
) -> Asked:
    """Ask the questions of each row of its own memory and of that of another context: of the nearest row before it.

    Args:
        model: adapter and base, with a tokenizer.
        rows: of a task, with two contexts at least.
        metric: which answers are right: its exact match with the target, or one of `answers`.
        numbers: of contexts of other sets, by their text, to which those of these rows are added.
        batch_size: contexts at a time.
        show_progress: show a progress bar over the contexts.

    Raises:
        ValueError: a row has no other context beside it, or there is no such metric.
    """
    if metric not in METRICS:
        raise ValueError(f"There is no metric {metric!r}. The metrics are {', '.join(METRICS)}.")
    of_rows = torch.tensor(context_numbers(rows, numbers))
    others = OtherMemories(rows, other_rows(rows, len(rows)))
    words = get_template(model.config.template, model.tokenizer)
    longest = longest_answer(rows, words, model.tokenizer)
    score = METRICS[metric](keep_in_memory=True).score

    def is_right(text: str, references: Sequence[str]) -> bool:
        return any(score(text, reference)["exact_match"] for reference in references)

    def write(*written: Mapping[str, Any]) -> GradMemMemory:
        return model.write([row["context"] for row in written], measure_final_loss=True)

    parts: list[Asked] = []
    with tqdm(total=len(rows), desc="Asking", unit="context", disable=not show_progress) as bar:
        for start in range(0, len(rows), batch_size):
            part = list(rows[start : start + batch_size])
            memory = write(*part)
            index = [number for number, row in enumerate(part) for _ in row["queries"]]
            queries = [query for row in part for query in row["queries"]]
            references = references_of(part, words, model.tokenizer)
            for own, read in ((True, memory), (False, others.of_next(memory, write))):
                answers = generate_answers(model, queries, read, index, longest, batch_size=batch_size)
                told = references if own else [[NOT_TOLD]] * len(queries)
                right = [is_right(text, each) for text, each in zip(answers.texts, told, strict=True)]
                context = of_rows[start:][index]
                parts.append(Asked(answers.features, torch.tensor(right), torch.full((len(index),), own), context))
            bar.update(len(part))
    return Asked.cat(parts)


def calibrate_on(asked: Asked, name: str) -> tuple[Calibration, Tensor]:
    """Fit a confidence, and the confidences of the same answers by fits that did not see their contexts.

    Args:
        asked: the answers.
        name: of the calibration set, for people to read.

    Returns:
        The calibration, fitted on all answers; and `(answers,)` confidences, each by the fit on four fifths of the
        contexts that its own is not among.

    Raises:
        ValueError: all answers are right, or all are wrong.
    """
    share = float(asked.right.double().mean())
    if share in (0.0, 1.0):
        raise ValueError(
            f"All of the {len(asked.right)} answers are {'right' if share else 'wrong'}: a confidence has nothing to "
            "tell apart. Give more questions, or other ones."
        )
    folds = asked.context % _FOLDS
    held_out = torch.empty(len(folds), dtype=torch.float64)
    for fold in folds.unique().tolist():
        inside = folds == fold
        fitted = fit_confidence(asked.features[~inside], asked.right[~inside], name)
        held_out[inside] = fitted(asked.features[inside])
    return fit_confidence(asked.features, asked.right, name), held_out


def measure_confidence(asked: Asked, confidence: Tensor) -> Record:
    """How far a confidence can be acted on.

    Args:
        asked: the answers.
        confidence: `(answers,)`, of each.

    Returns:
        `auroc`: the share of pairs of a right and a wrong answer that it ranks rightly, over all answers; `auroc_own`:
        the same of those from their own context's memory alone; `auroc_own_or_other`: of pairs of a memory that holds
        the context and one that does not; each `None` where there is no such pair. `brier`: the mean of
        (confidence − right)². `share_right_own`, `share_right_other`, `num_answers`. `reliability`: for each tenth of
        0..1 with an answer in it, its bounds, the mean confidence, the share that is right, and the number of answers.
    """
    sure, right, own = (part.numpy() for part in (confidence, asked.right, asked.own))
    bins = np.minimum((sure * _BINS).astype(int), _BINS - 1)
    return {
        "auroc": auroc(sure, right),
        "auroc_own": auroc(sure[own], right[own]),
        "auroc_own_or_other": auroc(sure, own),
        "brier": float(((sure - right) ** 2).mean()),
        "share_right_own": float(right[own].mean()),
        "share_right_other": float(right[~own].mean()),
        "num_answers": len(sure),
        "reliability": [
            {
                "from": number / _BINS,
                "to": (number + 1) / _BINS,
                "confidence": float(sure[bins == number].mean()),
                "right": float(right[bins == number].mean()),
                "count": int((bins == number).sum()),
            }
            for number in np.unique(bins).tolist()
        ],
    }
