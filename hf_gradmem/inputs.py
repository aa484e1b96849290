"""Contexts and queries as the caller gives them, checked and brought into one form."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from transformers import PreTrainedTokenizerBase

Tensor = torch.Tensor
Context = str | Sequence[str] | Sequence[Sequence[str]]


def tokenize_contexts(
    context: Context, tokenizer: PreTrainedTokenizerBase, segment_length: int | None = None
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Texts as `input_ids`, `attention_mask` and, if any context has several segments, `segment_ids`.

    Args:
        context: a text, a list of texts (that many contexts) or a list of lists (contexts in segments).
        tokenizer: applied to each segment on its own, without special tokens.
        segment_length: cut a context of one text every so many tokens where others come in segments.

    Raises:
        TypeError: something in there is not a text.
    """
    contexts = [context] if isinstance(context, str) else list(context)
    segmented = [[item] if isinstance(item, str) else list(item) for item in contexts]
    for item in segmented:
        if not all(isinstance(segment, str) for segment in item):
            raise TypeError(f"a context is a text or a list of texts (its segments), got {item!r}.")
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
    return input_ids, attention_mask, segment_ids if any(len(item) > 1 for item in segmented) else None


def tokenize_queries(
    queries: Sequence[str], tokenizer: PreTrainedTokenizerBase, template: Literal["none", "chat"] = "none"
) -> tuple[Tensor, Tensor]:
    """Queries as left-padded `input_ids` and `attention_mask`, tokenised as in training: without special tokens.

    Args:
        queries: the questions. What follows an empty one comes from the memory alone.
        tokenizer: applied to each on its own. It needs no padding token: padding is masked.
        template: `"chat"` puts each question, as a user's turn, into the tokenizer's chat template; special tokens are
            then the template's own.

    Returns:
        `(queries, length)` each.

    Raises:
        TypeError: a query is not a text.
        ValueError: there is no such template, or the tokenizer has none.
    """
    for query in queries:
        if not isinstance(query, str):
            raise TypeError(f"a question is a text, got {query!r}.")
    if template not in ("none", "chat"):
        raise ValueError(f"template must be 'none' or 'chat', got {template!r}.")
    if template == "chat":
        if tokenizer.chat_template is None:
            raise ValueError(f"The tokenizer of {tokenizer.name_or_path} has no chat template. Use template 'none'.")
        turns = [[{"role": "user", "content": query}] for query in queries]
        queries = tokenizer.apply_chat_template(turns, add_generation_prompt=True, tokenize=False)
    encoded = [tokenizer(query, add_special_tokens=False).input_ids for query in queries]
    width = max(map(len, encoded), default=0)
    input_ids = [[0] * (width - len(tokens)) + tokens for tokens in encoded]
    mask = [[0] * (width - len(tokens)) + [1] * len(tokens) for tokens in encoded]
    return torch.tensor(input_ids, dtype=torch.long), torch.tensor(mask, dtype=torch.long)


def checked_context(
    input_ids: Tensor, attention_mask: Tensor | None, segment_ids: Tensor | None, device: torch.device
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Contexts on `device`, as copies that belong to no `inference_mode`, with a mask.

    Raises:
        ValueError: the shapes do not match, or a context is empty.
    """
    input_ids = _tokens("context input_ids", input_ids, device, dims=(2,))
    attention_mask = _mask("context attention_mask", attention_mask, input_ids)
    if segment_ids is not None:
        segment_ids = _same_shape("context segment_ids", segment_ids, input_ids)
    empty = (~attention_mask.any(dim=1)).nonzero().flatten().tolist()
    if empty or not len(input_ids):
        which = f"context {empty[0]} of {len(input_ids)} has no tokens" if empty else "no context was given"
        raise ValueError(f"Nothing to write: {which}. Every context needs at least one token.")
    return input_ids, attention_mask, segment_ids


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
        ValueError: the shapes do not match each other or the number of memories.
    """
    if input_ids is None:
        raise ValueError("There is nothing to read with: give the query as input_ids.")
    input_ids = _tokens("input_ids", input_ids, device, dims=(2, 3))
    attention_mask = _mask("attention_mask", attention_mask, input_ids)
    if labels is not None:
        labels = _same_shape("labels", labels, input_ids)
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
    length = input_ids.shape[-1]
    return Queries(
        input_ids=input_ids.reshape(-1, length),
        attention_mask=attention_mask.reshape(-1, length),
        labels=None if labels is None else labels.reshape(-1, length),
        memory_index=index,
        shape=shape,
    )


def _checked_index(context_index: Tensor, shape: tuple[int, ...], num_memories: int, device: torch.device) -> Tensor:
    index = torch.as_tensor(context_index, device=device).clone()
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


def _tokens(name: str, input_ids: Tensor, device: torch.device, dims: tuple[int, ...]) -> Tensor:
    input_ids = torch.as_tensor(input_ids)
    if input_ids.dim() not in dims or input_ids.is_floating_point():
        raise ValueError(
            f"{name} must be a tensor of token ids with {' or '.join(map(str, dims))} dimensions, got shape "
            f"{tuple(input_ids.shape)} of {input_ids.dtype}."
        )
    return input_ids.to(device).clone()


def _mask(name: str, mask: Tensor | None, input_ids: Tensor) -> Tensor:
    return torch.ones_like(input_ids).bool() if mask is None else _same_shape(name, mask, input_ids).bool()


def _same_shape(name: str, values: Tensor, input_ids: Tensor) -> Tensor:
    values = torch.as_tensor(values, device=input_ids.device)
    if values.shape != input_ids.shape:
        raise ValueError(
            f"{name} must have the shape of its input_ids, {tuple(input_ids.shape)}, got {tuple(values.shape)}."
        )
    return values.clone()
