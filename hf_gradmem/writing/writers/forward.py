"""The forward-only memory writer, a recurrent memory transformer (RMT): the baseline under the same interface.

The decoder reads `[w_start; P(M); w_end; context; P(M)]`, and its last hidden states at the trailing copy are the next
memory. Re-reading the context K times is the counterpart of K gradient steps (the paper's forward-only writer).
"""

from dataclasses import replace

import torch
from torch.utils.checkpoint import checkpoint

from ...base.layout import token_order
from ...base.running import side_by_side
from ...memory.phase import Phase
from ..contexts import Contexts
from ..meta_gradients.replay import Conditions
from ..rows import ContextRows
from .writer import Descent, Writer, WriteTrace

Tensor = torch.Tensor
_NO_GRADIENT_STEP = 'writer="forward" takes no gradient step: it has no write_learning_rate or tolerance.'


class ForwardWriter(Writer):
    """Reads the context whole, `write_steps` times, each time with the memory that the reading before it left."""

    leaves = ("memories",)

    def __init__(self, phase: Phase, *, write_steps: int, checkpoint_write_steps: bool) -> None:
        super().__init__(phase, write_steps)
        if not phase.form.holds_vectors:
            raise ValueError(
                'writer="forward" reads vectors back from the decoder, and memory_form="key_values" holds none. Use '
                'memory_form="input_vectors".'
            )
        self.keeps_graph = not checkpoint_write_steps

    def rows(self, contexts: Contexts) -> ContextRows:
        return self._split(replace(contexts, segment_ids=None), "Shorten it.")

    def positions_of(self, length: int) -> int:
        return super().positions_of(length) + self.phase.form.num_memory_tokens  # its copy

    def step_sizes(self, write_steps: int | None, write_learning_rate: float | None) -> list[Tensor | float]:
        if write_learning_rate is not None:
            raise ValueError(_NO_GRADIENT_STEP)
        return [0.0] * self.num_steps(write_steps)

    def write(self, rows: ContextRows, memory: Tensor, descent: Descent) -> WriteTrace:
        """Losses are NaN: none is minimised here."""
        if descent.tolerance is not None:
            raise ValueError(_NO_GRADIENT_STEP)
        steps = len(descent.step_sizes)
        nothing = memory.new_full((memory.shape[0], steps), torch.nan)
        memories = [memory]
        with torch.set_grad_enabled(descent.differentiate):
            for step in range(steps):
                if descent.differentiate and not self.keeps_graph:
                    memory = self._checkpointed(rows, memory)
                else:
                    memory = self._read_back(rows, memory)
                memories.append(memory)
                descent.on_step(nothing[:, step])
        kept = memories if "memories" in descent.keep else ()
        return WriteTrace(memory=memory, losses=nothing, last_loss=None, memories=kept)

    def check_trainable(self) -> None:
        self.phase.check_trainable()

    def _checkpointed(self, rows: ContextRows, memory: Tensor) -> Tensor:
        conditions = Conditions(memory)
        return checkpoint(
            self._read_back,
            rows,
            memory,
            use_reentrant=False,
            preserve_rng_state=False,  # which is the process's, where other threads draw as well
            context_fn=lambda: (conditions.now(), conditions.again()),
        )

    def _read_back(self, rows: ContextRows, memory: Tensor) -> Tensor:
        """The decoder's last hidden states at a copy of the memory behind the context."""
        phase = self.phase
        inputs = side_by_side(
            [
                phase.prefix(memory),
                phase.decoder.tokens(rows.input_ids, rows.attention_mask),
                phase.form.prefix(memory, None, None),
            ]
        )
        order = token_order(inputs.attention_mask, "right")
        hidden = phase.hidden_states(inputs.reordered(order), order.argsort(dim=1))
        return hidden[:, -memory.shape[1] :].to(memory.dtype)
