"""Many contexts, written in batches of like length."""

from collections.abc import Callable
from typing import Any

import torch

from .inputs import checked_context
from .memory import GradMemMemory
from .modeling_gradmem import GradMemForCausalLM

Tensor = torch.Tensor
# Of `tokenize_contexts`: input_ids, attention_mask and, if any context is in segments, segment_ids.
Tokenized = tuple[Tensor, Tensor, Tensor | None]


def take(contexts: Tokenized, rows: Tensor | slice) -> Tokenized:
    """Some of the contexts."""
    input_ids, attention_mask, segment_ids = contexts
    return input_ids[rows], attention_mask[rows], None if segment_ids is None else segment_ids[rows]


def check_fits(model: GradMemForCausalLM, contexts: Tokenized) -> None:
    """Raise a `ValueError` if one of the contexts has no tokens or is longer than the window of the base."""
    model._rows(*checked_context(*contexts, torch.device("cpu")))


def write_alike(
    model: GradMemForCausalLM,
    contexts: Tokenized,
    batch_size: int,
    *,
    on_batch: Callable[[int], object] = lambda size: None,
    **options: Any,
) -> GradMemMemory:
    """Write contexts in batches of like length.

    Args:
        model: the writer.
        contexts: what to write.
        batch_size: how many at a time.
        on_batch: called with the size of each batch that was written.
        options: further ones of [`GradMemForCausalLM.write`].

    Returns:
        The memories, in the order of `contexts`.

    Raises:
        FloatingPointError: a loss became NaN or infinite.
    """
    written, order = [], contexts[1].sum(1).argsort(stable=True)
    for rows in order.split(batch_size):
        input_ids, attention_mask, segment_ids = take(contexts, rows)
        try:
            written.append(
                model.write(input_ids=input_ids, attention_mask=attention_mask, segment_ids=segment_ids, **options)
            )
        except FloatingPointError as error:
            if len(order) == 1:
                raise
            raise FloatingPointError(
                f"Of the contexts {rows.tolist()}, which were written together: {error}"
            ) from error
        on_batch(len(rows))
    return GradMemMemory.cat(written)[order.argsort()]
