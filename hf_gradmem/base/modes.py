"""Modes of the base and its weights for a span of code, each restored afterwards."""

from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn
from transformers import GenerationConfig, PreTrainedModel


@contextmanager
def plain_generation(base_model: PreTrainedModel) -> Iterator[None]:
    """The base's `generate` as plain greedy decoding, with nothing in its configuration that stops or bends it."""
    settings = base_model.generation_config
    base_model.generation_config = GenerationConfig(do_sample=False)
    try:
        yield
    finally:
        base_model.generation_config = settings


@contextmanager
def modules_in_eval(model: nn.Module) -> Iterator[None]:
    """Eval mode for a span, each module back in its own mode afterwards."""
    training = [module for module in model.modules() if module.training]
    for module in training:
        module.training = False
    try:
        yield
    finally:
        for module in training:
            module.training = True


@contextmanager
def weights_frozen(module: nn.Module) -> Iterator[None]:
    """No weight of `module` requires a gradient for a span; those that did require it again afterwards."""
    trainable = [parameter for parameter in module.parameters() if parameter.requires_grad]
    for parameter in trainable:
        parameter.requires_grad_(False)
    try:
        yield
    finally:
        for parameter in trainable:
            parameter.requires_grad_(True)
