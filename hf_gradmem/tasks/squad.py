"""SQuAD v1.1 (Rajpurkar et al., arXiv 1606.05250) and Short SQuAD: questions whose answer is a span of a paragraph.

Short SQuAD, as in the paper, keeps of the paragraph only the sentence or sentences that hold the answer span. Sentences
are segments, each with the white space before it, and those that hold an answer are its quote.
"""

import json
import operator
import os
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

from datasets import Dataset

from ..texts.reading import read_text
from ..texts.sentences import split_sentences
from .rows import FEATURES_WITH_ANSWERS, check_split, checked
from .sources import load_hub, source_name, take_evenly, take_split
from .task import Task


@dataclass(frozen=True)
class Question:
    """A question on a paragraph.

    Attributes:
        text: the question.
        answers: all reference answers, the first of which is trained on.
        start: where in the paragraph the first one begins.
    """

    text: str
    answers: tuple[str, ...]
    start: int


Paragraph = tuple[str, list[Question]]


def load(
    split: str = "train",
    *,
    path: str | os.PathLike | None = None,
    hub_name: str | None = None,
    hub_split: str = "train",
    hub_revision: str | None = None,
    short: bool = False,
    segmented: bool = True,
    num_contexts: int | None = None,
    validation_share: float = 0.1,
) -> Dataset:
    """A row for each paragraph with all its questions; in Short SQuAD one for each of its spans of sentences.

    Args:
        split: `"train"` and `"validation"` share the paragraphs between them; `"test"` is all of them.
        path: a file of SQuAD's own JSON, or a list of `{"context", "qas": [{"question", "answer"}]}`.
        hub_name: a data set with `context`, `question` and `answers`, such as `rajpurkar/squad`.
        hub_split, hub_revision: which part of it.
        short: keep the sentences that hold the answer, and no other.
        segmented: whether each sentence is a segment; otherwise the context is one.
        num_contexts: how many of the split's contexts to take, spread evenly over it; all of them when `None`.
        validation_share: share of the paragraphs that are the validation part.

    Raises:
        OSError: the file cannot be read.
        ValueError: it is in another format, an answer does not occur in its paragraph, or an argument is out of range.
    """
    check_split(split)
    source = source_name(path, hub_name)
    if path is not None:
        paragraphs = parse(read_text(path), source)
    else:
        paragraphs = _hub_paragraphs(load_hub(source, None, hub_split, hub_revision), source)
    if not paragraphs:
        raise ValueError(f"{source} holds no question.")
    make = _short_rows if short else _rows
    rows = [row for paragraph in take_split(paragraphs, split, validation_share) for row in make(*paragraph)]
    taken = take_evenly(rows, num_contexts, source)
    if not segmented:
        taken = [row | {"context": ["".join(row["context"])]} for row in taken]
    return Dataset.from_list(list(checked(taken, source)), features=FEATURES_WITH_ANSWERS)


def parse(text: str, source: str = "the text") -> list[Paragraph]:
    """Paragraphs with their questions, from either JSON format; one that is there several times has all of them.

    Raises:
        ValueError: it is no JSON, or lacks a key.
    """
    try:
        data = json.loads(text)
        if isinstance(data, dict):
            data = [paragraph for article in data["data"] for paragraph in article["paragraphs"]]
        found = [
            (paragraph["context"], [_question(paragraph["context"], entry, source) for entry in paragraph["qas"]])
            for paragraph in data
        ]
    except json.JSONDecodeError as error:
        raise ValueError(f"{source} is not JSON: {error}") from error
    except (KeyError, TypeError, AttributeError) as error:
        raise ValueError(
            f"{source} is not SQuAD's format: {error!r} where context, qas, question or answers belong."
        ) from error
    return _merged(found)


def _question(context: str, entry: dict[str, Any], source: str) -> Question:
    if "answers" in entry:
        answers = [(answer["text"], operator.index(answer["answer_start"])) for answer in entry["answers"]]
    else:
        answers = [(entry["answer"], context.find(entry["answer"]))]
    return _checked_question(context, entry["question"], answers, source)


def _checked_question(context: str, text: str, answers: list[tuple[str, int]], source: str) -> Question:
    if not answers or not answers[0][0]:
        raise ValueError(f"The question {text!r} in {source} has no answer.")
    answer, start = answers[0]
    if context[start : start + len(answer)] != answer or start < 0:
        raise ValueError(f"The answer {answer!r} to {text!r} in {source} is not at its place in the paragraph.")
    return Question(text.strip(), tuple(dict.fromkeys(answer for answer, _ in answers)), start)


def _hub_paragraphs(rows: Iterable[dict[str, Any]], source: str) -> list[Paragraph]:
    found: list[Paragraph] = []
    for row in rows:
        missing = {"context", "question", "answers"} - row.keys()
        if missing:
            raise ValueError(f"{source} has no column {', '.join(sorted(missing))}, only {sorted(row)}.")
        answers = list(zip(row["answers"]["text"], row["answers"]["answer_start"], strict=True))
        question = _checked_question(row["context"], row["question"], answers, source)
        found.append((row["context"], [question]))
    return _merged(found)


def _merged(found: Iterable[Paragraph]) -> list[Paragraph]:
    """Each paragraph once, so that no two splits share one, with all questions on it; none without a question."""
    paragraphs: dict[str, list[Question]] = {}
    for context, questions in found:
        paragraphs.setdefault(context, []).extend(questions)
    return [(context, questions) for context, questions in paragraphs.items() if questions]


def _rows(context: str, questions: list[Question]) -> Iterator[dict[str, Any]]:
    spans = split_sentences(context)
    quotes = ["".join(_texts(context, _holding(spans, question))) for question in questions]
    yield _row(_texts(context, spans), questions, quotes)


def _short_rows(context: str, questions: list[Question]) -> Iterator[dict[str, Any]]:
    """The questions whose answers lie in the same sentences share a row."""
    spans = split_sentences(context)
    groups: dict[tuple[tuple[int, int], ...], list[Question]] = {}
    for question in questions:
        groups.setdefault(_holding(spans, question), []).append(question)
    for holding, asked in groups.items():
        segments = _texts(context, holding)
        yield _row([segments[0].lstrip(), *segments[1:]], asked, ["".join(segments)] * len(asked))


def _texts(context: str, spans: Iterable[tuple[int, int]]) -> list[str]:
    return [context[start:end] for start, end in spans]


def _holding(spans: list[tuple[int, int]], question: Question) -> tuple[tuple[int, int], ...]:
    """The sentences that hold a question's first answer."""
    stop = question.start + len(question.answers[0])
    return tuple((start, end) for start, end in spans if start < stop and question.start < end)


def _row(segments: list[str], questions: list[Question], quotes: list[str]) -> dict[str, Any]:
    return {
        "context": segments,
        "queries": [question.text for question in questions],
        "targets": [f" {question.answers[0]}" for question in questions],
        "answers": [list(question.answers) for question in questions],
        "quotes": [quote.strip() for quote in quotes],
    }


TASK = Task(load, metric="squad")
