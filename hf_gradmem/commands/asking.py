"""What `hf-gradmem ask` does: questions from a file, the memories that they are about, the best answer."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from ..memory.bm25 import can_search_words
from ..memory.search import SearchResult
from ..memory.silence import silent_errors
from ..memory.store import MemoryStore
from ..memory.written import GradMemMemory
from ..modeling_gradmem import GradMemForCausalLM
from ..reading.answering import Answer
from ..reading.confidence import MEASURED
from ..tasks.facts import NOT_TOLD
from ..texts.reading import read_text

SHORTLIST = 20
"""How many memories words alone choose, where the store keeps the texts."""
_TELLS_APART = 0.75  # AUROC of memories that hold the context above others


@dataclass(frozen=True)
class Asked:
    """A question with its answer.

    Attributes:
        question: the question.
        answer: the best of `candidates`.
        abstained: whether its confidence is too low for it to be given.
        candidates: all answers, one from each memory that was read, with the memory's score if it was searched for.
    """

    question: str
    answer: Answer
    abstained: bool
    candidates: tuple[tuple[Answer, float | None], ...]

    @property
    def text(self) -> str:
        """What is to be shown."""
        return NOT_TOLD if self.abstained else self.answer.text

    @property
    def quote(self) -> str | None:
        """What the answer rests on, if it is shown and rests on something."""
        return None if self.abstained else self.answer.quote

    def to_dict(self) -> dict[str, Any]:
        """Ready for JSON."""
        own = asdict(self.answer)
        found = [asdict(answer) | {"score": score} for answer, score in self.candidates]
        told = {"question": self.question, "answer": self.text, "abstained": self.abstained}
        told |= {name: own[name] for name in ("log_prob", "confidence")}
        if self.quote is not None:
            told["quote"] = self.quote
        if self.answer.memory_id is not None:
            told["id"] = self.answer.memory_id
        return told | ({"candidates": found} if found[0]["score"] is not None else {})


def read_questions(path: Path) -> list[str]:
    """Questions of a file: one a line, or, in a .jsonl file, one in the `question` of each line.

    Raises:
        OSError: it cannot be read.
        ValueError: it holds no question, or a line without one.
    """
    lines = read_text(path).split("\n")  # not `splitlines`, which parts JSON at what may stand in a text
    numbered = [(number, line) for number, line in enumerate(lines, 1) if line.strip()]
    if not numbered:
        raise ValueError(f"{path} holds no question.")
    if path.suffix.lower() != ".jsonl":
        return [line.strip() for _, line in numbered]
    return [_question_of(line, f"Line {number} of {path}") for number, line in numbered]


def _question_of(line: str, where: str) -> str:
    try:
        row = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{where} is not JSON ({error}).") from error
    question = row.get("question") if isinstance(row, dict) else None
    if not isinstance(question, str) or not question:
        raise ValueError(f'{where} holds no question: an object with a text as its "question" belongs there.')
    return question


def check_abstaining(model: GradMemForCausalLM, below: float | None) -> None:
    """Refuse a threshold that nothing can be compared with.

    Raises:
        ValueError: it lies outside 0..1, or the adapter is not calibrated.
    """
    if below is None:
        return
    if not 0 <= below <= 1:
        raise ValueError(f"--abstain-below is a confidence and must lie in 0..1, got {below}.")
    if model.config.confidence is None:
        raise ValueError(
            "--abstain-below needs an adapter with a confidence, and this one has none. Fit it first: hf-gradmem "
            "calibrate."
        )


def ask_memory(
    model: GradMemForCausalLM,
    questions: Sequence[str],
    memory: GradMemMemory,
    *,
    memory_id: str | None = None,
    abstain_below: float | None = None,
    **options: Any,
) -> list[Asked]:
    """Answer questions from one memory.

    Args:
        model: the reader.
        questions: the questions.
        memory: the memory.
        memory_id: its id, if it has one.
        abstain_below: the confidence below which no answer is given.
        options: those of [`GradMemForCausalLM.answer`].

    Raises:
        ValueError: as of [`check_abstaining`] and of [`GradMemForCausalLM.answer`].
    """
    check_abstaining(model, abstain_below)
    answers = model.answer(questions, memory, memory_ids=None if memory_id is None else [memory_id], **options)
    return [
        _best(question, [(answer, None)], abstain_below) for question, answer in zip(questions, answers, strict=True)
    ]


def ask_store(
    model: GradMemForCausalLM,
    questions: Sequence[str],
    store: MemoryStore,
    *,
    top: int = 3,
    abstain_below: float | None = None,
    show_progress: bool = False,
    **options: Any,
) -> list[Asked]:
    """Find the memories that each question is about, and give the best of their answers.

    The memories are searched by the likelihood of the question; where the store keeps its texts and words can be
    searched, by both together among the best [`SHORTLIST`] by words, which finds the right one more often
    (`python -m benchmarks.search`). The surest of the answers is given where the adapter's confidence was measured to
    tell the memory that holds the text from others; otherwise that of the memory that fits best.

    Args:
        model: the reader.
        questions: the questions.
        store: the memories.
        top: how many memories are read for each question.
        abstain_below: the confidence below which no answer is given.
        show_progress: show a progress bar over the memories.
        options: those of [`GradMemForCausalLM.answer`].

    Raises:
        ValueError: as of [`check_abstaining`], [`MemoryStore.search`] and [`GradMemForCausalLM.answer`].
    """
    check_abstaining(model, abstain_below)
    words: dict[str, Any] = {}
    if store.keeps_text and can_search_words():
        words = {"method": "joint", "shortlist": max(SHORTLIST, top)}
    found: list[list[SearchResult]] = store.search(model, list(questions), top, show_progress=show_progress, **words)
    places = [(question, result) for question, results in zip(questions, found, strict=True) for result in results]
    ids = list(dict.fromkeys(result.id for _, result in places))
    with silent_errors():
        memory = store[ids]
    index = [ids.index(result.id) for _, result in places]
    asked = [question for question, _ in places]
    answers = iter(model.answer(asked, memory, context_index=index, memory_ids=ids, **options))
    by_confidence = tells_memories_apart(model.config.confidence)
    return [
        _best(question, [(next(answers), result.score) for result in results], abstain_below, by_confidence)
        for question, results in zip(questions, found, strict=True)
    ]


def tells_memories_apart(confidence: Mapping[str, Any] | None) -> bool:
    """Whether a confidence is higher where the memory holds what is asked; so if that was not measured."""
    if confidence is None:
        return False
    measured = confidence.get(MEASURED, {}).get("auroc_own_or_other")
    return measured is None or measured >= _TELLS_APART


def _best(
    question: str,
    candidates: list[tuple[Answer, float | None]],
    abstain_below: float | None,
    by_confidence: bool = False,
) -> Asked:
    """The surest answer, of equals that of the memory that fits best; or this one's at once."""
    answer, _ = max(candidates, key=lambda candidate: (by_confidence and candidate[0].confidence) or 0.0)
    below = abstain_below is not None and answer.confidence is not None and answer.confidence < abstain_below
    return Asked(question, answer, below, tuple(candidates))
