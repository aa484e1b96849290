"""Where a query's context is when it is answered: in the memory, in the prompt, or nowhere.

The second and the third are baselines on the plain base: full attention over the context, and the floor. The memory
of another context is a baseline too: what a trained reader guesses. Each reader gives the logits of the same query and
answer tokens, and generates answers to the same queries.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Protocol

import torch
from transformers import PreTrainedTokenizerBase

from ..base.token_ids import IGNORED_LABEL, check_vocabulary
from ..memory.written import GradMemMemory
from ..modeling_gradmem import GradMemForCausalLM
from ..reading.answering import answer_log_probs
from ..reading.reciting import recite
from ..tasks.rows import context_text
from ..template import get_template, leading_tokens
from .answers import answer_prompts, answer_queries

Tensor = torch.Tensor

OTHER = "other"
BASELINES = ("prompt", "none", OTHER)


def check_baselines(baselines: Sequence[str]) -> None:
    """Raise a `ValueError` unless each of `baselines` is one of [`BASELINES`]."""
    for baseline in baselines:
        if baseline not in BASELINES:
            raise ValueError(f"There is no baseline {baseline!r}. The baselines are {', '.join(BASELINES)}.")


def prompt_tokens(
    rows: Iterable[Mapping[str, Any]],
    tokenizer: PreTrainedTokenizerBase,
    template: str | Mapping[str, str],
    with_context: bool = True,
) -> list[list[int]]:
    """What stands before the answer to each query of the rows, for a base that has no memory.

    Args:
        rows: with `context` and `queries`.
        tokenizer: which puts what it begins texts with in front.
        template: the words around contexts and queries.
        with_context: whether the context stands in the prompt.
    """
    words, start = get_template(template, tokenizer), leading_tokens(tokenizer)
    texts = []
    for row in rows:
        context = context_text(row["context"])
        for query in row["queries"]:
            texts.append(words.in_prompt(context, query) if with_context else words.without_memory(query))
    return [start + tokenizer(text, add_special_tokens=False).input_ids for text in texts]


@dataclass(frozen=True)
class ReadBatch:
    """Rows of a task, as texts and as tensors.

    Attributes:
        rows: with `context`, `queries` and `targets`.
        collate: makes tensors of rows, as [`~hf_gradmem.DataCollatorForGradMem`] does, on the model's device.
        template: the words around queries and contexts.
    """

    rows: list[dict[str, Any]]
    collate: Callable[[Sequence[Mapping[str, Any]]], dict[str, Tensor]]
    template: str | Mapping[str, str] = "plain"

    @cached_property
    def tensors(self) -> dict[str, Tensor]:
        """Of the rows."""
        return self.collate(self.rows)

    def recited(self, texts: Sequence[str]) -> dict[str, Tensor]:
        """Of the rows, each with what its memory recites in place of its context: a query then has that before it."""
        return self.collate([row | {"context": text} for row, text in zip(self.rows, texts, strict=True)])

    @property
    def queries(self) -> list[str]:
        return [query for row in self.rows for query in row["queries"]]

    @property
    def context_index(self) -> list[int]:
        """The row that each of [`queries`] belongs to."""
        return [index for index, row in enumerate(self.rows) for _ in row["queries"]]


class Reader(Protocol):
    """Reads the queries of one batch."""

    def logits(self, batch: ReadBatch) -> Iterator[tuple[Tensor, Tensor]]:
        """Logits `(..., length, vocab)` and labels `(..., length)`, not shifted, in as many parts as it takes.

        The first token of query and answer is scored by no reader: without a context nothing predicts it.
        """

    def answers(self, batch: ReadBatch, max_new_tokens: int) -> list[str]:
        """A greedy answer to each query, one context after another."""


@dataclass(frozen=True)
class MemoryReader:
    """Reads from memories, one for each row of the batch."""

    model: GradMemForCausalLM
    memory: GradMemMemory

    def texts(self, batch: ReadBatch) -> list[str] | None:
        """What the memories recite, where the template has it stand before the queries."""
        return recite(self.model, self.memory) if get_template(batch.template, self.model.tokenizer).recites else None

    def logits(self, batch: ReadBatch) -> Iterator[tuple[Tensor, Tensor]]:
        texts = self.texts(batch)
        tensors = batch.tensors if texts is None else batch.recited(texts)
        output = self.model(
            input_ids=tensors["input_ids"], attention_mask=tensors["attention_mask"], memory=self.memory
        )
        yield output.logits, tensors["labels"]

    def answers(self, batch: ReadBatch, max_new_tokens: int) -> list[str]:
        return answer_queries(
            self.model,
            self.memory,
            batch.queries,
            batch.context_index,
            max_new_tokens,
            batch.template,
        )

    def log_probs(self, batch: ReadBatch, answer: str) -> list[float]:
        """Mean log-probability of one answer's tokens behind each query."""
        answers, about = [answer] * len(batch.queries), batch.context_index
        return answer_log_probs(
            self.model,
            batch.queries,
            answers,
            self.memory,
            context_index=about,
            template=batch.template,
        ).tolist()


