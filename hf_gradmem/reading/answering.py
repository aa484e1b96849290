"""Answers with what they are worth: how likely they are from the memory, and how much of that the memory adds."""

import operator
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from ..base.layout import reorder, token_order
from ..base.modes import evaluating, plain_generation
from ..base.token_ids import IGNORED_LABEL
from ..memory.written import GradMemMemory, Memories
from ..template import get_template, template_in_use
from .confidence import Calibration
from .generation import ending_tokens, new_tokens
from .queries import Queries
from .reciting import tokenize_asked
from .scoring import mean_log_probs

Tensor = torch.Tensor
TemplateSetting = str | Mapping[str, str]


@dataclass(frozen=True)
class Answer:
    """An answer that was read from a memory.

    Attributes:
        text: what the model generated, without special tokens and the white space around it, nor what it quoted.
        log_prob: mean log-probability of its tokens, in nats, the end token among them where the answer ended.
        confidence: how likely the answer is right, 0 to 1, by the adapter's calibration; `None` without one.
        memory_id: which memory it was read from, where the memories have ids.
        quote: what the answer rests on, where the adapter's template has it quote from the context; the model's own
            words from memory, so right or wrong as the answer is.
    """

    text: str
    log_prob: float
    confidence: float | None = None
    memory_id: str | None = None
    quote: str | None = None


@dataclass(frozen=True)
class Generated:
    """What was generated after questions, and the features of [`~hf_gradmem.reading.confidence`].

    Attributes:
        texts: the answers, without special tokens.
        quotes: what was quoted before each.
        features: `(questions, 3)`.
        tokens: of each answer, up to the one that ended it, and with it.
    """

    texts: list[str]
    quotes: list[str | None]
    features: Tensor
    tokens: list[list[int]]

    @property
    def log_probs(self) -> list[float]:
        return self.features[:, 0].tolist()


# The model is `Any` on this page: its class is on a floor above, and hands itself down.


def answer_questions(
    model: Any,
    questions: str | Sequence[str],
    memory: Memories,
    *,
    context_index: Sequence[int] | Tensor | None = None,
    memory_ids: Sequence[str] | None = None,
    max_new_tokens: int = 50,
    template: TemplateSetting | None = None,
    batch_size: int = 32,
) -> list[Answer]:
    """What [`GradMemForCausalLM.answer`] does."""
    read: GradMemMemory = model.memory_to_read(memory)
    asked = [questions] if isinstance(questions, str) else list(questions)
    index = which_memories(len(asked), len(read), context_index)
    if memory_ids is not None and len(memory_ids) != len(read):
        raise ValueError(f"There are {len(memory_ids)} memory_ids for {len(read)} memories. Give one for each.")
    generated = generate_answers(model, asked, read, index, max_new_tokens, template, batch_size)
    sure = confidences(model, generated.features)
    ids = [None if memory_ids is None else memory_ids[number] for number in index]
    texts = [text.strip() for text in generated.texts]
    return [Answer(*parts) for parts in zip(texts, generated.log_probs, sure, ids, generated.quotes, strict=True)]


def which_memories(num_questions: int, num_memories: int, context_index: Sequence[int] | Tensor | None) -> list[int]:
    """The memory of each question: as given, the only one, or one for each.

    Raises:
        TypeError: a number is not whole.
        ValueError: the numbers do not match.
    """
    if context_index is not None:
        index = [operator.index(number) for number in context_index]
        if len(index) != num_questions or not all(0 <= number < num_memories for number in index):
            raise ValueError(
                f"context_index says for each of {num_questions} questions which of {num_memories} memories it is "
                f"about, got {index}."
            )
        return index
    if num_memories not in (1, num_questions):
        raise ValueError(
            f"There are {num_memories} memories for {num_questions} questions. Give one memory, one for each question, "
            "or a context_index."
        )
    return list(range(num_questions)) if num_memories == num_questions else [0] * num_questions


def confidences(model: Any, features: Tensor) -> list[float | None]:
    """The confidence of answers with these features; `None` for a model that is not calibrated."""
    if model.config.confidence is None:
        return [None] * len(features)
    return Calibration.of(model.config.confidence)(features).tolist()


@torch.no_grad()
def generate_answers(
    model: Any,
    questions: Sequence[str],
    memory: GradMemMemory,
    context_index: Sequence[int],
    max_new_tokens: int,
    template: TemplateSetting | None = None,
    batch_size: int = 32,
) -> Generated:
    """Greedy answers, and how likely they are, so many questions at a time.

    Raises:
        TypeError: a question is not a text.
        ValueError: a question is empty, a number is below 1, or a memory is of another model.
    """
    for name, value in (("max_new_tokens", max_new_tokens), ("batch_size", batch_size)):
        if value < 1:
            raise ValueError(f"{name} must be at least 1, got {value}.")
    for number, question in enumerate(questions):
        if isinstance(question, str) and not question.strip():
            raise ValueError(f"Question {number} is empty: there is nothing to answer.")
    words = template_in_use(template, model.config.template, model.tokenizer)
    ends = ending_tokens(model.tokenizer, model.generation_config)
    texts, every = list[str](), list[list[int]]()
    reading = get_template(words, model.tokenizer)
    features = [torch.empty((0, 3), dtype=torch.float64)]
    for start in range(0, len(questions), batch_size):
        part, index = questions[start : start + batch_size], context_index[start : start + batch_size]
        input_ids, mask = tokenize_asked(model, memory, part, index, words)
        with plain_generation(), evaluating():
            new = new_tokens(model, memory, input_ids, mask, index, max_new_tokens=max_new_tokens, **ends)
        tokens = [up_to_end(row, ends.get("eos_token_id")) for row in new]
        texts += model.tokenizer.batch_decode(tokens, skip_special_tokens=True)
        every += tokens
        features.append(answer_features(model, memory, input_ids, mask, tokens, index))
    quotes, answers = zip(*map(reading.split, texts), strict=True) if texts else ((), ())
    return Generated(list(answers), list(quotes), torch.cat(features), every)


