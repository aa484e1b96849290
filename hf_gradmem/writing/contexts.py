"""Contexts as the caller gives them, texts or tokens, brought into one form and checked."""

import os
from collections.abc import Callable, Mapping, Sequence, Set
from dataclasses import dataclass
from typing import Any

import torch
from transformers import PreTrainedTokenizerBase

from ..base.token_ids import check_vocabulary, checked_like, checked_mask, checked_tokens
from ..texts.reading import check_unicode, read_context

Tensor = torch.Tensor
Text = str | os.PathLike
Context = Text | Sequence[Text] | Sequence[Sequence[Text]]
"""A text; a list of texts is that many contexts, a list of lists contexts in segments. A path is its file's text."""
_A_CONTEXT = "a context is a text or a list of texts (its segments)"


@dataclass(frozen=True)
class Contexts:
    """Contexts as tokens.

    Attributes:
        input_ids: `(batch, length)`, padded on either side.
        attention_mask: `(batch, length)`, non-zero at tokens; all of them by default.
        segment_ids: `(batch, length)`; a segment is a run of equal values. `None` for contexts that come whole.
    """

    input_ids: Tensor
    attention_mask: Tensor | None = None
    segment_ids: Tensor | None = None

    def __len__(self) -> int:
        return len(self.input_ids)

    @property
    def mask(self) -> Tensor:
        """`attention_mask`, all ones where there is none."""
        return torch.ones_like(self.input_ids) if self.attention_mask is None else self.attention_mask

    def take(self, rows: Tensor | slice) -> "Contexts":
        """Some of the contexts."""
        mask, segments = (None if part is None else part[rows] for part in (self.attention_mask, self.segment_ids))
        return Contexts(self.input_ids[rows], mask, segments)

    def checked(self, device: torch.device, vocab_size: int | None = None) -> "Contexts":
        """The same contexts on `device`, as copies that belong to no `inference_mode`, with a mask.

        Args:
            device: where to.
            vocab_size: tokens of the base that they are for. Padding may have any id.

        Raises:
            ValueError: the shapes or the kinds of numbers do not match, a context is empty, or the base has no such
                token.
        """
        input_ids = checked_tokens("context input_ids", self.input_ids, device, dims=(2,))
        attention_mask = checked_mask("context attention_mask", self.attention_mask, input_ids)
        segment_ids = self.segment_ids
        if segment_ids is not None:
            segment_ids = checked_like("context segment_ids", segment_ids, input_ids)
        if vocab_size is not None:
            check_vocabulary("context input_ids", input_ids.where(attention_mask, 0), vocab_size)
        empty = (~attention_mask.any(dim=1)).nonzero().flatten().tolist()
        if empty or not len(input_ids):
            which = f"context {empty[0]} of {len(input_ids)} has no tokens" if empty else "no context was given"
            raise ValueError(f"Nothing to write: {which}. Every context needs at least one token.")
        return Contexts(input_ids, attention_mask, segment_ids)


def given_contexts(
    context: Context | None,
    input_ids: Tensor | None,
    attention_mask: Tensor | None,
    segment_ids: Tensor | None,
    tokenize: Callable[[Context], Contexts],
) -> Contexts:
    """Contexts that came either as text or as tokens.

    Raises:
        ValueError: neither was given, or both, or a text with what belongs to tokens.
    """
    if context is None and input_ids is not None:
        return Contexts(input_ids, attention_mask, segment_ids)
    if context is None or input_ids is not None:
        raise ValueError("write needs either a text or input_ids, and not both.")
    if attention_mask is not None or segment_ids is not None:
        raise ValueError("attention_mask and segment_ids belong to input_ids; a text brings its own.")
    return tokenize(context)


def texts_in(texts: Any) -> list[Any]:
    """A text as a list of one, and a list of texts, or of lists of them, as it is. A path is read.

    Raises:
        TypeError: it is neither. The keys of a mapping would be taken for texts, and a set has no order.
        OSError: the file of a path cannot be read.
        ValueError: that file is no text, or blank.
    """
    if isinstance(texts, str):
        return [texts]
    if isinstance(texts, os.PathLike):
        return [read_context(texts)]
    if isinstance(texts, Mapping | Set) or not hasattr(texts, "__iter__"):
        raise TypeError(f"{_A_CONTEXT}, got a {type(texts).__name__}: {texts!r}.")
    return list(texts)


def _segments(item: Any) -> list[Any]:
    return [read_context(text) if isinstance(text, os.PathLike) else text for text in texts_in(item)]


def tokenize_contexts(
    context: Context,
    tokenizer: PreTrainedTokenizerBase,
    segment_length: int | None = None,
    cut: Callable[[list[str]], list[str]] | None = None,
) -> Contexts:
    """Texts as tokens, in segments if any context has several.

    Args:
        context: a text, a list of texts (that many contexts) or a list of lists (contexts in segments); each text may
            be the path of its file.
        tokenizer: applied to each segment on its own, without special tokens.
        segment_length: cut a context of one text every so many tokens where others come in segments.
        cut: makes other segments of a context's; they stay as they are by default.

    Raises:
        TypeError: something in there is not a text.
        ValueError: a text holds half of a surrogate pair.
    """
    segmented = [_segments(item) for item in texts_in(context)]
    for item in segmented:
        if not all(isinstance(segment, str) for segment in item):
            raise TypeError(f"{_A_CONTEXT}, got {item!r}.")
        check_unicode("".join(item), "The context")
    if cut is not None:
        segmented = [cut(item) for item in segmented]
    encoded = [[tokenizer(text, add_special_tokens=False).input_ids for text in item] for item in segmented]
    width = max((sum(map(len, segments)) for segments in encoded), default=0)
    input_ids = torch.zeros((len(encoded), width), dtype=torch.long)
    attention_mask, segment_ids = torch.zeros_like(input_ids), torch.zeros_like(input_ids)
    for row, segments in enumerate(encoded):
        tokens = [token for segment in segments for token in segment]
        input_ids[row, : len(tokens)] = torch.tensor(tokens, dtype=torch.long)
        attention_mask[row, : len(tokens)] = 1
        if len(segments) == 1 and segment_length is not None:
            segment_ids[row] = torch.arange(width) // segment_length
        else:
            lengths = torch.tensor([len(segment) for segment in segments], dtype=torch.long)
            segment_ids[row, : len(tokens)] = torch.repeat_interleave(lengths)
    return Contexts(input_ids, attention_mask, segment_ids if any(len(item) > 1 for item in segmented) else None)
