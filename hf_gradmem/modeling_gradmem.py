"""`GradMemForCausalLM`: any Hugging Face decoder with memory tokens that are written by gradient descent.

This file wires the rooms below it: `writing/` turns a context into a memory, `reading.py` lays out memory and query,
`generation.py` generates, `base_access.py` stands in for the base, `saving.py` keeps what was trained.
"""

import copy
import inspect
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from tqdm.auto import tqdm
from transformers import (
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers import initialization as init
from transformers.utils import ModelOutput

from . import checkpoint
from .adapters import inject_lora, lora_phase
from .base_access import BaseAccessMixin
from .compilation import CompilationMixin, compiled_in_parts
from .configuration_gradmem import GradMemConfig
from .decoder import Decoder, modules_in_eval
from .exports import ExportMixin
from .generation import GradMemGenerationMixin
from .hub import loaded_commit
from .inputs import Context, Queries, checked_context, checked_queries, tokenize_contexts
from .memory import GradMemMemory
from .padding import reorder, token_order
from .reading import align_with_query, read_loss
from .saving import SavingMixin
from .writing.attention import layers_recomputed
from .writing.forward_writer import write_forward
from .writing.in_turn import write_in_turn
from .writing.inner_loop import InnerLoop, WriteTrace, is_sharded
from .writing.objective import ContextRows, ReconstructionObjective, several_processes, split_context
from .writing.out_of_memory import IN_EVALUATION, IN_TRAINING, out_of_memory_explained
from .writing.output_loss import OutputHead
from .writing.packing import LONGEST_ROW, pack_segments, packed_layout
from .writing.update_rules import UPDATE_RULES

Tensor = torch.Tensor

# Tokens of the vocabulary that the embeddings' mean and spread are estimated from; more change neither visibly.
_STATISTICS_TOKENS = 4096
_CONTROL_TOKENS = ("write_start", "write_end", "read_start", "read_end")


@dataclass
class GradMemOutput(ModelOutput):
    """Output of [`GradMemForCausalLM`].

    Args:
        loss (`torch.FloatTensor` of shape `()`, *optional*):
            `read_loss` plus `reconstruction_loss_weight` times the mean last reconstruction loss, given labels.
        logits (`torch.FloatTensor` of shape `(..., query_length, vocab_size)`):
            Aligned with `input_ids`: position i predicts token i + 1. Meaningless at padding.
        read_loss (`torch.FloatTensor` of shape `()`, *optional*):
            Mean cross-entropy over the label tokens of the batch.
        write_losses (`torch.FloatTensor` of shape `(batch, write_steps)`, *optional*):
            Each context's reconstruction loss before each step, detached. `None` when a memory was given.
        memory ([`GradMemMemory`]):
            What was read.
    """

    loss: torch.FloatTensor | None = None
    logits: torch.FloatTensor | None = None
    read_loss: torch.FloatTensor | None = None
    write_losses: torch.FloatTensor | None = None
    memory: GradMemMemory | None = None


class GradMemForCausalLM(
    BaseAccessMixin, SavingMixin, ExportMixin, CompilationMixin, GradMemGenerationMixin, PreTrainedModel
):
    """A frozen decoder with a memory that WRITE fills and READ answers from.

    Args:
        config ([`GradMemConfig`]): its `text_config` describes the base.
        base_model ([`~transformers.PreTrainedModel`], *optional*): the decoder, already loaded. Built with random
            weights from `config.text_config` when absent.

    Raises:
        TypeError: the base is not a decoder that takes `inputs_embeds`.
        ValueError: an option of the configuration does not fit the base.
    """

    config: GradMemConfig
    base_model_prefix = ""
    main_input_name = "input_ids"
    accepts_loss_kwargs = False
    supports_gradient_checkpointing = True
    _supports_sdpa = True
    _supports_flash_attn = True
    _supports_flex_attn = True
    _supports_attention_backend = True
    _keep_in_fp32_modules_strict = {
        "memory_init",
        "memory_projection",
        "write_head",
        *_CONTROL_TOKENS,
        "write_log_learning_rate",
    }

    def __init__(self, config: GradMemConfig, base_model: PreTrainedModel | None = None) -> None:
        super().__init__(config)
        built_here = base_model is None
        if built_here:
            if config.text_config is None:
                raise ValueError(
                    "GradMemConfig.text_config is empty and no base_model was given: there is no decoder to write "
                    "with. Use get_gradmem_model(base_model, config), or from_pretrained."
                )
            base_model = checkpoint.build_base(config.text_config)
            if not config.includes_base:
                config.describe_base(config.text_config, None)  # random weights, which no name stands for
        _check_base(base_model)
        self.base_model = base_model
        self.decoder = Decoder(base_model)
        if not built_here:
            for module in base_model.modules():  # loaded already: post_init must not initialise it again
                module._is_hf_initialized = True
        base_model.requires_grad_(False)
        self._tokenizer: PreTrainedTokenizerBase | None = None
        self._hashed: tuple[list, str] | None = None
        self._add_parameters()
        self.post_init()
        if config.write_head and self.device.type != "meta" and not self.decoder.head_is_linear:
            raise ValueError(
                f"write_head=True needs a base whose logits are a linear head on its last hidden state, which those of "
                f"{type(base_model).__name__} are not. Use write_head=False."
            )
        self.eval()

    def _add_parameters(self) -> None:
        """Create the parameters beside the base; `_init_weights` gives them their values."""
        config = self.config
        like = {"device": self.device, "dtype": torch.float64 if self.dtype == torch.float64 else torch.float32}
        with torch.no_grad():
            width = self.decoder.embed(torch.zeros((1, 1), dtype=torch.long, device=self.device)).shape[-1]
        self.memory_init = nn.Parameter(torch.empty((config.num_memory_tokens, width), **like))
        self.memory_projection = nn.Linear(width, width, **like) if config.memory_projection else None
        for name in _CONTROL_TOKENS:
            shape = (config.num_control_tokens, width)
            setattr(self, name, nn.Parameter(torch.empty(shape, **like)) if config.num_control_tokens else None)
        rates = {
            "none": None,
            "per_step": (config.write_steps,),
            "per_token": (config.write_steps, config.num_memory_tokens),
        }[config.learn_write_learning_rate]
        self.write_log_learning_rate = None if rates is None else nn.Parameter(torch.empty(rates, **like))
        self.write_head = self._new_write_head(like) if config.write_head else None
        for phase, arguments in (("write", config.write_lora), ("read", config.read_lora)):
            if arguments is not None:
                inject_lora(self.base_model, arguments, phase, like["dtype"])
        self._keep_in_fp32_modules_strict = {
            name for name in self._keep_in_fp32_modules_strict if getattr(self, name) is not None
        }

    def _new_write_head(self, like: dict[str, Any]) -> nn.Linear:
        weight = getattr(self.base_model.get_output_embeddings(), "weight", None)
        if weight is None or weight.dim() != 2:
            raise ValueError(
                f"write_head=True needs a base with a linear output head, which {type(self.base_model).__name__} does "
                "not have. Use write_head=False."
            )
        return nn.Linear(weight.shape[1], weight.shape[0], bias=False, **like)

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        if module is self:
            self._init_own_parameters()
        elif module is self.memory_projection:
            init.eye_(module.weight)
            init.zeros_(module.bias)
        elif module is self.write_head:
            init.copy_(module.weight, self.base_model.get_output_embeddings().weight)

    def _init_own_parameters(self) -> None:
        """Vectors start at the mean embedding plus noise of the embeddings' standard deviation."""
        if self.memory_init.device.type == "meta":
            return
        vocabulary = self.base_model.get_input_embeddings().weight.shape[0]
        ids = torch.linspace(0, vocabulary - 1, min(vocabulary, _STATISTICS_TOKENS), device=self.device).long()
        embeddings = self.decoder.embed(ids[None])[0].to(self.memory_init.dtype)
        mean, spread = embeddings.mean(0), embeddings.std(0)
        for name in ("memory_init", *_CONTROL_TOKENS):
            parameter = getattr(self, name)
            if parameter is not None:
                init.copy_(parameter, mean + spread * torch.randn_like(parameter))
        if self.write_log_learning_rate is not None:
            rate = torch.tensor(float(self.config.write_learning_rate), dtype=torch.float64)
            init.constant_(self.write_log_learning_rate, rate.log().item())

    def _prefix(self, memory: Tensor, start: Tensor | None, end: Tensor | None) -> Tensor:
        """`[start; P(M); end]` in the base's dtype, `(batch, prefix_length, hidden_size)`."""
        memory = memory.to(self.memory_init.dtype)  # it may have been written beside a base of another precision
        if self.memory_projection is not None:
            memory = self.memory_projection(memory)
        parts = [
            part if part.dim() == 3 else part.expand(memory.shape[0], -1, -1)
            for part in (start, memory, end)
            if part is not None
        ]
        return torch.cat(parts, dim=1).to(self.dtype)

    # ------------------------------------------------------------------------------------------------ WRITE

    def write(
        self,
        context: Context | None = None,
        *,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        segment_ids: Tensor | None = None,
        memory: GradMemMemory | None = None,
        write_steps: int | None = None,
        write_learning_rate: float | None = None,
        tolerance: float | None = None,
        batch_size: int | None = None,
        show_progress: bool = False,
        measure_final_loss: bool = False,
    ) -> GradMemMemory:
        """Write contexts into memories by gradient descent on their reconstruction loss, the weights frozen.

        Works under `no_grad` and `inference_mode`, in eval and train mode (dropout is off either way), and leaves no
        graph, gradient, mode or weight changed.

        Args:
            context: text; a list of texts is that many contexts, a list of lists contexts in segments. Tokenised
                without special tokens.
            input_ids: `(batch, length)` tokens in place of text, padded on either side.
            attention_mask: `(batch, length)`; all ones by default.
            segment_ids: `(batch, length)`; a segment is a run of equal values.
            memory: go on from these memories in place of the learned start, so that a further context is appended.
            write_steps: steps to take; the configuration's by default.
            write_learning_rate: step size in place of the configuration's, or of all learned ones.
            tolerance: stop a sample once its loss, in nats per token, is below this.
            batch_size: how many contexts to write at a time; all by default.
            show_progress: show a progress bar over the steps.
            measure_final_loss: also measure the loss after the last step, at the price of a forward pass.

        Returns:
            The written memories, one for each context.

        Raises:
            ValueError: an empty context, shapes that do not match, a context longer than the base's window, a memory
                of another model, a negative number of steps.
            FloatingPointError: a loss became NaN or infinite; names the sample and what to lower.
            torch.OutOfMemoryError: also says what to lower.
        """
        with torch.inference_mode(False), torch.enable_grad():
            if (context is None) == (input_ids is None):
                raise ValueError("write needs either a text or input_ids, and not both.")
            if context is not None:
                if attention_mask is not None or segment_ids is not None:
                    raise ValueError("attention_mask and segment_ids belong to input_ids; a text brings its own.")
                input_ids, attention_mask, segment_ids = self._tokenize(context, self.tokenizer)
            input_ids, attention_mask, segment_ids = checked_context(
                input_ids, attention_mask, segment_ids, self.device
            )
            if batch_size is not None and batch_size < 1:
                raise ValueError(f"batch_size must be at least 1, got {batch_size}.")
            if self.config.writer == "forward" and not (write_learning_rate is None and tolerance is None):
                raise ValueError('writer="forward" takes no gradient step: it has no write_learning_rate or tolerance.')
            step_sizes = self._step_sizes(write_steps, write_learning_rate)
            start = None if memory is None else self._memory_to_continue(memory, len(input_ids))
            # Contexts of like length share a chunk, so that the padding of the longest is not computed for the rest.
            order = attention_mask.sum(1).argsort(descending=True, stable=True)
            chunks = order.split(batch_size or len(input_ids))
            parts = [
                self._rows(input_ids[chunk], attention_mask[chunk], None if segment_ids is None else segment_ids[chunk])
                for chunk in chunks
            ]
            turns = sum(rows.num_turns if self.config.write_segments_in_turn else 1 for rows in parts)
            written = []
            with (
                modules_in_eval(self),
                out_of_memory_explained(
                    f"Lower batch_size (now {batch_size or len(input_ids)} contexts), or cut the contexts shorter with "
                    "write_segment_length, which is also the longest row that is held at a time."
                ),
                tqdm(total=turns * len(step_sizes), desc="Writing", unit="step", disable=not show_progress) as bar,
            ):
                for chunk, rows in zip(chunks, parts, strict=True):
                    begin = None if start is None else start[chunk]
                    written.append(
                        self._write_chunk(rows, begin, step_sizes, chunk, tolerance, measure_final_loss, bar)
                    )
            return GradMemMemory.cat(written)[order.argsort()]

    def _write_chunk(
        self,
        rows: ContextRows,
        start: GradMemMemory | None,
        step_sizes: Sequence[Tensor | float],
        indices: Tensor,
        tolerance: float | None,
        measure_final_loss: bool,
        bar: tqdm,
    ) -> GradMemMemory:
        trace = self._run_writer(
            rows,
            self._start(len(rows.segment_lengths)) if start is None else start.embeddings,
            step_sizes,
            tolerance=tolerance,
            on_step=lambda losses: _show(bar, losses),
        )
        final_loss = None
        if measure_final_loss:
            with torch.no_grad():
                final_loss = self._objective(rows).first_order(trace.memory)
        self._check_finite(trace, indices, step_sizes)
        memory = self._as_memory(trace, rows, final_loss, self.fingerprint())
        if start is not None:
            memory.segment_lengths = torch.cat([start.segment_lengths, memory.segment_lengths], dim=1)
        return memory

    def _as_memory(
        self, trace: WriteTrace, rows: ContextRows, final_loss: Tensor | None, fingerprint: str | None
    ) -> GradMemMemory:
        return GradMemMemory(
            embeddings=trace.memory,
            write_losses=trace.losses,
            segment_lengths=rows.segment_lengths,
            final_write_loss=final_loss,
            fingerprint=fingerprint,
        )

    def _check_finite(self, trace: WriteTrace, indices: Tensor, step_sizes: Sequence[Tensor | float]) -> None:
        broken = (~trace.memory.isfinite().flatten(1).all(dim=1)).nonzero()
        if len(broken):
            raise FloatingPointError(
                f"The reconstruction of context {int(indices[broken].min())} became NaN or infinite within "
                f"{len(step_sizes)} write steps. Lower write_learning_rate (now "
                f"{float(torch.as_tensor(step_sizes[0]).detach().max()):g}), or set write_max_grad_norm in the "
                "configuration."
            )

    def _start(self, batch_size: int) -> Tensor:
        return self.memory_init.expand(batch_size, -1, -1)

    def _run_writer(
        self,
        rows: ContextRows,
        memory: Tensor,
        step_sizes: Sequence[Tensor | float],
        *,
        differentiate: bool = False,
        keep_last_loss: bool = False,
        tolerance: float | None = None,
        on_step: Callable[[Tensor], object] = lambda losses: None,
    ) -> WriteTrace:
        """Write with the writer of the configuration; the arguments are those of [`InnerLoop.run`]."""
        if self.config.writer == "gradient":
            loop = self._inner_loop()

            def descend(rows: ContextRows, memory: Tensor) -> WriteTrace:
                return loop.run(
                    self._objective(rows),
                    memory,
                    step_sizes,
                    differentiate=differentiate,
                    keep_last_loss=keep_last_loss,
                    tolerance=tolerance,
                    on_step=on_step,
                )

            in_turn = self.config.write_segments_in_turn
            return write_in_turn(rows, memory, descend) if in_turn else descend(rows, memory)
        with torch.set_grad_enabled(differentiate):
            return write_forward(
                lambda memory: self._read_back(rows, memory),
                memory,
                len(step_sizes),
                checkpoint_steps=self.config.checkpoint_write_steps,
                on_step=on_step,
            )

    def _read_back(self, rows: ContextRows, memory: Tensor) -> Tensor:
        """The decoder's last hidden states at a copy of the memory behind the context: the forward-only writer."""
        prefix, copy_behind = self._prefix(memory, self.write_start, self.write_end), self._prefix(memory, None, None)
        inputs = (
            torch.cat([prefix, self.decoder.embed(rows.input_ids), copy_behind], dim=1),
            torch.cat(
                [
                    rows.attention_mask.new_ones(prefix.shape[:2]),
                    rows.attention_mask,
                    rows.attention_mask.new_ones(copy_behind.shape[:2]),
                ],
                dim=1,
            ),
            torch.cat([self.decoder.prefix_ids(prefix), rows.input_ids, self.decoder.prefix_ids(copy_behind)], dim=1),
        )
        order = token_order(inputs[1], "right")
        with lora_phase(self.base_model, "write"):
            hidden = self.decoder.hidden_states(*(reorder(part, order) for part in inputs))
        return reorder(hidden, order.argsort(dim=1))[:, -memory.shape[1] :].to(memory.dtype)

    def _inner_loop(self) -> InnerLoop:
        config = self.config
        return InnerLoop(
            base_model=self.base_model,
            update_rule=UPDATE_RULES[config.write_optimizer](*config.write_betas),
            max_grad_norm=config.write_max_grad_norm,
            grad_clip_value=config.write_grad_clip_value,
            meta_gradient=config.meta_gradient,
            meta_gradient_steps=config.meta_gradient_steps,
            meta_gradient_radius=config.meta_gradient_radius,
            checkpoint_steps=config.checkpoint_write_steps,
            parameters=[parameter for parameter in self.parameters() if parameter.requires_grad],
            loss_and_gradient=self._loss_and_gradient,
        )

    def _step_sizes(self, write_steps: int | None, write_learning_rate: float | None) -> list[Tensor | float]:
        """α of each step: a number, or a learned scalar or `(num_memory_tokens, 1)` column."""
        steps = self.config.write_steps if write_steps is None else write_steps
        if steps < 0:
            raise ValueError(f"write_steps must be at least 0, got {steps}.")
        if write_learning_rate is not None and not write_learning_rate > 0:
            raise ValueError(f"write_learning_rate must be greater than 0, got {write_learning_rate}.")
        if write_learning_rate is not None or self.write_log_learning_rate is None:
            return [write_learning_rate or self.config.write_learning_rate] * steps
        learned = self.write_log_learning_rate.exp()
        if learned.dim() == 2:
            learned = learned[..., None]
        return [learned[min(step, len(learned) - 1)] for step in range(steps)]

    def _objective(self, rows: ContextRows) -> ReconstructionObjective:
        return ReconstructionObjective(
            rows=self._packed(rows),
            prefix=lambda memory: self._prefix(memory, self.write_start, self.write_end),
            token_logits=self._write_logits,
            hidden_states=self._write_hidden,
            output_head=self.decoder.output_head if self.write_head is None else OutputHead(self.write_head.weight),
            weights=self,
        )

    def _packed(self, rows: ContextRows) -> ContextRows:
        """Segments of one context in one row, where they have no prefix and the base keeps them apart."""
        if self.config.write_prefix_segments or (rows.num_turns == 1 and not several_processes()):
            return rows
        prefix_length = self.config.prefix_length
        longest = min(LONGEST_ROW, (self.decoder.window or LONGEST_ROW + prefix_length) - prefix_length)
        # Asked before the rows are looked at: a sharded base needs the same runs in every process.
        if not self.decoder.keeps_segments_apart(prefix_length, longest):
            return rows
        return pack_segments(rows, prefix_length, longest)

    def _write_logits(self, prefix: Tensor, rows: ContextRows) -> Tensor:
        """Logits `(rows, length, vocab)` under WRITE's head and LoRA; position i predicts a row's token i."""
        if self.write_head is not None:
            return self.write_head(self._write_hidden(prefix, rows).to(self.write_head.weight.dtype))
        inputs, predicting = self._write_inputs(prefix, rows)
        with lora_phase(self.base_model, "write"):
            return reorder(self.decoder.logits(*inputs), predicting)

    def _write_hidden(self, prefix: Tensor, rows: ContextRows) -> Tensor:
        """What WRITE's head makes the logits of [`_write_logits`] from, `(rows, length, hidden_size)`."""
        inputs, predicting = self._write_inputs(prefix, rows)
        with lora_phase(self.base_model, "write"):
            return reorder(self.decoder.hidden_states(*inputs), predicting)

    def _write_inputs(self, prefix: Tensor, rows: ContextRows) -> tuple[tuple[Tensor, ...], Tensor]:
        """Inputs of the decoder for `[segments before; prefix; segment]`, and where each row token is predicted."""
        embeds = torch.cat([prefix, self.decoder.embed(rows.input_ids)], dim=1)
        ids = torch.cat([self.decoder.prefix_ids(prefix), rows.input_ids], dim=1)
        if rows.segment_starts is not None:
            mask, positions, predicting = packed_layout(rows.segment_starts, prefix.shape[1], prefix.dtype)
            return (embeds, mask, ids, positions), predicting
        mask = torch.cat([rows.attention_mask.new_ones(prefix.shape[:2]), rows.attention_mask], dim=1)
        place = torch.where(rows.scored, 2, torch.where(rows.attention_mask, 0, 3))
        order = torch.cat([place.new_ones(prefix.shape[:2]), place], dim=1).argsort(dim=1, stable=True)
        predicting = order.argsort(dim=1)[:, prefix.shape[1] :] - 1
        return tuple(reorder(part, order) for part in (embeds, mask, ids)), predicting.clamp(min=0)

    def _tokenize(self, context: Context, tokenizer: PreTrainedTokenizerBase) -> tuple[Tensor, Tensor, Tensor | None]:
        return tokenize_contexts(context, tokenizer, self.config.write_segment_length)

    def _rows(self, input_ids: Tensor, attention_mask: Tensor, segment_ids: Tensor | None) -> ContextRows:
        whole = self.config.writer == "forward"  # which reads a context as it stands
        rows = split_context(
            input_ids,
            attention_mask,
            None if whole else segment_ids,
            segment_length=self.config.write_segment_length,
            prefix_segments=self.config.write_prefix_segments,
        )
        memory_tokens = self.config.prefix_length + (self.config.num_memory_tokens if whole else 0)  # a copy behind
        needed, window = rows.input_ids.shape[1] + memory_tokens, self.decoder.window
        if window is not None and needed > window:
            remedy = "Shorten it." if whole else "Give the context in segments, or set write_segment_length."
            raise ValueError(
                f"The longest context row needs {needed} positions (memory and control tokens included), but the "
                f"window of {type(self.base_model).__name__} is {window}. {remedy}"
            )
        return rows

    def _memory_to_continue(self, memory: GradMemMemory, batch_size: int) -> GradMemMemory:
        self._check_memory(memory)
        if len(memory) != batch_size:
            raise ValueError(f"memory holds {len(memory)} contexts, but {batch_size} are to be written on from it.")
        own = memory.to(self.device)
        own.embeddings = own.embeddings.detach().clone().to(self.memory_init.dtype)
        return own

    def _check_memory(self, memory: GradMemMemory) -> None:
        if not isinstance(memory, GradMemMemory):
            raise TypeError(f"memory must be a GradMemMemory, got {type(memory).__name__}.")
        expected, given = tuple(self.memory_init.shape), tuple(memory.embeddings.shape[1:])
        if expected != given:
            raise ValueError(
                f"memory has {given[0]} vectors of width {given[1]}, but this model reads {expected[0]} of width "
                f"{expected[1]}. It was written by another model."
            )
        if memory.fingerprint is not None and memory.fingerprint != self.fingerprint():
            raise ValueError(
                f"memory was written for {memory.fingerprint}, but this model is {self.fingerprint()}: another base, "
                "or other weights in READ. Read it with the model that wrote it, or write the context again."
            )

    # ------------------------------------------------------------------------------------------------ READ

    @compiled_in_parts
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        labels: Tensor | None = None,
        context_input_ids: Tensor | None = None,
        context_attention_mask: Tensor | None = None,
        context_segment_ids: Tensor | None = None,
        memory: GradMemMemory | None = None,
        context_index: Tensor | None = None,
        write_steps: int | None = None,
        return_dict: bool | None = None,
    ) -> GradMemOutput | tuple:
        """Write the context, or take a memory that was written, and read the queries from it.

        With gradients enabled the loss is differentiated through the write.

        Args:
            input_ids: `(batch, query_length)`, or `(batch, queries, query_length)` for several queries on each
                context, or flat queries with `context_index`. The answer follows the question in the same row.
            attention_mask: of the shape of `input_ids`; padding may be on either side.
            labels: of the shape of `input_ids` and not shifted; −100 is not scored. The first query token may have a
                label: it is predicted from the memory.
            context_input_ids: `(batch, length)`, the contexts to write.
            context_attention_mask: `(batch, length)`.
            context_segment_ids: `(batch, length)`; a segment is a run of equal values.
            memory: read these in place of writing `context_input_ids`.
            context_index: `(rows,)`, which context each flat query is about.
            write_steps: steps of WRITE; the configuration's by default.
            return_dict: `False` for a plain tuple; the configuration's by default.

        Raises:
            ValueError: neither or both of context and memory, shapes that do not match, or
                `meta_gradient="none"` with nothing to train but the memory's start.
        """
        trace = None
        if memory is None:
            trace, memory = self._write_context(
                context_input_ids, context_attention_mask, context_segment_ids, write_steps
            )
        else:
            if context_input_ids is not None:
                raise ValueError("Give either a memory or context_input_ids, and not both.")
            self._check_memory(memory)
            memory = memory.to(self.device)
        queries = checked_queries(input_ids, attention_mask, labels, context_index, len(memory), self.device)
        embeds, mask, ids, order = self._read_inputs(memory, queries, "right")
        with lora_phase(self.base_model, "read"):
            logits = self.decoder.logits(embeds, mask, ids)

        loss = answer_loss = None
        if queries.labels is not None:
            loss = answer_loss = read_loss(logits, queries.labels, queries.attention_mask, order)
            if trace is not None and trace.last_loss is not None and self.config.reconstruction_loss_weight:
                loss = answer_loss + self.config.reconstruction_loss_weight * trace.last_loss.mean()
        aligned = align_with_query(logits, order, queries.input_ids.shape[1])
        output = GradMemOutput(
            loss=loss,
            logits=aligned.reshape(*queries.shape, *aligned.shape[1:]),
            read_loss=answer_loss,
            write_losses=None if trace is None else trace.losses,
            memory=memory,
        )
        return_dict = self.config.return_dict if return_dict is None else return_dict
        return output if return_dict else output.to_tuple()

    def _write_context(
        self,
        input_ids: Tensor | None,
        attention_mask: Tensor | None,
        segment_ids: Tensor | None,
        write_steps: int | None,
    ) -> tuple[WriteTrace, GradMemMemory]:
        """WRITE as part of a forward pass: differentiated through if, and only if, gradients are enabled."""
        if input_ids is None:
            raise ValueError("There is nothing to read from: give context_input_ids, or a memory.")
        differentiate = torch.is_grad_enabled()
        if differentiate:
            self._check_trainable()
        advice = IN_TRAINING if differentiate else IN_EVALUATION
        if differentiate and not self.config.checkpoint_write_steps:
            advice = f"Set checkpoint_write_steps=True. {advice}"
        with torch.inference_mode(False), torch.enable_grad(), out_of_memory_explained(advice):
            rows = self._rows(*checked_context(input_ids, attention_mask, segment_ids, self.device))
            trace = self._run_writer(
                rows,
                self._start(len(rows.segment_lengths)),
                self._step_sizes(write_steps, None),
                differentiate=differentiate,
                keep_last_loss=self.config.reconstruction_loss_weight > 0,
            )
        fingerprint = None if differentiate else self.fingerprint()
        return trace, self._as_memory(trace, rows, None, fingerprint)

    def _check_trainable(self) -> None:
        """Refuse to train what would silently get no gradient, or fail in the backward pass."""
        config = self.config
        if (config.write_lora or config.read_lora) and layers_recomputed(self.base_model):
            raise ValueError(
                "The base's activation (gradient) checkpointing recomputes its layers after the phase in which "
                "write_lora or read_lora was on. Disable it on the base; checkpoint_write_steps=True saves "
                "WRITE's memory."
            )
        if config.meta_gradient == "finite_difference" and any(
            parameter.requires_grad and is_sharded(parameter) for parameter in self.parameters()
        ):
            raise ValueError(
                'meta_gradient="finite_difference" gives sharded parameters no gradient, and some that train are. Keep '
                'what trains unsharded, as DDP does, or use meta_gradient="exact".'
            )
        if config.meta_gradient != "none":
            return
        silent = (self.memory_init, self.write_log_learning_rate)
        trains = [p for p in self.parameters() if p.requires_grad and all(p is not other for other in silent)]
        if not trains:
            raise ValueError(
                'meta_gradient="none" cuts the outer gradient at every write step, and nothing trains here but the '
                'memory\'s start. Use meta_gradient="exact" or "first_order", or train something else as well.'
            )

    def _read_inputs(
        self, memory: GradMemMemory, queries: Queries, padding_side: str
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Embeddings, mask and ids of `[r_start; P(M); r_end; query]` with its padding, and the order of the layout."""
        prefix = self._prefix(memory.embeddings, self.read_start, self.read_end).index_select(0, queries.memory_index)
        prefix_ids = self.decoder.prefix_ids(prefix)
        mask = torch.cat([torch.ones_like(prefix_ids, dtype=torch.bool), queries.attention_mask], dim=1)
        order = token_order(mask, padding_side)
        embeds = torch.cat([prefix, self.decoder.embed(queries.input_ids)], dim=1)
        ids = torch.cat([prefix_ids, queries.input_ids], dim=1)
        return reorder(embeds, order), reorder(mask, order), reorder(ids, order), order


def _show(bar: tqdm, losses: Tensor) -> None:
    bar.update()
    if not bar.disable:  # reading the loss waits for the device
        bar.set_postfix(loss=f"{losses.nanmean():.3f}")


def _check_base(base_model: PreTrainedModel) -> None:
    """Refuse what cannot work by name, when it is wrapped."""
    name = type(base_model).__name__
    if not isinstance(base_model, PreTrainedModel):
        hint = ""
        if hasattr(base_model, "merge_and_unload"):
            hint = (
                " Merge its adapter, merge_and_unload(), then save the result and load it as the base: a memory's "
                "adapter records its base by name alone."
            )
        raise TypeError(
            f"base_model must be a transformers.PreTrainedModel with a language-model head, got {name}.{hint}"
        )
    try:
        has_embeddings = getattr(base_model.get_input_embeddings(), "weight", None) is not None
    except (AttributeError, NotImplementedError):
        has_embeddings = False
    if not has_embeddings:
        raise TypeError(f"{name} has no single token embedding, so no memory vectors can be put before its tokens.")
    if "inputs_embeds" not in inspect.signature(base_model.forward).parameters:
        raise TypeError(f"{name} takes no inputs_embeds, so no memory vectors can be put before its tokens.")


def get_gradmem_model(
    base_model: PreTrainedModel,
    config: GradMemConfig | str | os.PathLike | None = None,
    tokenizer: PreTrainedTokenizerBase | None = None,
) -> GradMemForCausalLM:
    """Give a decoder a memory, as `peft.get_peft_model` gives it an adapter.

    The base is frozen, in place; the parameters beside it train. `requires_grad` says what trains and nothing else, so
    unfreeze what you want trained afterwards.

    Args:
        base_model: any Hugging Face decoder that takes `inputs_embeds`.
        config: a configuration for a new adapter, or directory or Hub repository of a trained one.
        tokenizer: for text given to `write`; the adapter's or the base's by default.

    Raises:
        TypeError: the base cannot take memory vectors.
        ValueError: an option does not fit the base, or an adapter belongs to another one.
    """
    if config is None or isinstance(config, GradMemConfig):
        config = GradMemConfig() if config is None else copy.deepcopy(config)
        _check_base(base_model)
        config.describe_base(base_model.config, checkpoint.base_name(base_model) or config.base_model_name_or_path)
        config.base_model_revision = loaded_commit(config.base_model_name_or_path, config.base_model_revision)
        model = GradMemForCausalLM(config, base_model)
    else:
        adapter = config
        config = checkpoint.load_config(os.fspath(adapter), {}, {})
        checkpoint.check_attachable(config, base_model, adapter)
        config.text_config = base_model.config
        model = GradMemForCausalLM(config, base_model)
        checkpoint.load_adapter(model, checkpoint.adapter_file(adapter, {}), adapter)
        model.tokenizer = checkpoint.load_tokenizer(adapter, {})
    if tokenizer is not None:
        model.tokenizer = tokenizer
    return model


__all__ = ["GradMemForCausalLM", "GradMemOutput", "get_gradmem_model"]
