"""What a training run of a memory shows in its logs, beside the loss; and when it has to end."""

import math
from abc import ABC, abstractmethod
from typing import Any

import torch
from torch import nn
from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from ..base.asked import ASKED
from ..modeling_gradmem import GradMemForCausalLM, GradMemOutput
from .loss import check_loss_is_the_models


def model_within(model: nn.Module | None) -> GradMemForCausalLM:
    """The GradMem model within what Trainer trains, which may be wrapped."""
    modules = () if model is None else model.modules()
    return next(module for module in modules if isinstance(module, GradMemForCausalLM))


class ObservingCallback(TrainerCallback, ABC):
    """Looks at what the model gives in each forward pass of training."""

    def on_train_begin(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        model: nn.Module | None = None,
        **kwargs: Any,
    ) -> None:
        self._model = model_within(model)
        self._handle = self._model.register_forward_hook(self._observe)

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self._handle.remove()

    @abstractmethod
    def observe(self, output: GradMemOutput) -> None:
        """Look at what a forward pass gave."""

    @torch.no_grad()
    def _observe(self, model: GradMemForCausalLM, arguments: Any, output: Any) -> None:
        if model.training and not ASKED.evaluates and isinstance(output, GradMemOutput):
            self.observe(output)


class WriteLogCallback(ObservingCallback):
    """Adds to each entry of Trainer's log, as means over this process's batches since the entry before it:

    - `read_loss`: the cross-entropy of the answers;
    - `write_loss/k`: the reconstruction loss before step k of WRITE, in nats per token, where something is written;
    - `memory_norm`: the mean norm of a written memory vector, there, too;
    - `step_size/k`: the learned step size of step k, averaged over the memory tokens (its value now).
    """

    def __init__(self) -> None:
        self._sums: dict[str, torch.Tensor] = {}
        self._counts: dict[str, int] = {}

    def observe(self, output: GradMemOutput) -> None:
        if output.read_loss is not None:
            self._add("read_loss", output.read_loss.detach())
        if output.write_losses is None or output.memory is None:  # nothing was written
            return
        self._add("memory_norm", output.memory.embeddings.detach().norm(dim=-1).mean())
        for step, loss in enumerate(output.write_losses.detach().mean(0)):
            self._add(f"write_loss/{step}", loss)

    def _add(self, name: str, value: torch.Tensor) -> None:
        self._sums[name] = self._sums.get(name, 0) + value
        self._counts[name] = self._counts.get(name, 0) + 1

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        if not logs or "loss" not in logs or not self._counts:
            return
        values = {name: float(total) / self._counts[name] for name, total in sorted(self._sums.items())}
        if self._model.write_log_learning_rate is not None:
            sizes = self._model.write_log_learning_rate.detach().exp().float()
            sizes = sizes.mean(1) if sizes.dim() == 2 else sizes
            values |= {f"step_size/{step}": float(size) for step, size in enumerate(sizes)}
        values = {name: value for name, value in values.items() if math.isfinite(value)}
        logs.update(values)
        if state.log_history:
            state.log_history[-1].update(values)
        self._sums, self._counts = {}, {}


class DivergenceCallback(ObservingCallback):
    """Ends a run whose loss or weights are no numbers any more, before they are saved.

    Raises:
        FloatingPointError: they are not; names the step, and what to lower.
    """

    def __init__(self) -> None:
        self._finite: torch.Tensor | None = None

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        # Under float16 a step whose loss overflows is not taken, and its scale is lowered.
        diverged = self._finite is not None and not args.fp16 and not self._finite
        self._finite = None
        if not diverged and (control.should_save or state.global_step >= state.max_steps):
            diverged = not all(part.isfinite().all() for part in self._model.parameters() if part.requires_grad)
        if diverged:
            raise diverged_at(state.global_step)

    def observe(self, output: GradMemOutput) -> None:
        if output.loss is not None:
            finite = output.loss.detach().isfinite()
            self._finite = finite if self._finite is None else self._finite & finite


def diverged_at(step: int) -> FloatingPointError:
    """What is raised where the numbers of a run are lost."""
    return FloatingPointError(
        f"Training diverged: by step {step} its loss or weights are NaN or infinite. Lower learning_rate, "
        "and step_size_learning_rate, muon_learning_rate or gradmem.write_learning_rate where they are "
        "set; or give max_grad_norm or warmup_steps."
    )


def log_writes(trainer: Trainer) -> WriteLogCallback:
    """Give a trainer a [`WriteLogCallback`], before the callbacks that print and plot, so that they have its values.

    Raises:
        ValueError: `label_smoothing_factor` is set, which goes past the model's loss.
    """
    check_loss_is_the_models(trainer.args)
    callback = WriteLogCallback()
    trainer.callback_handler.callbacks.insert(0, callback)
    return callback
