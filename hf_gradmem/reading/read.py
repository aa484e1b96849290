"""READ: memory and query side by side, the logits of the query, and its loss."""

import functools
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch.nn import functional

from ..base.layout import align_with_query, reorder, token_order
from ..base.modes import evaluating, settled
from ..base.output_head import cross_entropy
from ..base.running import DecoderInputs, side_by_side
from ..base.token_ids import IGNORED_LABEL, check_vocabulary
from ..memory.phase import Phase
from ..writing.contexts import Contexts
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
    input_ids = queries.input_ids.where(queries.attention_mask.bool(), 0)  # padding may have any id
    check_vocabulary("input_ids", input_ids, phase.decoder.vocab_size)
    if queries.labels is not None:
        check_vocabulary("labels", queries.labels[queries.labels != IGNORED_LABEL], phase.decoder.vocab_size)
    _check_window(phase, memory, queries)
    prefix = _prefixes(phase, memory, queries, padding_side)
    inputs = side_by_side([prefix, phase.decoder.tokens(input_ids, queries.attention_mask)])
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
    return inputs._replace(embeddings=embeddings, attention_mask=attention_mask, input_ids=input_ids)


def within_window(run: Callable[[DecoderInputs], Tensor], inputs: DecoderInputs, window: int | None) -> Tensor:
    """What `run` gives for rows with their padding last. What of it goes past the window is not run, and is 0."""
    if window is None or inputs.cached_length + inputs.length <= window:
        return run(inputs)
    longest = int(inputs.attention_mask.sum(1).max())
    return functional.pad(run(_cut(inputs, slice(longest))), (0, 0, 0, inputs.length - longest))


@dataclass(frozen=True)
class Reading:
    """What READ gives.

    Attributes:
        logits: in the layout that the queries were given in, `(*shape, length, vocab)`.
        loss: CE(Y): mean over the batch's label tokens, the first query token included (it is predicted from the
            memory); `None` without labels.
        scored: `(label tokens, vocab)`, the logits that predict them, row by row; `None` without labels.
    """

    logits: Tensor
    loss: Tensor | None
    scored: Tensor | None


def read(phase: Phase, memory: Tensor, queries: Queries) -> Reading:
    """The logits of queries behind their memories, and their loss, given labels."""
    logits, loss, scored = _run(phase, memory, queries)
    aligned = align_with_query(logits, queries.attention_mask)
    return Reading(aligned.reshape(*queries.shape, *aligned.shape[1:]), loss, scored)


def answer_loss(phase: Phase, queries: Queries, memory: Tensor) -> Tensor:
    """The loss alone, of queries that have labels."""
    _labels(queries)
    return _run(phase, memory, queries)[1]  # type: ignore[return-value] # there are labels


def _labels(queries: Queries) -> Tensor:
    if queries.labels is None:
        raise ValueError("There is no loss without labels.")
    return queries.labels


def _run(phase: Phase, memory: Tensor, queries: Queries) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """Logits of memory and query, padding last, the loss, and the logits that it is made from."""
    if torch.is_grad_enabled():
        phase.check_trainable()
    inputs, order = read_inputs(phase, memory, queries, "right")
    logits = within_window(phase.logits, inputs, phase.decoder.window)
    if queries.labels is None:
        return logits, None, None
    targets = read_targets(queries.labels, queries.attention_mask, order)
    is_scored = targets != IGNORED_LABEL
    scored = logits[:, :-1][is_scored]
    # A batch without labels has loss 0 and no gradient, not NaN.
    return logits, cross_entropy(scored, targets[is_scored]).sum() / is_scored.sum().clamp(min=1), scored


def prompted_by(
    phase: Phase, contexts: Contexts | None, queries: Queries, num_memories: int
) -> Callable[[], Tensor] | None:
    """`_prompted_logits` for who asks for them; `None` without contexts."""
    return None if contexts is None else functools.partial(_prompted_logits, phase, contexts, queries, num_memories)


@torch.no_grad()
def _prompted_logits(phase: Phase, contexts: Contexts, queries: Queries, num_memories: int) -> Tensor:
    """`(label tokens, vocab)`: what the plain base says of them with the context before each query, and no memory.

    Before the context stands what the tokenizer begins texts with, if there is a tokenizer.

    Args:
        phase: READ, whose words before a memory stand before the context.
        contexts: which the queries' `memory_index` points to.
        queries: with labels.
        num_memories: that there are to read.

    Raises:
        ValueError: there is not a context for each memory, or the base's window has no room for one and its query.
    """
    decoder = phase.decoder
    if len(contexts) != num_memories:
        raise ValueError(
            f"distillation_loss_weight has the context of each memory stand before its queries: there are "
            f"{num_memories} memories, and {len(contexts)} contexts in context_input_ids."
        )
    rows = contexts.checked(decoder.device, decoder.vocab_size).take(queries.memory_index)
    parts = [decoder.tokens(rows.input_ids, rows.mask), decoder.tokens(queries.input_ids, queries.attention_mask)]
    inputs = side_by_side([*phase.before_context(len(rows)), *parts])
    order = token_order(inputs.attention_mask, "right")
    needed = int(inputs.attention_mask.sum(1).max())
    if decoder.window is not None and needed > decoder.window:
        raise ValueError(
            f"distillation_loss_weight has contexts stand before their queries: {needed} tokens together, and the "
            f"window of {decoder.name} is {decoder.window}. Shorten the contexts, or set the weight to 0."
        )
    with evaluating(), settled(decoder.base_model):
        logits = within_window(decoder.logits, inputs.reordered(order), decoder.window)
    targets = read_targets(_labels(queries), queries.attention_mask, order)
    return logits[:, :-1][targets != IGNORED_LABEL]


def read_targets(labels: Tensor, attention_mask: Tensor, order: Tensor) -> Tensor:
    """What each position of `[memory; query]` but the last is to predict, `(rows, positions - 1)`; −100 is not scored.

    Args:
        labels: `(rows, query_length)`, not shifted, as in the query.
        attention_mask: `(rows, query_length)`; a label without a token is not scored.
        order: of [`~hf_gradmem.base.layout.token_order`] that the positions were brought into.
    """
    labels = labels.masked_fill(~attention_mask.bool(), IGNORED_LABEL)
    prefix = labels.new_full((labels.shape[0], order.shape[1] - labels.shape[1]), IGNORED_LABEL)
    return reorder(torch.cat([prefix, labels], dim=1), order)[:, 1:]
