"""What every writer has to offer, what it is asked for, and what it leaves behind."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch

from ...memory.phase import Phase
from ...texts.sentences import sentences
from ..contexts import Contexts
from ..objectives.objective import Objective
from ..objectives.reconstruction import ReconstructionObjective
from ..rows import ContextRows, split_context

Tensor = torch.Tensor
Kept = Literal["last_loss", "memories", "last_gradient"]


@dataclass(frozen=True)
class Descent:
    """What one write is asked for.

    Attributes:
        step_sizes: α of each step, a number or what broadcasts to `(num_memory_tokens, width)`.
        differentiate: keep what the outer loss needs of the steps. Otherwise every graph is freed at once.
        keep: what of [`WriteTrace`] is asked for beside the memory and the losses. Of `"last_loss"` it is the graph,
            whichever way the steps are differentiated.
        tolerance: stop a sample once its loss is below this.
        on_step: called after each step with the losses `(batch,)` before it, NaN for samples that had stopped.
    """

    step_sizes: Sequence[Tensor | float]
    differentiate: bool = False
    keep: tuple[Kept, ...] = ()
    tolerance: float | None = None
    on_step: Callable[[Tensor], object] = lambda losses: None


@dataclass(frozen=True)
class WriteTrace:
    """What a write leaves behind.

    Attributes:
        memory: `(batch, num_memory_tokens, width)`, M_K.
        losses: `(batch, steps)`, each sample's loss before each step; NaN where the sample had already stopped.
        last_loss: `(batch,)`, L(M_{K−1}; C), with its graph if that was asked for; `None` without a step.
        memories: M_0 to M_K, each of the memory's shape, as the steps took them; empty unless they were asked for.
        last_gradient: ∇L(M_{K−1}; C) of the memory's shape, before any clipping, with the graph that the way back gives
            it; `None` without a step, or unless it was asked for.
    """

    memory: Tensor
    losses: Tensor
    last_loss: Tensor | None
    memories: Sequence[Tensor] = ()
    last_gradient: Tensor | None = None


class Writer(ABC):
    """Writes rows of contexts into memories.

    The keyword-only arguments of a writer are the options of [`GradMemConfig`] that it reads.

    Attributes:
        phase: WRITE.
        write_steps: steps that are taken unless another number is asked for.
        keeps_graph: whether the graphs of all steps are alive until the backward pass.
        leaves: what of [`WriteTrace`] a write can leave where it is asked for.
        runs_base: whether it runs the base, from the memory that it is given and under WRITE's LoRA.
        takes_segments: whether a context may come in segments, of which a row holds one and those before it.
        segment_length: tokens that a context of one text is cut into by itself, if it is.
        cuts_sentences: whether a context of one text is cut into its sentences by itself.
        prefix_segments: how many segments stand before each in its row.
    """

    keeps_graph = False
    leaves: tuple[Kept, ...] = ()
    runs_base = True
    takes_segments = False
    segment_length: int | None = None
    cuts_sentences = False
    prefix_segments = 0

    def __init__(self, phase: Phase, write_steps: int, prompt: str = "") -> None:
        self.phase, self.write_steps = phase, write_steps
        phase.prompt = prompt  # or none: the phase may have had a writer before that has one

    @abstractmethod
    def rows(self, contexts: Contexts) -> ContextRows:
        """The rows that contexts, checked, are run as.

        Raises:
            ValueError: one is longer than the base's window.
        """

    def segments(self, texts: Sequence[str]) -> list[str]:
        """A context as it is tokenised: its texts, or, where it is one text and so wanted, that text's sentences."""
        return sentences(texts[0]) if self.cuts_sentences and len(texts) == 1 else list(texts)

    @property
    def cutting(self) -> dict[str, Any]:
        """How a context comes to its segments, as the collator and `tokenize_contexts` take it."""
        return {"cut": self.segments, "segment_length": self.segment_length}

    def positions_of(self, length: int) -> int:
        """Positions that a row with so many tokens of a context takes at most, with all that stands beside them."""
        return self.phase.prefix_length + length

    @property
    def room(self) -> int | None:
        """Most tokens of a context in one row: those for which the base's window has room beside memory and prompt.

        `None` where the base sets no limit.
        """
        window = self.phase.decoder.window
        return None if window is None else window - self.positions_of(0)

    @property
    def longest_segment(self) -> int | None:
        """Most tokens of each segment of a context that is cut: as many fit with the segments that stand before them.

        `None` where the base sets no limit.
        """
        return None if self.room is None else self.room // (1 + self.prefix_segments)

    def num_steps(self, write_steps: int | None) -> int:
        """How many steps to take; `None` stands for the configuration's.

        Raises:
            ValueError: the number is negative.
        """
        steps = self.write_steps if write_steps is None else write_steps
        if steps < 0:
            raise ValueError(f"write_steps must be at least 0, got {steps}.")
        return steps

    @abstractmethod
    def step_sizes(self, write_steps: int | None, write_learning_rate: float | None) -> list[Tensor | float]:
        """α of each step; `None` stands for the configuration's.

        Raises:
            ValueError: a number is out of range, or the writer has no such thing.
        """

    @abstractmethod
    def write(self, rows: ContextRows, memory: Tensor, descent: Descent) -> WriteTrace:
        """Write, from `memory` `(batch, num_memory_tokens, width)`."""

    def objective(self, rows: ContextRows) -> Objective:
        """The loss of these rows as a function of the memory."""
        return ReconstructionObjective(rows, self.phase)

    def turns(self, rows: ContextRows) -> int:
        """How often the steps are taken."""
        return 1

    def add_parameters(self) -> None:
        """Register what the writer learns beside the memory's start on the model, without values."""

    def init_parameters(self) -> None:
        """Give them their first values."""

    def check_trainable(self) -> None:
        """Refuse to train what would silently get no gradient.

        Raises:
            ValueError: says what, and what to do.
        """

    def compile(self, *arguments: Any, **options: Any) -> bool:
        """Compile what a step spends its time on; `False` where nothing but the base itself is worth it."""
        return False

    def _split(self, contexts: Contexts, remedy: str, **cut: Any) -> ContextRows:
        """Cut contexts into rows that fit into the base's window; `cut` is passed on to `split_context`."""
        rows = split_context(contexts.input_ids, contexts.mask, contexts.segment_ids, **cut)
        decoder = self.phase.decoder
        if self.room is not None and rows.input_ids.shape[1] > self.room:
            needed = self.positions_of(rows.input_ids.shape[1])
            raise ValueError(
                f"The longest context row needs {needed} positions (memory, control tokens and prompt included), but "
                f"the window of {decoder.name} is {decoder.window}. {remedy}"
            )
        return rows
