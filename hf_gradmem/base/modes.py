"""Modes of the base and its weights for a span of code, in one thread and without a change that another one sees.

The base's modules have one mode for all threads, so it is switched for the length of a run and under a lock, and only
where there is something to switch. No backward pass is run under that lock: on an accelerator, one worker takes those
of all threads, and a step that is run again in one of them waits for the lock.
"""

import copy
import threading
from collections.abc import Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from typing import Any

import torch
from peft.tuners.lora.layer import ParamWrapper
from torch import nn
from torch.overrides import TorchFunctionMode
from transformers import GenerationConfig, PreTrainedModel

from .asked import ASKED, asking
from .short_attention import ShortAttentionInFloat32, computes_in_half_on_cpu

# Attention made of plain tensor operations, or of PyTorch's SDPA, which can be held to them.
_TWICE_DIFFERENTIABLE = ("eager", "sdpa", None)
# One for all models: random numbers and the compiler's stance are those of the process.
_SWITCHING = threading.RLock()


def generator(base_model: PreTrainedModel) -> Any:  # the type of PreTrainedModel does not have `generate`
    """The base, for its `generate` and its generation configuration as this thread asks for them."""
    if not ASKED.generates_plainly:
        return base_model
    plain: Any = copy.copy(base_model)  # with all of the base in it but the configuration
    plain.generation_config = GenerationConfig(do_sample=False)
    return plain


def plain_generation() -> AbstractContextManager[None]:
    """For a span, [`generator`] decodes greedily, with nothing in the base's configuration that stops or bends it."""
    return asking(generates_plainly=True)


def evaluating() -> AbstractContextManager[None]:
    """For a span, this thread's runs of any base are in eval mode; no module's own mode changes that others see."""
    return asking(evaluates=True)


@contextmanager
def settled(base_model: PreTrainedModel) -> Iterator[None]:
    """One run of the base, under what this thread asks for.

    Runs share the base freely where none of them could switch anything in it. Otherwise each has it alone.
    """
    if ASKED.settled:  # nothing is left to switch, which a trace could not follow
        yield
        return
    with ExitStack() as stack:
        stack.enter_context(_SWITCHING)  # so that what is looked at is the base's own state
        modules = list(base_model.modules())
        if _may_be_switched(base_model, modules):
            stack.enter_context(_switched(base_model, modules))
        else:
            stack.close()
        if computes_in_half_on_cpu(base_model) and (ASKED.evaluates or not layers_recomputed(base_model)):
            stack.enter_context(ShortAttentionInFloat32())
        stack.enter_context(asking(settled=True))
        yield


def _may_be_switched(base_model: PreTrainedModel, modules: list[nn.Module]) -> bool:
    return (
        ASKED.uncompiled
        or ASKED.random_numbers is not None
        or base_model.config._attn_implementation not in _TWICE_DIFFERENTIABLE
        # PEFT puts the LoRA of a bare parameter into its module for a run.
        or any(module.training or isinstance(module, ParamWrapper) for module in modules)
        or bool(layers_recomputed(base_model))
    )


@contextmanager
def _switched(base_model: PreTrainedModel, modules: list[nn.Module]) -> Iterator[None]:
    """The base as this thread asks for it, for a span in which no other thread runs it."""
    training = [module for module in modules if ASKED.evaluates and module.training]
    # For what has no backward pass the layers would do without the cache, in which a memory may stand.
    in_vain = not ASKED.recomputes or not torch.is_grad_enabled()
    recomputed = layers_recomputed(base_model) if ASKED.evaluates or ASKED.twice_differentiable or in_vain else []
    chosen = base_model.config._attn_implementation
    replace = ASKED.twice_differentiable and chosen not in _TWICE_DIFFERENTIABLE
    with ExitStack() as stack:
        if ASKED.uncompiled:
            stack.enter_context(torch.compiler.set_stance("force_eager"))
        if ASKED.random_numbers is not None:
            stack.enter_context(ASKED.random_numbers())
        try:
            if replace:
                base_model.set_attn_implementation("eager")
            for module in training:
                module.training = False
            for module in recomputed:  # the type of `nn.Module` knows no attributes but tensors and modules
                module.gradient_checkpointing = False  # type: ignore[assignment]
            yield
        finally:
            for module in training:
                module.training = True
            for module in recomputed:
                module.gradient_checkpointing = True  # type: ignore[assignment]
            if replace:
                base_model.set_attn_implementation(chosen)


def layers_recomputed(base_model: nn.Module) -> list[nn.Module]:
    """The base's modules that are under activation checkpointing."""
    return [module for module in base_model.modules() if getattr(module, "gradient_checkpointing", False)]


def makes_constants(base_model: nn.Module, *vectors: torch.Tensor) -> bool:
    """Whether what this thread's runs of the base make of these vectors is the same each time, without a gradient."""
    if ASKED.phase is not None or torch.compiler.is_compiling() or torch.is_autocast_enabled():
        return False
    if base_model.training and not ASKED.evaluates:  # it may draw random numbers
        return False
    constant = ASKED.freezes_weights or not torch.is_grad_enabled()
    return constant or not any(weight.requires_grad for weight in (*vectors, *base_model.parameters()))


@contextmanager
def weights_frozen(*modules: nn.Module | None) -> Iterator[None]:
    """For a span, this thread's operations take each weight of the modules as a constant.

    Nothing is then kept for the gradient of one. `requires_grad` is left alone: another thread may train them.
    Not under activation checkpointing: layers that keep nothing are run again outside the span, and must be as in it.
    """
    given = [module for module in modules if module is not None]
    if not ASKED.evaluates and any(map(layers_recomputed, given)):
        yield
        return
    trained = any(weight.requires_grad for module in given for weight in module.parameters())
    with asking(freezes_weights=True), _WeightsAsConstants() if trained else nullcontext():
        yield


class _WeightsAsConstants(TorchFunctionMode):
    def __torch_function__(self, function: Any, types: Any, arguments: tuple = (), options: dict | None = None) -> Any:
        if options:
            options = {name: _constant(value) for name, value in options.items()}
        return function(*map(_constant, arguments), **(options or {}))


def _constant(value: Any) -> Any:
    if isinstance(value, nn.Parameter):
        return value.detach()
    if type(value) in (list, tuple):
        return type(value)(map(_constant, value))
    return value
