"""The writer by gradient descent: the segments of a context together, or one after the other.

Segments that are written together are a sum over a set, blind to their order. In turn, a later segment is written into
what the earlier ones left, and its gradient corrects what no longer holds: the memory keeps the order of what it was
told. It is as if each segment were appended by a `write` of its own, with the outer loss taken through all of them.
"""

from typing import Any

import torch
from torch import nn
from transformers import initialization as init

from ...memory.phase import Phase
from ..contexts import Contexts
from ..drawn_prompts import WORDS, DrawnPrompts
from ..meta_gradients.meta_gradient import MetaGradient
from ..objectives.objective import Objective
from ..packing import LONGEST_ROW, pack_segments
from ..rows import ContextRows, several_processes
from ..update_rules import UpdateRule
from .inner_loop import InnerLoop
from .writer import Descent, Writer, WriteTrace

Tensor = torch.Tensor


class GradientWriter(Writer):
    """Descends on an objective of the memory, the weights frozen (the paper's WRITE, eq. 3 and 4)."""

    leaves = ("last_loss", "memories", "last_gradient")
    takes_segments = True

    def __init__(
        self,
        phase: Phase,
        *,
        write_steps: int,
        write_learning_rate: float,
        write_loss_reduction: str,
        learn_write_learning_rate: str,
        write_relative_step_size: bool,
        write_step_decay: float,
        write_objective: type[Objective],
        write_optimizer: UpdateRule,
        write_max_grad_norm: float | None,
        write_grad_clip_value: float | None,
        meta_gradient: MetaGradient,
        write_head: bool,
        write_segment_length: int | None,
        write_sentence_segments: bool,
        write_prefix_segments: int,
        write_segments_in_turn: bool,
        write_prompt: str,
    ) -> None:
        self.drawn = DrawnPrompts(write_prompt, phase) if WORDS in write_prompt else None
        super().__init__(phase, write_steps, "" if self.drawn else write_prompt)
        self.write_learning_rate, self.learns_step_sizes = write_learning_rate, learn_write_learning_rate
        self.relative_steps, self.decay = write_relative_step_size, write_step_decay
        self.segment_length, self.prefix_segments = write_segment_length, write_prefix_segments
        self.cuts_sentences = write_sentence_segments
        self.in_turn, self.has_head = write_segments_in_turn, write_head
        self.make_objective, self.meta_gradient = write_objective, meta_gradient
        self.keeps_graph = meta_gradient.keeps_graph
        self.loop = InnerLoop(
            write_optimizer, meta_gradient, write_loss_reduction == "sum", write_max_grad_norm, write_grad_clip_value
        )

    # ------------------------------------------------------------------------------------------------ parameters

    def add_parameters(self) -> None:
        rates: dict[str, tuple[int, ...] | None] = {
            "none": None,
            "per_step": (self.write_steps,),
            "per_token": (self.write_steps, self.phase.form.num_memory_tokens),
        }
        shape, like = rates[self.learns_step_sizes], self.phase.form.like
        self.phase.module.write_log_learning_rate = None if shape is None else nn.Parameter(torch.empty(shape, **like))
        if self.has_head:
            self.phase.add_head()

    def init_parameters(self) -> None:
        rates = self.phase.module.write_log_learning_rate
        if rates is not None:
            init.copy_(rates, self.log_step_sizes(self.write_learning_rate))

    def log_step_sizes(self, write_learning_rate: float) -> Tensor:
        """What learned step sizes begin at, in their shape: log α·dᵏ."""
        rates = self.phase.module.write_log_learning_rate
        sizes = [write_learning_rate * self.decay**step for step in range(len(rates))]
        return torch.tensor(sizes, dtype=torch.float64).log().view(-1, *[1] * (rates.dim() - 1)).expand_as(rates)

    def step_sizes(self, write_steps: int | None, write_learning_rate: float | None) -> list[Tensor | float]:
        """α of each step: a number, or a learned scalar or `(num_memory_tokens, 1)` column; times the start's scale."""
        steps = self.num_steps(write_steps)
        if write_learning_rate is not None and not write_learning_rate > 0:
            raise ValueError(f"write_learning_rate must be greater than 0, got {write_learning_rate}.")
        scale = self.phase.form.start_scale() if self.relative_steps else 1.0
        rates = self.phase.module.write_log_learning_rate
        if write_learning_rate is not None or rates is None:
            sizes: list[Tensor | float] = [write_learning_rate or self.write_learning_rate]
        else:
            sizes = list(rates.exp()[..., None] if rates.dim() == 2 else rates.exp())
        # Each step beyond the last size is `decay` times the one before.
        last = len(sizes) - 1
        return [scale * sizes[min(step, last)] * self.decay ** max(step - last, 0) for step in range(steps)]

    # ------------------------------------------------------------------------------------------------ writing

    def rows(self, contexts: Contexts) -> ContextRows:
        rows = self._split(
            contexts,
            "Give the context in segments (hf_gradmem.cut_text makes them), or set write_segment_length.",
            segment_length=self.segment_length,
            prefix_segments=self.prefix_segments,
        )
        return rows if self.drawn is None else self.drawn.before(rows, 0)

    def objective(self, rows: ContextRows) -> Objective:
        """The loss of these rows, with segments of one context in one row where the base keeps them apart."""
        objective = self.make_objective(self._packed(rows), self.phase)
        objective.drawn = self.drawn
        return objective

    def positions_of(self, length: int) -> int:
        drawn = 0 if self.drawn is None else self.drawn.num_own_tokens + length  # at most as many words as there are
        return super().positions_of(length) + drawn

    @property
    def room(self) -> int | None:
        room = super().room
        return room if room is None or self.drawn is None else room // 2  # of which the drawn words take the other half

    def turns(self, rows: ContextRows) -> int:
        return rows.num_turns if self.in_turn else 1

    def write(self, rows: ContextRows, memory: Tensor, descent: Descent) -> WriteTrace:
        if self.turns(rows) == 1:
            return self.loop.run(self.objective(rows), memory, descent)
        traces = []
        for contexts, segment in rows.turns():
            trace = self.loop.run(self.objective(segment), memory[contexts], descent)
            memory = memory.index_copy(0, contexts, trace.memory)
            traces.append((contexts, segment.num_tokens, trace))
        return _joined(traces, memory)

    def check_trainable(self) -> None:
        self.phase.check_trainable()
        self.meta_gradient.check_trainable()

    def compile(self, *arguments: Any, **options: Any) -> bool:
        return self.meta_gradient.compile(*arguments, **options)

    def _packed(self, rows: ContextRows) -> ContextRows:
        """Segments of one context in one row, where nothing is their own before them and the base keeps them apart."""
        if self.prefix_segments or self.drawn or (rows.num_turns == 1 and not several_processes()):
            return rows
        prefix_length, decoder = self.phase.prefix_length, self.phase.decoder
        longest = min(LONGEST_ROW, (decoder.window or LONGEST_ROW + prefix_length) - prefix_length)
        # Asked before the rows are looked at: a sharded base needs the same runs in every process.
        if not decoder.keeps_segments_apart(prefix_length, longest):
            return rows
        return pack_segments(rows, prefix_length, longest)