@dataclass(frozen=True)
class PromptReader:
    """Reads with the plain base: no memory, no LoRA.

    Attributes:
        model: whose base it is.
        with_context: whether the context stands in front of the query.
        batch_size: prompts at a time.
    """

    model: GradMemForCausalLM
    with_context: bool
    batch_size: int

    def logits(self, batch: ReadBatch) -> Iterator[tuple[Tensor, Tensor]]:
        labels = batch.tensors["labels"].flatten(0, -2)
        answers = [
            row[row != IGNORED_LABEL].tolist() for row in labels[batch.tensors["attention_mask"].flatten(0, -2).any(-1)]
        ]
        # Where nothing is asked, the first token of the answer is one that no other reader is asked for.
        words = get_template(batch.template, self.model.tokenizer)
        asked = [words.question(query, context_text(row["context"])) for row in batch.rows for query in row["queries"]]
        unscored = [int(not question) for question in asked]
        rows = list(
            zip(
                prompt_tokens(batch.rows, self.model.tokenizer, batch.template, self.with_context),
                answers,
                unscored,
                strict=True,
            )
        )
        for start in range(0, len(rows), self.batch_size):
            part = rows[start : start + self.batch_size]
            yield self._run(
                [prompt + answer for prompt, answer, _ in part],
                [[IGNORED_LABEL] * (len(prompt) + first) + answer[first:] for prompt, answer, first in part],
            )

    def _run(self, rows: list[list[int]], labels: list[list[int]]) -> tuple[Tensor, Tensor]:
        width = max(map(len, rows))
        self._check_window(width)
        ids, mask, padded = (
            torch.tensor([row + [fill] * (width - len(row)) for row in values])
            for values, fill in ((rows, 0), ([[1] * len(row) for row in rows], 0), (labels, IGNORED_LABEL))
        )
        check_vocabulary("input_ids", ids, self.model.decoder.vocab_size)  # before they are on an accelerator
        device = self.model.device
        return self.model.decoder.logits(self.model.decoder.tokens(ids.to(device), mask.to(device))), padded.to(device)

    def answers(self, batch: ReadBatch, max_new_tokens: int) -> list[str]:
        prompts = self._prompts(batch)
        self._check_window(max(map(len, prompts)) + max_new_tokens)
        parts = [prompts[start : start + self.batch_size] for start in range(0, len(prompts), self.batch_size)]
        words = get_template(batch.template, self.model.tokenizer)
        texts = [text for part in parts for text in answer_prompts(self.model, part, max_new_tokens)]
        return [words.split(text)[1] for text in texts]

    def _prompts(self, batch: ReadBatch) -> list[list[int]]:
        return prompt_tokens(batch.rows, self.model.tokenizer, batch.template, self.with_context)

    def _check_window(self, needed: int) -> None:
        window = self.model.decoder.window
        if window is not None and needed > window:
            raise ValueError(
                f"A prompt of context, query and answer needs {needed} positions, but the window of "
                f"{type(self.model.base_model).__name__} is {window}. Shorten the contexts, or leave out the baseline "
                "'prompt'."
            )
