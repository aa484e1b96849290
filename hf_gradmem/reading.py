"""READ: laying out memory and query, scoring the query, and planning a generation."""

from typing import Any

import torch
from transformers import GenerationConfig

from .padding import reorder, token_order
from .writing.objective import cross_entropy

Tensor = torch.Tensor
IGNORED_LABEL = -100


def join_memory_and_query(
    prefix: Tensor, token_embeds: Tensor, attention_mask: Tensor, padding_side: str
) -> tuple[Tensor, Tensor, Tensor]:
    """Lay out `[memory, query, padding]` (right) or `[padding, memory, query]` (left).

    There is never a hole between memory and query: a decoder with a recurrent state or a convolution would run it.

    Args:
        prefix: `(rows, prefix_length, hidden_size)`, `[r_start; P(M); r_end]` of each row.
        token_embeds: `(rows, query_length, hidden_size)`, padded on any side.
        attention_mask: `(rows, query_length)`.
        padding_side: where the padding goes.

    Returns:
        Embeddings and mask `(rows, prefix_length + query_length, ...)`, and the order of [`token_order`] that led there.
    """
    mask = torch.cat([attention_mask.new_ones(prefix.shape[:2]), attention_mask], dim=1)
    order = token_order(mask, padding_side)
    return reorder(torch.cat([prefix, token_embeds], dim=1), order), reorder(mask, order), order


def read_loss(logits: Tensor, labels: Tensor, attention_mask: Tensor, order: Tensor) -> Tensor:
    """CE(Y): mean over the batch's label tokens, the first query token included (it is predicted from the memory).

    Args:
        logits: `(rows, prefix_length + query_length, vocab)`, in the layout of [`join_memory_and_query`].
        labels: `(rows, query_length)`, not shifted, as in the query.
        attention_mask: `(rows, query_length)`; a label without a token is not scored.
        order: from [`join_memory_and_query`].
    """
    labels = labels.masked_fill(~attention_mask.bool(), IGNORED_LABEL)
    prefix = labels.new_full((labels.shape[0], logits.shape[1] - labels.shape[1]), IGNORED_LABEL)
    targets = reorder(torch.cat([prefix, labels], dim=1), order)[:, 1:]
    scored = targets != IGNORED_LABEL
    # A batch without labels has loss 0 and no gradient, not NaN.
    return cross_entropy(logits[:, :-1][scored], targets[scored]).sum() / scored.sum().clamp(min=1)


def align_with_query(logits: Tensor, order: Tensor, query_length: int) -> Tensor:
    """Logits in the query's own layout `(rows, query_length, vocab)`: position i predicts token i + 1."""
    identity = torch.arange(order.shape[1], device=order.device)
    if not torch.equal(order, identity.expand_as(order)):
        logits = reorder(logits, order.argsort(dim=1))
    return logits[:, logits.shape[1] - query_length :]


def count_new_tokens(
    arguments: dict[str, Any], generation_config: GenerationConfig | None, default: GenerationConfig, prompt_length: int
) -> dict[str, Any]:
    """Turn lengths that count the prompt into lengths that count new tokens.

    `generate(inputs_embeds=...)` of the base would count the memory's vectors as well.

    Raises:
        ValueError: `max_length` leaves no room for a new token.
    """

    def setting(name: str) -> int | None:
        for value in (arguments.get(name), getattr(generation_config, name, None), getattr(default, name, None)):
            if value is not None:
                return value
        return None

    lengths = {}
    max_length, min_length = setting("max_length"), setting("min_length")
    if setting("max_new_tokens") is None and max_length is not None:
        if max_length <= prompt_length:
            raise ValueError(
                f"max_length={max_length} leaves no room after a prompt of {prompt_length} tokens. "
                "Raise it, or give max_new_tokens."
            )
        lengths["max_new_tokens"] = max_length - prompt_length
    if setting("min_new_tokens") is None and min_length:
        lengths["min_new_tokens"] = max(min_length - prompt_length, 0)
    kept = {name: value for name, value in arguments.items() if name not in ("max_length", "min_length")}
    return kept | lengths
