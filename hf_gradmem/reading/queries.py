"""Queries as the caller gives them, texts or tokens, brought into flat rows and checked."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from transformers import PreTrainedTokenizerBase

from ..base.token_ids import checked_like, checked_mask, checked_tokens, is_whole
from ..template import get_template
from ..texts.reading import check_unicode

Tensor = torch.Tensor


def tokenize_queries(
    queries: Sequence[str],
    tokenizer: PreTrainedTokenizerBase,
    template: str | Mapping[str, str] = "plain",
    recited: Sequence[str | None] | None = None,
) -> tuple[Tensor, Tensor]:
    """Queries as left-padded `input_ids` and `attention_mask`, tokenised as in training: without special tokens.

    Args:
        queries: the questions. What follows an empty one comes from the memory alone.
        tokenizer: applied to each on its own. It needs no padding token: padding is masked.
        template: the words around each, as in [`GradMemConfig`]; special tokens are the template's own.
        recited: what the memory of each decodes to, for a template that has it in front of the question.

    Returns:
        `(queries, length)` each.

    Raises:
        TypeError: a query is not a text.
        ValueError: there is no such template, or the tokenizer has none.
    """
    for query in queries:
        if not isinstance(query, str):
            raise TypeError(f"a question is a text, got {query!r}.")
        check_unicode(query, "The question")
    words = get_template(template, tokenizer)
    before = recited or [None] * len(queries)
    asked = [words.question(*each) for each in zip(queries, before, strict=True)]
    return pad_left([tokenizer(text, add_special_tokens=False).input_ids for text in asked])


def pad_left(prompts: Sequence[Sequence[int]]) -> tuple[Tensor, Tensor]:
    """Prompts of tokens as `input_ids` and `attention_mask`, `(prompts, length)` each."""
    width = max(map(len, prompts), default=0)
    input_ids = [[0] * (width - len(tokens)) + list(tokens) for tokens in prompts]
    mask = [[0] * (width - len(tokens)) + [1] * len(tokens) for tokens in prompts]
    return torch.tensor(input_ids, dtype=torch.long), torch.tensor(mask, dtype=torch.long)


@dataclass(frozen=True)
class Queries:
    """Queries as flat rows.

    Attributes:
        input_ids, attention_mask: `(rows, query_length)`.
        labels: `(rows, query_length)`, *optional*.
        memory_index: `(rows,)`, the memory that each row reads.
        shape: the leading dimensions the caller gave, `(batch,)` or `(batch, queries)`.
    """

    input_ids: Tensor
    attention_mask: Tensor
    labels: Tensor | None
    memory_index: Tensor
    shape: tuple[int, ...]


def checked_queries(
    input_ids: Tensor | None,
    attention_mask: Tensor | None,
    labels: Tensor | None,
    context_index: Tensor | None,
    num_memories: int,
    device: torch.device,
) -> Queries:
    """Queries `(batch, length)`, `(batch, queries, length)`, or flat with `context_index`, paired with memories.

    One memory serves any number of flat queries.

    Raises:
        ValueError: the shapes or the kinds of numbers do not match each other or the number of memories.
    """
    if input_ids is None:
        raise ValueError("There is nothing to read with: give the query as input_ids.")
    input_ids = checked_tokens("input_ids", input_ids, device, dims=(2, 3))
    attention_mask = checked_mask("attention_mask", attention_mask, input_ids)
    if not len(input_ids):
        raise ValueError("input_ids has no row: there is no query to read with. Leave the call out.")
    if labels is not None:
        labels = checked_like("labels", labels, input_ids)
    shape = tuple(input_ids.shape[:-1])
    if context_index is not None:
        index = _checked_index(context_index, shape, num_memories, device)
    elif num_memories == 1 or num_memories == shape[0]:
        per_context = 1 if len(shape) == 1 else shape[1]
        index = torch.arange(shape[0], device=device).repeat_interleave(per_context) % num_memories
    else:
        raise ValueError(
            f"There are {num_memories} memories for {shape[0]} rows of queries. Give one memory, one for each row, or "
            "a context_index."
        )
    return Queries(
        input_ids=input_ids.flatten(0, -2),
        attention_mask=attention_mask.flatten(0, -2),
        labels=None if labels is None else labels.flatten(0, -2),
        memory_index=index,
        shape=shape,
    )


def checked_prompts(
    input_ids: Tensor | None,
    attention_mask: Tensor | None,
    context_index: Tensor | None,
    num_memories: int,
    device: torch.device,
) -> Queries:
    """Prompts of a generation, which are flat: `(rows, prompt_length)`; otherwise as [`checked_queries`]."""
    shape = None if input_ids is None else tuple(torch.as_tensor(input_ids).shape)
    if shape is not None and len(shape) != 2:
        raise ValueError(
            f"generate takes flat prompts (rows, prompt_length), got shape {shape}. Flatten them "
            "and say with context_index which memory each one reads."
        )
    return checked_queries(input_ids, attention_mask, None, context_index, num_memories, device)


def _checked_index(context_index: Tensor, shape: tuple[int, ...], num_memories: int, device: torch.device) -> Tensor:
    index = torch.as_tensor(context_index, device=device)
    if not is_whole(index):
        raise ValueError(f"context_index must be whole numbers, which memory each query reads, got {index.dtype}.")
    index = index.to(torch.long, copy=True)
    if len(shape) != 1 or tuple(index.shape) != shape:
        raise ValueError(
            f"context_index goes with flat queries, one entry for each: it has shape {tuple(index.shape)}, the queries "
            f"{shape}."
        )
    if len(index) and not (int(index.min()) >= 0 and int(index.max()) < num_memories):
        raise ValueError(
            f"context_index must lie in 0..{num_memories - 1}, got {int(index.min())}..{int(index.max())}."
        )
    return index
