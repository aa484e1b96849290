"""WRITE and READ as objects: which vectors stand around a memory, which LoRA is on, and which head makes the logits."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedTokenizerBase
from transformers import initialization as init

from ..base.decoder import Decoder
from ..base.layout import reorder
from ..base.lora import check_owner, inject_lora, lora_parameters, lora_phase
from ..base.modes import layers_recomputed, settled
from ..base.output_head import OutputHead
from ..base.running import DecoderInputs, side_by_side
from ..template import get_template, leading_tokens, places_memory
from .fingerprint import Identity, check_memory
from .form import MemoryForm
from .written import GradMemMemory, Memories

Tensor = torch.Tensor


class Phase:
    """Runs the base under the conditions of one phase.

    It reads its parameters from the model when they are used and keeps no tensor.

    Args:
        name: `"write"` or `"read"`.
        module: the model, which the parameters of the phase are registered on: `{name}_start` and `{name}_end`, and
            the head and the LoRA of the phase if it has them.
        decoder: the base.
        form: of the memory.

    Attributes:
        prompt: words between the memory and what follows it; the writer sets them, in WRITE.
    """

    prompt = ""

    # The model is `Any`: its parameters are set and read by name, which no type of a module knows.
    def __init__(self, name: str, module: Any, decoder: Decoder, form: MemoryForm) -> None:
        self.name, self.module, self.decoder, self.form = name, module, decoder, form
        self._words: tuple[Any, Any, list[int]] | None = None  # the setting and the tokenizer that they are of first
        count = form.num_control_tokens
        for vectors in self.control_vectors:
            empty = torch.empty((count, form.hidden_size), **form.like) if count else None
            setattr(module, vectors, None if empty is None else nn.Parameter(empty))

    @property
    def control_vectors(self) -> list[str]:
        """Names of the parameters on either side of the memory."""
        return [f"{self.name}_start", f"{self.name}_end"]

    @property
    def _head_name(self) -> str:
        return f"{self.name}_head"

    @property
    def head(self) -> nn.Linear | None:
        """An output head of this phase alone."""
        return getattr(self.module, self._head_name, None)

    def add_head(self) -> None:
        """Give the phase an output head of its own.

        Raises:
            ValueError: the base has no linear head to start it from.
        """
        weight = getattr(self.decoder.base_model.get_output_embeddings(), "weight", None)
        if weight is None or weight.dim() != 2:
            raise ValueError(
                f"{self._head_name}=True needs a base with a linear output head, which {self.decoder.name} does not "
                f"have. Use {self._head_name}=False."
            )
        head = nn.Linear(weight.shape[1], weight.shape[0], bias=False, **self.form.like)
        setattr(self.module, self._head_name, head)

    def init_module(self, module: nn.Module) -> None:
        """Give a module of the model its first values if it is the phase's head: those of the base's."""
        if self.head is not None and module is self.head:
            init.copy_(self.head.weight, self.decoder.base_model.get_output_embeddings().weight)

    def resize_head(self) -> None:
        """Give the head the base's vocabulary: it keeps its rows and takes the base's new ones."""
        if self.head is None:
            return
        own = self.head.weight
        weight = self.decoder.base_model.get_output_embeddings().weight.detach().to(own).clone()
        kept = min(weight.shape[0], own.shape[0])
        weight[:kept] = own.detach()[:kept]
        self.head.weight = nn.Parameter(weight, requires_grad=own.requires_grad)
        self.head.out_features = weight.shape[0]

    def add_lora(self, arguments: dict[str, Any]) -> None:
        """Give the phase a LoRA of its own; `arguments` are those of a `peft.LoraConfig`."""
        inject_lora(self.decoder.base_model, arguments, self.name, self.form.like["dtype"])

    def own_parameters(self) -> list[nn.Parameter]:
        """Those that no other phase runs with: its control vectors, its head and its LoRA."""
        vectors = [getattr(self.module, name) for name in self.control_vectors]
        head = [] if self.head is None else list(self.head.parameters())
        lora = [parameter for _, parameter in lora_parameters(self.decoder.base_model, self.name)]
        return [vector for vector in vectors if vector is not None] + head + lora

    def check(self) -> None:
        """Refuse a head that does not fit the base; called once the base has its weights.

        Raises:
            ValueError: the base's logits are no linear function of its last hidden state.
        """
        if self.head is not None and not self.decoder.head_is_linear:
            raise ValueError(
                f"{self._head_name}=True needs a base whose logits are a linear head on its last hidden state, which "
                f"those of {self.decoder.name} are not. Use {self._head_name}=False."
            )

    def check_trainable(self) -> None:
        """Refuse layers that would be recomputed outside the phase, or that drop the cache in which a memory stands.

        Raises:
            ValueError: the base is under activation checkpointing.
        """
        base_model = self.decoder.base_model
        if not any(module.training for module in layers_recomputed(base_model)):
            return
        if any(True for _ in lora_parameters(base_model, self.name)):
            reason = "recomputes its layers after the phase in which write_lora or read_lora was on"
        elif self.form.in_cache:
            reason = 'runs its layers without a cache, in which a memory of memory_form="key_values" stands'
        else:
            return
        raise ValueError(
            f"The base's activation (gradient) checkpointing {reason}. Disable it on the base; "
            "checkpoint_write_steps=True saves WRITE's memory."
        )

    @contextmanager
    def active(self) -> Iterator[None]:
        """A run of the base with the LoRA of this phase, and no other."""
        base_model = self.decoder.base_model
        with lora_phase(self.name, base_model, self.module), settled(base_model):
            yield

    @property
    def header_ids(self) -> list[int]:
        """The tokens that the template of the model's configuration puts before the memory, in READ alone."""
        template = self.module.config.template
        if self.name != "read" or not places_memory(template):
            return []

        def header(tokenizer: PreTrainedTokenizerBase) -> list[int]:
            words = get_template(template, tokenizer).header
            return [*leading_tokens(tokenizer), *tokenizer(words, add_special_tokens=False).input_ids]

        return self._kept(template, header)

    @property
    def prompt_ids(self) -> list[int]:
        """The tokens of [`prompt`]."""
        words = self.prompt
        if not words:
            return []
        return self._kept(words, lambda tokenizer: tokenizer(words, add_special_tokens=False).input_ids)

    def _kept(self, setting: Any, make: Callable[[PreTrainedTokenizerBase], list[int]]) -> list[int]:
        """Words as tokens, made anew where the setting or the tokenizer is another: no phase has two sorts of words."""
        tokenizer = self.module.tokenizer
        if self._words is None or self._words[0] != setting or self._words[1] is not tokenizer:
            self._words = setting, tokenizer, make(tokenizer)
        return self._words[2]

    @property
    def prefix_length(self) -> int:
        """Positions before a context or a query: those of the memory, and of the words on either side of it."""
        return self.form.prefix_length + len(self.header_ids) + len(self.prompt_ids)

    def room(self, memories: int = 1) -> int | None:
        """Most tokens behind so many memories side by side: those that the base's window has room for.

        `None` where the base sets no limit; below 0 where the memories alone are too many.
        """
        window = self.decoder.window
        return None if window is None else window - self.prefix_length - (memories - 1) * self.form.num_memory_tokens

    def told_room(self, room: int) -> str:
        """What leaves a query so much [`room`], for an error."""
        return (
            f"of the {self.decoder.window} positions that are the window of {self.decoder.name}, memory, control "
            f"tokens and words beside them leave {room}"
        )

    def memories_in(self, memory: Tensor) -> int:
        """How many memories stand side by side in each of `(batch, k · num_memory_tokens, width)`."""
        return memory.shape[1] // self.form.num_memory_tokens

    @property
    def generates(self) -> bool:
        """Whether the base's own `generate` follows its forward pass behind memories of this form, without padding."""
        return self.decoder.generates_from_cache if self.form.in_cache else self.decoder.generates_from_embeddings

    def memory_to_read(self, memory: Memories, identity: Callable[[], Identity]) -> GradMemMemory:
        """A memory, or several side by side, that this phase can be given.

        Args:
            memory: one, or a list of them.
            identity: gives that of the model.

        Raises:
            TypeError: it is no memory.
            ValueError: it is of another model, or several, which the form or the base's window does not take.
        """
        joined = GradMemMemory.side_by_side(memory) if isinstance(memory, list | tuple) else memory
        check_memory(joined, self.form.shape, identity, several=True)
        count = self.memories_in(joined.embeddings)
        if count == 1:
            return joined
        if not self.form.reads_several:
            raise ValueError(f"Memories of the form {type(self.form).__name__} are read one at a time, got {count}.")
        window, room = self.decoder.window, self.room(count)
        if window is not None and room is not None and room < 1:
            raise ValueError(
                f"{count} memories together take {window - room} positions of the {window} that are the window of "
                f"{self.decoder.name}: no room is left for a question. Read fewer of them."
            )
        if self.form.in_cache and not self.decoder.keeps_in_cache(joined.shape[1]):
            raise ValueError(
                f"{count} memories together are {joined.shape[1]} positions in the cache of {self.decoder.name}, which "
                "has a sliding window and does not keep as many. Read fewer of them."
            )
        return joined

    def prefix(self, memory: Tensor) -> DecoderInputs:
        """What the decoder is given for memories `(batch, num_memory_tokens, width)`, a row for each.

        In READ also for several side by side, `(batch, k · num_memory_tokens, width)`.

        Raises:
            ValueError: words are to stand before a memory that stands in the cache, before everything else.
        """
        prefix = self.form.prefix(memory, *(getattr(self.module, name) for name in self.control_vectors))
        header, prompt = self.header(len(memory)), self.prompt_ids
        if header and prefix.past is not None:
            raise ValueError(
                f"The template {self.module.config.template!r} puts words before the memory, and a memory of this form "
                "stands before everything else. Use a template without {memory}, such as 'chat'."
            )
        parts = [*header, prefix, *self._of_each(prompt, len(memory))]
        return side_by_side(parts) if len(parts) > 1 else prefix

    def header(self, rows: int) -> list[DecoderInputs]:
        """The words before a memory as inputs of so many rows; none where there are none."""
        return self._of_each(self.header_ids, rows)

    def before_context(self, rows: int) -> list[DecoderInputs]:
        """What begins a prompt: the words before a memory, or what the tokenizer begins texts with."""
        try:
            return self._of_each(self.header_ids or leading_tokens(self.module.tokenizer), rows)
        except (ValueError, OSError):  # there is no tokenizer, or none any more: a model of tokens alone
            return []

    def _of_each(self, words: list[int], rows: int) -> list[DecoderInputs]:
        """The same tokens for each of the rows, if there are any."""
        ids = torch.tensor([words], device=self.decoder.device).expand(rows, -1)
        return [self.decoder.tokens(ids, torch.ones_like(ids, dtype=torch.bool))] if words else []

    def logits(self, inputs: DecoderInputs, places: Tensor | None = None) -> Tensor:
        """Logits `(rows, length, vocab)` under this phase's head and LoRA.

        Args:
            inputs: what to run on.
            places: `(rows, length)`, the positions to give the logits of; all of them by default.
        """
        if self.head is not None:
            return self.head(self.hidden_states(inputs, places).to(self.head.weight.dtype))
        with self.active():
            logits = self.decoder.logits(inputs)
            return logits if places is None else reorder(logits, places)

    def hidden_states(self, inputs: DecoderInputs, places: Tensor | None = None) -> Tensor:
        """What the logits are made from, `(rows, length, hidden_size)`; likewise."""
        with self.active():
            hidden = self.decoder.hidden_states(inputs)
            return hidden if places is None else reorder(hidden, places)

    @property
    def output_head(self) -> OutputHead | None:
        """The head, where it and the hidden states alone make the logits; otherwise `None`."""
        return self.decoder.output_head if self.head is None else OutputHead(self.head.weight)

    def extra_tensors(self) -> dict[str, Tensor]:
        """What the phase uses beside the base, the form's part left out, by the names that checkpoints have for it."""
        check_owner(self.decoder.base_model, self.module)
        tensors: dict[str, Tensor] = dict(lora_parameters(self.decoder.base_model, self.name))
        control = {name: getattr(self.module, name) for name in self.control_vectors}
        if self.head is not None:
            tensors[f"{self._head_name}.weight"] = self.head.weight
        return tensors | {name: tensor for name, tensor in control.items() if tensor is not None}
