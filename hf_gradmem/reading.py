"""READ: laying out memory and query, scoring the query, and planning a generation."""

from typing import Any

import torch
from transformers import GenerationConfig, PreTrainedTokenizerBase

from .padding import reorder
from .writing.objective import cross_entropy

Tensor = torch.Tensor
IGNORED_LABEL = -100


def read_loss(logits: Tensor, labels: Tensor, attention_mask: Tensor, order: Tensor) -> Tensor:
    """CE(Y): mean over the batch's label tokens, the first query token included (it is predicted from the memory).

    Args:
        logits: `(rows, prefix_length + query_length, vocab)`, memory first, padding last.
        labels: `(rows, query_length)`, not shifted, as in the query.
        attention_mask: `(rows, query_length)`; a label without a token is not scored.
        order: of [`~hf_gradmem.padding.token_order`] that the positions were brought into.
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


def count_new_tokens(arguments: dict[str, Any], default: GenerationConfig, prompt_length: int) -> dict[str, Any]:
    """Turn lengths that count the prompt into lengths that count new tokens.

    `generate(inputs_embeds=...)` of the base would count the memory's vectors as well.

    Args:
        arguments: those of `generate`, `generation_config` among them.
        default: the generation configuration behind them.
        prompt_length: tokens in the prompt.

    Raises:
        ValueError: `max_length` leaves no room for a new token.
    """

    def setting(name: str) -> int | None:
        given = (
            arguments.get(name),
            getattr(arguments.get("generation_config"), name, None),
            getattr(default, name, None),
        )
        return next((value for value in given if value is not None), None)

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


def ending_tokens(tokenizer: PreTrainedTokenizerBase, default: GenerationConfig) -> dict[str, Any]:
    """Which tokens end an answer, and which one fills up those that ended early, as arguments of `generate`.

    An answer ends in the tokenizer's end token, which training puts there, or in one of the base's own.
    """
    base = default.eos_token_id
    ends = [*(base if isinstance(base, list) else [base]), tokenizer.eos_token_id]
    ends = list(dict.fromkeys(token for token in ends if token is not None))
    padding = (tokenizer.pad_token_id, default.pad_token_id, *ends)
    arguments = {"eos_token_id": ends or None, "pad_token_id": next((t for t in padding if t is not None), None)}
    return {name: value for name, value in arguments.items() if value is not None}
