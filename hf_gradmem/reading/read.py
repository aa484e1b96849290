"""READ: memory and query side by side, the logits of the query, and its loss."""

import torch

from ..base.layout import align_with_query, reorder, token_order
from ..base.output_head import cross_entropy
from ..base.running import DecoderInputs, side_by_side
from ..base.token_ids import IGNORED_LABEL, check_vocabulary
from ..memory.phase import Phase
from .queries import Queries

Tensor = torch.Tensor

# Positions that a run of the prefixes by themselves has to spare the runs behind it; with fewer it only adds a run.
_WORTH_A_RUN = 2**7


def read_inputs(phase: Phase, memory: Tensor, queries: Queries, padding_side: str) -> tuple[DecoderInputs, Tensor]:
    """`[r_start; P(M); r_end; query]` with its padding, and the order of the layout.

    The memory stands next to the query, so left padding comes before it: a hole between the two is wrong for decoders
    that count positions or carry a state.

    Args:
        phase: READ.
        memory: `(memories, num_memory_tokens, width)`.
        queries: the rows, each with the memory that it reads.
        padding_side: `"left"` for generation, else `"right"`.

    Raises:
        ValueError: the base has no such token or label, or its window no room for as many.
    """
    check_vocabulary("input_ids", queries.input_ids, phase.decoder.vocab_size)
    if queries.labels is not None:
        check_vocabulary("labels", queries.labels[queries.labels != IGNORED_LABEL], phase.decoder.vocab_size)
    _check_window(phase, memory, queries)
    prefix = _prefixes(phase, memory, queries, padding_side)
    inputs = side_by_side([prefix, phase.decoder.tokens(queries.input_ids, queries.attention_mask)])
    order = token_order(inputs.attention_mask, padding_side)
    return inputs.reordered(order), order


def _check_window(phase: Phase, memory: Tensor, queries: Queries) -> None:
    room = phase.room(phase.memories_in(memory))
    if room is None or queries.input_ids.shape[1] <= room:
        return
    longest = int(queries.attention_mask.sum(1).max())
    if longest > room:
        raise ValueError(
            f"The longest query has {longest} tokens, answer included, but {phase.told_room(room)}. Shorten it."
        )


def _prefixes(phase: Phase, memory: Tensor, queries: Queries, padding_side: str) -> DecoderInputs:
    """What stands before each query. Where many read one memory, it is run once, and they go on from what it cached."""
    prefix, cached = phase.prefix(memory), phase.prefix_length - 1  # its last position predicts the first token
    used, of_row = queries.memory_index.unique(return_inverse=True)
    spared = (len(of_row) - len(used)) * cached
    if torch.is_grad_enabled() or prefix.past is not None or not cached or spared < _WORTH_A_RUN:
        return prefix.take(queries.memory_index)
    decoder, unpadded = phase.decoder, bool(queries.attention_mask.all())
    goes_on = padding_side == "right" or (unpadded and decoder.generates_from_cache)
    if not goes_on or not decoder.keeps_in_cache(cached):
        return prefix.take(queries.memory_index)
    prefix = prefix.take(used)
    first, last = _cut(prefix, slice(cached)), _cut(prefix, slice(cached, None))
    with phase.active():
        return last._replace(past=decoder.keys_and_values(first)).take(of_row)


def _cut(inputs: DecoderInputs, span: slice) -> DecoderInputs:
    """Some of the positions."""
    embeddings, attention_mask, input_ids = (part[:, span] for part in inputs[:3])
    return DecoderInputs(embeddings, attention_mask, input_ids)


def read(phase: Phase, memory: Tensor, queries: Queries) -> tuple[Tensor, Tensor | None]:
    """Logits in the layout that the queries were given in, `(*shape, length, vocab)`, and their loss, given labels."""
    logits, loss = _run(phase, memory, queries)
    aligned = align_with_query(logits, queries.attention_mask)
    return aligned.reshape(*queries.shape, *aligned.shape[1:]), loss


def answer_loss(phase: Phase, queries: Queries, memory: Tensor) -> Tensor:
    """The loss alone, of queries that have labels."""
    _, loss = _run(phase, memory, queries)
    if loss is None:
        raise ValueError("There is no loss without labels.")
    return loss


def _run(phase: Phase, memory: Tensor, queries: Queries) -> tuple[Tensor, Tensor | None]:
    """Logits of memory and query, padding last, and their loss."""
    if torch.is_grad_enabled():
        phase.check_trainable()
    inputs, order = read_inputs(phase, memory, queries, "right")
    logits = phase.logits(inputs)
    if queries.labels is None:
        return logits, None
    return logits, read_loss(logits, queries.labels, queries.attention_mask, order)


def read_loss(logits: Tensor, labels: Tensor, attention_mask: Tensor, order: Tensor) -> Tensor:
    """CE(Y): mean over the batch's label tokens, the first query token included (it is predicted from the memory).

    Args:
        logits: `(rows, prefix_length + query_length, vocab)`, memory first, padding last.
        labels: `(rows, query_length)`, not shifted, as in the query.
        attention_mask: `(rows, query_length)`; a label without a token is not scored.
        order: of [`~hf_gradmem.base.layout.token_order`] that the positions were brought into.
    """
    targets = read_targets(labels, attention_mask, order)
    scored = targets != IGNORED_LABEL
    # A batch without labels has loss 0 and no gradient, not NaN.
    return cross_entropy(logits[:, :-1][scored], targets[scored]).sum() / scored.sum().clamp(min=1)


def read_targets(labels: Tensor, attention_mask: Tensor, order: Tensor) -> Tensor:
    """What each position of `[memory; query]` but the last is to predict, `(rows, positions - 1)`; −100 is not scored.

    Args:
        labels, attention_mask, order: as in [`read_loss`].
    """
    labels = labels.masked_fill(~attention_mask.bool(), IGNORED_LABEL)
    prefix = labels.new_full((labels.shape[0], order.shape[1] - labels.shape[1]), IGNORED_LABEL)
    return reorder(torch.cat([prefix, labels], dim=1), order)[:, 1:]
