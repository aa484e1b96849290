"""A `PreTrainedModel` around another one: what reaches through to the base, and what the base is kept apart from."""

from collections.abc import Iterator
from typing import Self

import torch
from torch import nn
from transformers import GenerationConfig, PreTrainedModel

from .adapters import lora_modules, lora_only_modules, trainable_summary
from .checkpoint import base_keys


class BaseAccessMixin:
    """The part of [`GradMemForCausalLM`] that stands in for its base."""

    @property
    def base_model(self) -> PreTrainedModel:
        """The decoder; `PreTrainedModel.base_model` would look it up by a prefix."""
        return self._modules["base_model"]

    @property
    def dtype(self) -> torch.dtype:
        """That of the base; memories and the parameters beside the base are float32 or float64."""
        return self.base_model.dtype

    @property
    def device(self) -> torch.device:
        """Where the base takes its input."""
        return self.base_model.get_input_embeddings().weight.device

    @property
    def vocab_size(self) -> int:
        """Rows of the base's token embedding."""
        return self.decoder.vocab_size

    @property
    def generation_config(self) -> GenerationConfig:
        """The base's."""
        return self.base_model.generation_config

    @generation_config.setter
    def generation_config(self, value: GenerationConfig) -> None:
        if "base_model" in self._modules:  # PreTrainedModel.__init__ sets one before there is a base
            self.base_model.generation_config = value

    def get_input_embeddings(self) -> nn.Module:
        return self.base_model.get_input_embeddings()

    def set_input_embeddings(self, value: nn.Module) -> None:
        self.base_model.set_input_embeddings(value)

    def get_output_embeddings(self) -> nn.Module | None:
        return self.base_model.get_output_embeddings()

    def set_output_embeddings(self, new_embeddings: nn.Module) -> None:
        self.base_model.set_output_embeddings(new_embeddings)

    def get_decoder(self) -> nn.Module:
        return self.base_model.get_decoder()

    def resize_token_embeddings(
        self, new_num_tokens: int | None = None, pad_to_multiple_of: int | None = None, mean_resizing: bool = True
    ) -> nn.Module:
        """Resize the base's vocabulary, and the write head with it: it keeps its rows and takes the base's new ones.

        The base is then no longer the one its name stands for, so checkpoints include it from here on.
        """
        before = self.decoder.vocab_size
        embeddings = self.base_model.resize_token_embeddings(new_num_tokens, pad_to_multiple_of, mean_resizing)
        self.config.includes_base = self.config.includes_base or self.decoder.vocab_size != before
        self.config.text_config = self.base_model.config
        if self.write_head is not None:
            weight = self.base_model.get_output_embeddings().weight.detach().to(self.write_head.weight).clone()
            kept = min(weight.shape[0], self.write_head.weight.shape[0])
            weight[:kept] = self.write_head.weight.detach()[:kept]
            self.write_head.weight = nn.Parameter(weight, requires_grad=self.write_head.weight.requires_grad)
            self.write_head.out_features = weight.shape[0]
        return embeddings

    def train(self, mode: bool = True) -> Self:
        """As usual, but a base with nothing to train stays in eval mode: its dropout would only add noise."""
        super().train(mode)
        base = base_keys(self)
        if not any(parameter.requires_grad for name, parameter in self.named_parameters() if name in base):
            self.base_model.eval()
            for module in lora_only_modules(self.base_model):
                module.train(mode)
        return self

    def _apply(self, fn, recurse: bool = True) -> Self:
        """Casts to half precision reach the base only: memories are sums of small steps."""
        before = [
            (parameter, parameter.data, None if parameter.grad is None else parameter.grad.data)
            for parameter in self._parameters_beside_base()
        ]
        super()._apply(fn, recurse)
        for parameter, data, gradient in before:
            if parameter.dtype in (torch.float16, torch.bfloat16):
                parameter.data = data.to(parameter.device, torch.float32)
                if gradient is not None:
                    parameter.grad = gradient.to(parameter.device, torch.float32)
        return self

    def _parameters_beside_base(self) -> Iterator[nn.Parameter]:
        if "base_model" not in self._modules:
            return
        for name, parameter in self.named_parameters():
            if not name.startswith("base_model."):
                yield parameter
        for module in lora_modules(self.base_model).values():
            yield from module.parameters()

    def print_trainable_parameters(self) -> None:
        """Print how many parameters train, as PEFT models do."""
        print(trainable_summary(self))