def _joined(traces: list[tuple[Tensor, Tensor, WriteTrace]], memory: Tensor) -> WriteTrace:
    """One trace of what was written in turn: losses are means over a context's tokens.

    The memories and the gradient within a turn are those of one segment, and no part of it.

    Args:
        traces: of each turn: the contexts `(contexts,)` that had a segment, its tokens `(contexts,)`, and its trace.
        memory: the last one, `(batch, num_memory_tokens, width)`.
    """

    def mean_over_tokens(values: str) -> Tensor:
        total = share = memory.new_zeros(())
        for contexts, num_tokens, trace in traces:
            of_segment = getattr(trace, values)
            taken = ~of_segment.detach().isnan()  # a segment that stopped early has no loss at later steps
            shape = (len(memory), *of_segment.shape[1:])
            tokens = num_tokens.view(-1, *[1] * (of_segment.dim() - 1)) * taken
            total = total + memory.new_zeros(shape).index_copy(0, contexts, of_segment.where(taken, 0) * tokens)
            share = share + memory.new_zeros(shape).index_copy(0, contexts, tokens.to(memory.dtype))
        return total / share

    return WriteTrace(
        memory=memory,
        losses=mean_over_tokens("losses"),
        last_loss=None if traces[0][2].last_loss is None else mean_over_tokens("last_loss"),
    )
