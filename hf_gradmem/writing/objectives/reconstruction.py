"""The reconstruction objective of WRITE, L(M; C): whole contexts and contexts in segments.

L(M; C) = (1/|C|) Σ_j Σ_i −log f_θ(s_j,i | [s_j−1; w_start; P(M); w_end; s_j,<i]). One segment is the paper's objective
(eq. 3). Segments are the rows of one batch; a row holds the unscored prefix, then the segment.

The prefix stands before the memory, so that a segment begins right behind it, where a query will. Between the two, a
prefix moves the segment away from the place that READ looks things up from, and learning takes far longer. A memory in
the cache has everything behind it, prefixes too.
"""

from collections.abc import Callable
from typing import Any

import torch
from transformers import StoppingCriteria

from ...base.layout import packed_layout
from ...base.modes import evaluating, generator, plain_generation
from ...base.output_head import cross_entropy, head_cross_entropy
from ...base.running import DecoderInputs, generation_arguments, side_by_side
from ...base.token_ids import check_vocabulary
from ...memory.phase import Phase
from ..rows import ContextRows, whole_rows
from .objective import Objective

Tensor = torch.Tensor
OnToken = Callable[[], None]


class ReconstructionObjective(Objective):
    """−log f_θ of each token of the context, given the memory and the tokens before it."""

    def token_losses(self, memory: Tensor, rows: ContextRows) -> Tensor:
        head = self.phase.output_head
        if head is not None and not head.trains:
            return self.lean_token_losses(memory, rows)  # which is differentiable twice then
        inputs, places = write_inputs(self._prefixes(memory, rows), rows, self.phase)
        return cross_entropy(rows.of_scored(self.phase.logits(inputs, places)), rows.targets)

    def lean_token_losses(self, memory: Tensor, rows: ContextRows) -> Tensor:
        head = self.phase.output_head
        if head is None:
            return self.token_losses(memory, rows)
        inputs, places = write_inputs(self._prefixes(memory, rows), rows, self.phase)
        hidden = rows.of_scored(self.phase.hidden_states(inputs, places)).to(head.weight.dtype)
        return head_cross_entropy(hidden, head, rows.targets)

    def _prefixes(self, memory: Tensor, rows: ContextRows) -> DecoderInputs:
        return self.phase.prefix(memory).take(rows.sample_index)


def write_inputs(prefix: DecoderInputs, rows: ContextRows, phase: Phase) -> tuple[DecoderInputs, Tensor]:
    """Inputs of the decoder for `[segments before; prefix; segment]`, and where each row token is predicted.

    Args:
        prefix: of the memory of each row.
        rows: the tokens.
        phase: WRITE.

    Returns:
        The inputs, and `(rows, length)`, the position whose logits predict each token.
    """
    inputs = side_by_side([prefix, phase.decoder.tokens(rows.input_ids, rows.attention_mask)])
    cached, length = prefix.cached_length, prefix.length
    if rows.segment_starts is not None:
        mask, positions, places = packed_layout(rows.segment_starts, cached + length, inputs.embeddings.dtype)
        return inputs._replace(attention_mask=mask[:, :, cached:], position_ids=positions[:, cached:]), places - cached
    behind = rows.attention_mask if rows.all_behind_memory else rows.scored
    place = torch.where(behind, 2, torch.where(rows.attention_mask, 0, 3))
    order = torch.cat([place.new_ones(prefix.attention_mask.shape), place], dim=1).argsort(dim=1, stable=True)
    places = order.argsort(dim=1)[:, length:] - 1
    return inputs.reordered(order), places.clamp(min=0)


@torch.no_grad()
def reconstruct(
    phase: Phase, memory: Tensor, before: Tensor, lengths: Tensor, on_token: OnToken | None = None
) -> Tensor:
    """Decode memories greedily under the conditions that they were written in.

    Args:
        phase: WRITE.
        memory: `(batch, num_memory_tokens, width)`.
        before: `(batch, prefix_length)` tokens that the decoded ones follow.
        lengths: `(batch,)` tokens to decode from each.
        on_token: called before each token.

    Returns:
        `(batch, longest)` tokens, 0 beyond a memory's length.

    Raises:
        ValueError: they and what stands before them are longer than the base's window, or what stands before them is
            not one row of the base's tokens for each memory.
    """
    if len(before) != len(memory):
        raise ValueError(
            f"There are {len(before)} rows of prefix_input_ids for {len(memory)} memories. Give one for each: index a "
            "memory by [0, 0] to decode it twice."
        )
    if not len(memory):
        return before.new_empty((0, 0))
    check_vocabulary("prefix_input_ids", before, phase.decoder.vocab_size)
    window, needed = phase.decoder.window, phase.prefix_length + before.shape[1] + int(lengths.max())
    if window is not None and needed > window:
        raise ValueError(
            f"To decode {int(lengths.max()):,} tokens takes {needed:,} positions, but the window of "
            f"{phase.decoder.name} is {window:,}. A memory that this base wrote has no such segment_lengths: write the "
            "context again, or give a shorter prefix."
        )
    decode = _generated if phase.generates and phase.head is None else _one_by_one
    decoded = decode(phase, memory, before, int(lengths.max()), on_token or (lambda: None))
    return decoded.masked_fill(torch.arange(decoded.shape[1], device=before.device) >= lengths[:, None], 0)


class _EachToken(StoppingCriteria):
    """Calls a function behind each token that is generated, and stops at none."""

    def __init__(self, call: OnToken) -> None:
        self.call = call

    def __call__(self, input_ids: Tensor, scores: Any, **_: Any) -> Tensor:
        self.call()
        return torch.zeros(len(input_ids), dtype=torch.bool, device=input_ids.device)


def _generated(phase: Phase, memory: Tensor, before: Tensor, count: int, on_token: OnToken) -> Tensor:
    """The tokens that the base's own, cached generation puts behind memories."""
    rows = whole_rows(before, before.new_empty((len(memory), 0)))
    inputs, _ = write_inputs(phase.prefix(memory), rows, phase)
    with plain_generation(), evaluating(), phase.active():
        return generator(phase.decoder.base_model).generate(
            **generation_arguments(inputs), max_new_tokens=count, stopping_criteria=[_EachToken(on_token)]
        )


def _one_by_one(phase: Phase, memory: Tensor, before: Tensor, count: int, on_token: OnToken) -> Tensor:
    """The same by forward passes, for a base that cannot go on from a memory, and for a head of WRITE's own."""
    decoded, unknown = before.new_empty((len(memory), 0)), before.new_zeros((len(memory), 1))
    prefix = phase.prefix(memory)
    with evaluating():
        for _ in range(count):
            on_token()
            rows = whole_rows(before, torch.cat([decoded, unknown], dim=1))
            logits = phase.logits(*write_inputs(prefix, rows, phase))
            decoded = torch.cat([decoded, logits[:, -1:].argmax(-1)], dim=1)
    return decoded
