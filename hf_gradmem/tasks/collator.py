"""Rows of a task as the tensors that `forward` takes."""

import operator
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import chain
from typing import Any, Literal

import torch
from transformers import PreTrainedTokenizerBase

from ..base.token_ids import IGNORED_LABEL
from ..template import Template, get_template
from .rows import check_row, context_text, ends_of, with_lists

Tensor = torch.Tensor

LIMITS = ("max_context_length", "max_query_length", "queries_per_context")
"""Of the tokens and queries of a row, as a collator and a recipe have them."""


def check_limits(limited: Any) -> None:
    """Refuse a limit that leaves nothing; no query at all is one to train by.

    Args:
        limited: with attributes named as [`LIMITS`], numbers or `None`.

    Raises:
        ValueError: one is out of range.
    """
    for name in LIMITS:
        value, least = getattr(limited, name), int(name != "queries_per_context")
        if value is not None and value < least:
            raise ValueError(f"{name} must be at least {least}, got {value}.")


@dataclass
class DataCollatorForGradMem:
    """Tokenise rows of context, queries and targets into one batch of [`~hf_gradmem.GradMemForCausalLM.forward`].

    Every tensor leads with the batch, so that Trainer and accelerate split and gather them together:
    `context_input_ids` and `context_attention_mask` `(batch, context_length)`, `context_segment_ids` of the same shape
    if the contexts are lists of segments (a context that is one text has none); `input_ids`, `attention_mask` and
    `labels` `(batch, queries, query_length)`, where the answer follows its query and labels are −100 but at the answer
    and its end token. Rows with fewer queries than others are filled up with queries that are masked throughout. Rows
    with a column `write_steps` add that number to the batch. Rows with a `memory`, a [`~hf_gradmem.GradMemMemory`] of
    their context, bring it to the batch as `memory` in place of the context's tensors, or beside them.

    `Trainer` needs `remove_unused_columns=False`, since it would take the text columns away, and no
    `label_smoothing_factor`, with which it takes the labels away from the model and computes another loss.

    Args:
        tokenizer: applied to each segment, query and target on its own, without special tokens.
        max_context_length: most tokens of a context; the rest of it is cut off, also where it is recited.
        max_query_length: most tokens of query and answer together; the query loses its beginning, and an answer that is
            longer by itself its end, with the end token.
        queries_per_context: most queries on a context; those after them are left out. With 0 a batch has contexts
            alone, which rows may then have alone, and the model's loss is that of their memories: WRITE is trained by
            itself. `Trainer` evaluates it with `label_names=["context_input_ids"]` and `prediction_loss_only=True`.
        padding: `"longest"` pads to the longest of the batch, `"max_length"` to the three limits above, so that all
            batches have one shape, `"queries"` to those of the queries alone, so that answers have one shape.
        add_end_token: whether an answer that does not end in the tokenizer's end token gets one; a row with a column
            `add_end_token` says so itself.
        template: the words around each query, as in [`~hf_gradmem.GradMemConfig`]: the adapter's.
        cut: makes other segments of a context's, as the model's writer does; they stay as they are by default.
        segment_length: by which a context of one text is cut beside others in segments, as the model's writer does.
            `**model.writer.cutting` gives both.
        keep_contexts: have rows with a memory bring their context too, for `distillation_loss_weight`.

    What is cut is counted in `truncated` and said in a warning when it first happens.

    Raises:
        ValueError: a row without a column, without context tokens, or with a target that is empty or an answer in words
            that the tokenizer does not know; limits that leave nothing; a template without its fields.
    """

    tokenizer: PreTrainedTokenizerBase
    max_context_length: int | None = None
    max_query_length: int | None = None
    queries_per_context: int | None = None
    padding: Literal["longest", "max_length", "queries"] = "longest"
    add_end_token: bool = True
    template: str | Mapping[str, str] = "plain"
    cut: Callable[[list[str]], list[str]] | None = None
    segment_length: int | None = None
    keep_contexts: bool = False
    truncated: dict[str, int] = field(
        default_factory=lambda: dict.fromkeys(("contexts", "queries", "answers", "left out"), 0), init=False
    )

    def __post_init__(self) -> None:
        check_limits(self)
        of_queries = () if self.queries_per_context == 0 else LIMITS[1:]
        needed = {"longest": (), "max_length": (LIMITS[0], *of_queries), "queries": of_queries}
        if self.padding not in needed:
            raise ValueError(f"padding must be 'longest', 'max_length' or 'queries', got {self.padding!r}.")
        self._words = get_template(self.template, self.tokenizer)
        missing = [name for name in needed[self.padding] if getattr(self, name) is None]
        if missing:
            raise ValueError(f"padding={self.padding!r} needs {', '.join(missing)} as well.")

    def __call__(self, rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        """Build the batch of these rows: tensors, and `write_steps`, a number, and `memory` where rows have them."""
        before, rows = dict(self.truncated), list(map(with_lists, rows))
        for index, row in enumerate(rows):
            check_row(row, f"row {index} of the batch", asked=self.queries_per_context != 0)
        written = [row["memory"] for row in rows if row.get("memory") is not None]
        if written and len(written) < len(rows):
            raise ValueError(f"Of the {len(rows)} rows of a batch, {len(written)} have a memory: all must, or none.")
        source: dict[str, Any] = {"memory": type(written[0]).cat(written)} if written else {}
        texts = [context_text(row["context"]) for row in rows]
        if self.keep_contexts or not written:
            whole = self._segments(rows)
            kept = [_first_tokens(segments, self.max_context_length) for segments in whole]
            self.truncated["contexts"] += sum(map(operator.ne, kept, whole))
            source |= self._contexts(kept)
            if self._words.recites and not written:
                texts = [self._held_text(*held) for held in zip(texts, kept, whole, strict=True)]
        asked = {} if self.queries_per_context == 0 else self._queries(rows, texts)
        batch = source | asked | _write_steps(rows)
        if not any(before.values()) and any(self.truncated.values()):
            cut = ", ".join(f"{count} {what}" for what, count in self.truncated.items() if count)
            warnings.warn(
                f"Cut in this batch of {len(rows)} contexts: {cut} (max_context_length={self.max_context_length}, "
                f"max_query_length={self.max_query_length}, queries_per_context={self.queries_per_context}). Further "
                "ones are counted in `truncated` without a warning.",
                stacklevel=2,
            )
        return batch

    def _segments(self, rows: Sequence[Mapping[str, Any]]) -> list[list[list[int]]]:
        """The tokens of each segment of each context, before anything of it is cut off."""
        contexts = [row["context"] for row in rows]
        segmented = [[context] if isinstance(context, str) else list(context) for context in contexts]
        if self.cut is not None:
            segmented = [self.cut(segments) for segments in segmented]
        tokens = iter(self._encode([segment for segments in segmented for segment in segments]))
        encoded = [[next(tokens) for _ in segments] for segments in segmented]
        for index, (segments, text) in enumerate(zip(encoded, contexts, strict=True)):
            if not any(segments):
                raise ValueError(f"The context of row {index} of the batch has no tokens: {text!r}.")
        return encoded

    def _held_text(self, text: str, kept: list[list[int]], whole: list[list[int]]) -> str:
        """What a right memory of a context decodes to: its text, or, where it is cut, what is left of that."""
        return (
            text
            if kept == whole
            else str(self.tokenizer.decode(list(chain(*kept)), clean_up_tokenization_spaces=False))
        )

    def _contexts(self, encoded: Sequence[list[list[int]]]) -> dict[str, Tensor]:
        ids = [list(chain(*segments)) for segments in encoded]
        limit = self.max_context_length
        width = max(map(len, ids)) if limit is None or self.padding != "max_length" else limit
        batch = {
            "context_input_ids": _padded(ids, width, self._pad_id),
            "context_attention_mask": _padded([[1] * len(row) for row in ids], width, 0),
        }
        if any(len(segments) > 1 for segments in encoded):  # otherwise the model cuts them as it is set to
            batch["context_segment_ids"] = _padded(list(map(self._segment_numbers, encoded)), width, 0)
        return batch

    def _segment_numbers(self, segments: list[list[int]]) -> list[int]:
        """The segment of each token; one text is cut as the model would, where others come in segments."""
        if len(segments) == 1 and self.segment_length is not None:
            return [place // self.segment_length for place in range(len(segments[0]))]
        return [number for number, segment in enumerate(segments) for _ in segment]

    def _queries(self, rows: Sequence[Mapping[str, Any]], texts: Sequence[str]) -> dict[str, Tensor]:
        limit = self.queries_per_context
        kept = [len(row["queries"][:limit]) for row in rows]
        self.truncated["left out"] += sum(len(row["queries"]) for row in rows) - sum(kept)
        asked = [
            self._words.question(query, text)
            for row, text in zip(rows, texts, strict=True)
            for query in row["queries"][:limit]
        ]
        queries = self._encode(asked)
        asked_of = [(row, text) for row in rows for text in targets_of(row, self._words)[:limit]]
        encoded = self._encode([text for _, text in asked_of])
        targets = [self._ended(row, target) for (row, _), target in zip(asked_of, encoded, strict=True)]
        for (row, text), target in zip(asked_of, targets, strict=True):
            self._check_target(row, text, target)
        pairs = iter([self._fitted(query, target) for query, target in zip(queries, targets, strict=True)])
        grouped = [[next(pairs) for _ in range(count)] for count in kept]
        number, width = max(kept), max(len(query) + len(target) for group in grouped for query, target in group)
        if self.padding != "longest" and limit is not None and self.max_query_length is not None:
            number, width = limit, self.max_query_length
        flat = [pair for group in grouped for pair in group + [([], [])] * (number - len(group))]
        shape = (len(rows), number, width)
        return {
            "input_ids": _padded([query + target for query, target in flat], width, self._pad_id).view(shape),
            "attention_mask": _padded([[1] * len(query + target) for query, target in flat], width, 0).view(shape),
            "labels": _padded(
                [[IGNORED_LABEL] * len(query) + target for query, target in flat], width, IGNORED_LABEL
            ).view(shape),
        }

    def _encode(self, texts: list[str]) -> list[list[int]]:
        return self.tokenizer(texts, add_special_tokens=False, return_attention_mask=False, verbose=False).input_ids

    def _is_answer(self, row: Mapping[str, Any]) -> bool:
        """Whether what follows a query ends; running text goes on."""
        own = ends_of(row)
        return self.add_end_token if own is None else own

    def _check_target(self, row: Mapping[str, Any], text: str, target: list[int]) -> None:
        if not target:
            raise ValueError(f"The target {text!r} has no tokens.")
        unknown, mark = self.tokenizer.unk_token_id, self.tokenizer.unk_token
        if not self._is_answer(row) or unknown is None or unknown not in target or mark in text:
            return  # running text goes on all the same; two answers of unknown words would count as one
        if any(unknown in word for word in self._encode(text.split())):  # a space tells nothing
            raise ValueError(
                f"The target {text!r} has words that the tokenizer does not know ({mark}): no answer could be told "
                "from another. Leave such rows out, or take a base whose vocabulary has the words."
            )

    def _ended(self, row: Mapping[str, Any], target: list[int]) -> list[int]:
        end = self.tokenizer.eos_token_id
        if not self._is_answer(row) or end is None or not target or target[-1] == end:
            return target
        return [*target, end]

    def _fitted(self, query: list[int], target: list[int]) -> tuple[list[int], list[int]]:
        limit = self.max_query_length
        if limit is None or len(query) + len(target) <= limit:
            return query, target
        self.truncated["queries"] += 1
        self.truncated["answers"] += len(target) > limit
        target = target[:limit]
        return query[len(query) + len(target) - limit :], target

    @property
    def _pad_id(self) -> int:
        """Padding is masked; any id that the base has will do."""
        return next(
            token for token in (self.tokenizer.pad_token_id, self.tokenizer.eos_token_id, 0) if token is not None
        )


def targets_of(row: Mapping[str, Any], words: Template) -> list[str]:
    """What follows each query of a row: its target, behind the quote it rests on where the template quotes.

    Raises:
        ValueError: the template quotes, and the row does not know from where.
    """
    quotes = row.get("quotes")
    if words.answer_after and quotes is None:
        raise ValueError(
            f"The template quotes before it answers ({words.answer_after!r} comes between), and the row has no column "
            f"'quotes', only {sorted(row)}. Choose another template, or a task whose rows say what to quote."
        )
    quotes = quotes or [""] * len(row["targets"])
    return [words.target(target, quote) for target, quote in zip(row["targets"], quotes, strict=True)]


def _write_steps(rows: Sequence[Mapping[str, Any]]) -> dict[str, int]:
    """The steps of WRITE that a curriculum asks of these rows, if it does."""
    steps = {row["write_steps"] for row in rows if row.get("write_steps") is not None}
    if len(steps) > 1:
        raise ValueError(f"The rows of a batch must ask for the same write_steps, got {sorted(steps)}.")
    return {"write_steps": steps.pop()} if steps else {}


def _first_tokens(segments: list[list[int]], limit: int | None) -> list[list[int]]:
    """The segments as far as they have so many tokens together."""
    if limit is None or sum(map(len, segments)) <= limit:
        return segments
    kept: list[list[int]] = []
    for tokens in segments:
        if limit < len(tokens):
            return [*kept, tokens[:limit]] if limit else kept
        kept.append(tokens)
        limit -= len(tokens)
    return kept


def _padded(rows: list[list[int]], width: int, value: int) -> Tensor:
    """Right-padded `(len(rows), width)`."""
    return torch.tensor([row + [value] * (width - len(row)) for row in rows], dtype=torch.long).view(len(rows), width)
