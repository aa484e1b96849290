"""`model.compile()`: what of a model is compiled, and how `torch.compile(model)` comes to the same."""

import functools
from collections.abc import Callable
from typing import Any

import torch

from .adapters import lora_phase
from .writing.compiled import CompiledLossAndGradient, LossAndGradient, loss_and_gradient


def compiled_in_parts(forward: Callable) -> Callable:
    """Have `torch.compile(model)` do what `model.compile()` does: as one graph, WRITE has no second derivative."""

    @torch.compiler.disable
    def compile_and_run(model: "CompilationMixin", *args: Any, **kwargs: Any) -> Any:
        if not model._compiled:
            model.compile()
        return forward(model, *args, **kwargs)

    @functools.wraps(forward)
    def run(model: "CompilationMixin", *args: Any, **kwargs: Any) -> Any:
        return (compile_and_run if torch.compiler.is_compiling() else forward)(model, *args, **kwargs)

    return run


class CompilationMixin:
    """What is compiled, in place of the whole forward pass that `nn.Module.compile` would take."""

    _compiled = False
    _loss_and_gradient: LossAndGradient = staticmethod(loss_and_gradient)

    def compile(self, *args: Any, **kwargs: Any) -> None:
        """Compile, in place, what training spends its time on; the results are the same but for rounding.

        With `meta_gradient="exact"` that is WRITE's step together with its gradient; `write` and `generate` go on as
        before. It is compiled when it first runs, which takes a minute or so, and once more for changing lengths; where
        that fails, a warning says so and training goes on uncompiled. It keeps attention's scores, positions ×
        positions, which the plain step does not from 128 positions on: long contexts need more memory.

        Otherwise it is the base's decoder, for `write` and `generate` as well, as `model.get_decoder().compile()`.

        `torch.compile(model)`, hence `TrainingArguments(torch_compile=True)`, does the same, with the defaults of these
        options.

        Args:
            args, kwargs: of [`torch.compile`].
        """
        self._compiled = True
        if self.config.writer != "gradient" or self.config.meta_gradient != "exact":
            self.get_decoder().compile(*args, **kwargs)
            return
        self.decoder.probe()
        self._loss_and_gradient = CompiledLossAndGradient(lambda: lora_phase(self.base_model, "write"), *args, **kwargs)

    def __getstate__(self) -> dict[str, Any]:
        """Without what is compiled, as of any module: it belongs to this object and cannot be pickled."""
        return super().__getstate__() | {"_loss_and_gradient": loss_and_gradient, "_compiled": False}
