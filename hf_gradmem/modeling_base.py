"""A `PreTrainedModel` that stands in for the one inside it: embeddings, precision, modes and generation settings."""

from collections.abc import Callable, Iterator
from typing import Any, NoReturn, Self, cast

import torch
from torch import nn
from transformers import GenerationConfig, PreTrainedModel

from .base.decoder import Decoder
from .base.lora import base_keys, lora_modules, lora_only_modules
from .base.modes import generator
from .base.running import embedding_weight


class ModelAroundBase(PreTrainedModel):
    """Answers for its base, and keeps what is beside the base apart from it; a subclass sets `base_model`.

    Attributes:
        decoder: the base as this package runs it; a subclass sets it.
    """

    decoder: Decoder

    def post_init(self) -> None:
        """As usual; what is beside the base keeps its precision when the base is loaded in half precision."""
        own = [*self.named_parameters(recurse=False), *self.named_children()]
        self._keep_in_fp32_modules_strict = {name for name, _ in own} - {"base_model"}
        super().post_init()

    @property
    def base_model(self) -> PreTrainedModel:
        """The decoder; `PreTrainedModel.base_model` would look it up by a prefix."""
        return cast(PreTrainedModel, self._modules["base_model"])

    @base_model.setter
    def base_model(self, value: PreTrainedModel) -> None:
        """`nn.Module` registers a module that is set before it looks for a property."""

    @property
    def dtype(self) -> torch.dtype:
        """That of the base; memories and the parameters beside the base are float32 or float64."""
        return self.base_model.dtype

    @property
    def device(self) -> torch.device:
        """Where the base takes its input."""
        return embedding_weight(self.base_model).device

    @property
    def vocab_size(self) -> int:
        """Rows of the base's token embedding."""
        return self.decoder.vocab_size

    @property
    def generation_config(self) -> GenerationConfig:
        """The base's."""
        return generator(self.base_model).generation_config

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

    def train(self, mode: bool = True) -> Self:
        """As usual, but a base with nothing to train stays in eval mode: its dropout would only add noise."""
        super().train(mode)
        if not self._trains_base():
            self.base_model.eval()
            for module in lora_only_modules(self.base_model):
                module.train(mode)
        return self

    def add_adapter(self, *arguments: Any, **options: Any) -> NoReturn:
        """Refuse Transformers' own adapters: a save would keep them alone, and no memory."""
        raise ValueError(
            "An adapter inside a GradMem would take the place of its memory on saving. read_lora and write_lora of its "
            "configuration give a LoRA; peft.get_peft_model wraps a model that has neither."
        )

    def load_adapter(self, *arguments: Any, **options: Any) -> NoReturn:
        """Likewise."""
        self.add_adapter()

    def _trains_base(self) -> bool:
        base = base_keys(self)
        return any(parameter.requires_grad for name, parameter in self.named_parameters() if name in base)

    def _apply(self, fn: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True) -> Self:
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
        total = sum(parameter.numel() for parameter in self.parameters())
        trains = sum(parameter.numel() for parameter in self.parameters() if parameter.requires_grad)
        print(f"trainable params: {trains:,d} || all params: {total:,d} || trainable%: {100 * trains / total:.4f}")


__all__ = ["ModelAroundBase"]