def up_to_end(tokens: list[int], ends: int | Sequence[int] | None, padding: int | None = None) -> list[int]:
    """A row of new tokens up to the one that ended it, and with it; without the padding of one that a text ended."""
    ends = [ends] if isinstance(ends, int) else ends or ()
    found = [place for place, token in enumerate(tokens) if token in ends]
    if found:
        return tokens[: found[0] + 1]
    last = max((place for place, token in enumerate(tokens) if token != padding), default=0)
    return tokens[: last + 1]


def answer_features(
    model: Any,
    memory: GradMemMemory,
    input_ids: Tensor,
    attention_mask: Tensor,
    answers: Sequence[Sequence[int]],
    context_index: Sequence[int],
) -> Tensor:
    """The features of [`~hf_gradmem.reading.confidence`] of answers to questions, `(questions, 3)`, NaN if unknown.

    Args:
        model: the reader.
        memory: what the answers were read from.
        input_ids, attention_mask: `(questions, length)`, the questions.
        answers: the tokens of each answer.
        context_index: the memory of each question.
    """
    with torch.no_grad(), evaluating():
        start = model.form.start(1)
    # In one run, which costs little more than one of the two: short rows wait for the weights.
    written = memory.to(model.device).embeddings
    start = start.repeat(1, written.shape[1] // start.shape[1], 1)  # as many as are read side by side
    both, unwritten = torch.cat([written, start]), [len(memory)] * len(answers)
    ids, mask = (torch.cat([part, part]) for part in (input_ids, attention_mask))
    log_probs = _log_probs(model, both, ids, mask, [*answers, *answers], [*context_index, *unwritten])
    log_prob, of_start = log_probs.split(len(answers))
    write_loss = torch.full_like(log_prob, torch.nan)
    if memory.final_write_loss is not None:
        write_loss = memory.final_write_loss.double().cpu()[list(context_index)]
    return torch.stack([log_prob, log_prob - of_start, write_loss], dim=1)


def answer_log_probs(
    model: Any,
    questions: Sequence[str],
    answers: Sequence[str],
    memory: GradMemMemory,
    *,
    context_index: Sequence[int] | Tensor | None = None,
    template: TemplateSetting | None = None,
) -> Tensor:
    """Mean log-probability of the tokens of given answers, and of the end token after each, `(questions,)`.

    Args:
        model: the reader.
        questions: the questions.
        answers: a text for each; the space before it is put there, unless the template ends in one.
        memory: one for all questions, or one for each.
        context_index: which memory each question is about.
        template: the words around each question; the adapter's by default.

    Raises:
        ValueError: the numbers do not match, or a memory is of another model.
    """
    model.check_memory(memory)
    index = which_memories(len(questions), len(memory), context_index)
    setting = template_in_use(template, model.config.template, model.tokenizer)
    words, tokenizer = get_template(setting, model.tokenizer), model.tokenizer
    input_ids, mask = tokenize_asked(model, memory, questions, index, setting)
    targets = [tokenizer(words.target(f" {answer}"), add_special_tokens=False).input_ids for answer in answers]
    end = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
    tokens = [target + end for target in targets]
    return _log_probs(model, memory.to(model.device).embeddings, input_ids, mask, tokens, index)


def _log_probs(
    model: Any,
    memory: Tensor,
    input_ids: Tensor,
    attention_mask: Tensor,
    answers: Sequence[Sequence[int]],
    context_index: Sequence[int],
) -> Tensor:
    width = max(map(len, answers), default=0)
    padded = torch.tensor([[*row, *[0] * (width - len(row))] for row in answers], dtype=torch.long)
    real = torch.tensor([[1] * len(row) + [0] * (width - len(row)) for row in answers], dtype=torch.long)
    ids, mask = torch.cat([input_ids, padded], dim=1), torch.cat([attention_mask, real], dim=1)
    labels = torch.cat([torch.full_like(input_ids, IGNORED_LABEL), padded.masked_fill(real == 0, IGNORED_LABEL)], dim=1)
    # No padding between question and answer, which might reach out of the base's window.
    order = token_order(mask, "right")[:, : int(mask.sum(1).max()) if len(mask) else 0]
    ids, mask, labels = (reorder(part, order) for part in (ids, mask, labels))
    index = torch.tensor(context_index, dtype=torch.long)
    ids, mask, labels, index = (part.to(model.device) for part in (ids, mask, labels, index))
    return mean_log_probs(model.read_phase, memory, Queries(ids, mask, labels, index, (len(ids),))).double().cpu()
