"""Many contexts, written in batches of like length."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.nn.utils.rnn import pad_sequence
from transformers import PreTrainedTokenizerBase

from .inputs import Context, checked_context, tokenize_contexts
from .memory import GradMemMemory
from .modeling_gradmem import GradMemForCausalLM

Tensor = torch.Tensor


@dataclass(frozen=True)
class TokenizedContext:
    """One context.

    Attributes:
        input_ids: `(length,)`.
        segment_ids: `(length,)`, or `None` for a context that is one text.
    """

    input_ids: Tensor
    segment_ids: Tensor | None


def tokenize_each(contexts: Context, tokenizer: PreTrainedTokenizerBase) -> list[TokenizedContext]:
    """Texts, or lists of segments, tokenised as [`GradMemForCausalLM.write`] does it.

    Raises:
        TypeError: something in there is not a text.
    """
    tokenized = []
    for context in [contexts] if isinstance(contexts, str) else contexts:
        input_ids, _, segment_ids = tokenize_contexts([context], tokenizer)
        tokenized.append(TokenizedContext(input_ids[0], None if segment_ids is None else segment_ids[0]))
    return tokenized


def check_fits(model: GradMemForCausalLM, contexts: Sequence[TokenizedContext]) -> None:
    """Raise a `ValueError` if one of the contexts has no tokens or is longer than the window of the base."""
    for indices in like_batches(contexts, len(contexts)):
        inputs = _padded([contexts[index] for index in indices])
        segment_ids = inputs.get("segment_ids")
        model._rows(*checked_context(inputs["input_ids"], inputs["attention_mask"], segment_ids, torch.device("cpu")))


def like_batches(contexts: Sequence[TokenizedContext], batch_size: int) -> Iterator[list[int]]:
    """Which contexts to write together, each once: of like length, so that there is little padding.

    Contexts in segments are kept apart from those that the configuration may cut: beside segments it would not.
    """
    for segmented in (False, True):
        kind = [index for index, context in enumerate(contexts) if (context.segment_ids is not None) == segmented]
        kind.sort(key=lambda index: len(contexts[index].input_ids))
        for start in range(0, len(kind), batch_size):
            yield kind[start : start + batch_size]


def write_alike(
    model: GradMemForCausalLM,
    contexts: Sequence[TokenizedContext],
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
    written, order = [], []
    for indices in like_batches(contexts, batch_size):
        try:
            written.append(model.write(**_padded([contexts[index] for index in indices]), **options))
        except FloatingPointError as error:
            if len(contexts) == 1:
                raise
            raise FloatingPointError(f"Of the contexts {indices}, which were written together: {error}") from error
        order += indices
        on_batch(len(indices))
    return GradMemMemory.cat(written)[torch.tensor(order).argsort()]


def _padded(contexts: Sequence[TokenizedContext]) -> dict[str, Tensor]:
    inputs = {
        "input_ids": pad_sequence([context.input_ids for context in contexts], batch_first=True),
        "attention_mask": pad_sequence([torch.ones_like(context.input_ids) for context in contexts], batch_first=True),
    }
    if contexts[0].segment_ids is not None:
        inputs["segment_ids"] = pad_sequence([context.segment_ids for context in contexts], batch_first=True)
    return inputs
