"""`GradMemForCausalLM`: any Hugging Face decoder with memory tokens that are written by gradient descent.

No algorithm is here: the class holds the objects of `memory/`, `writing/` and `reading/` and hands on what it is given.
"""

import copy
import functools
import os
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn
from transformers import GenerationConfig, GenerationMixin, PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils import ModelOutput

from . import variants
from .base.decoder import Decoder
from .base.lora import PHASES, lora_taken_back, take_over
from .base.token_ids import checked_tokens
from .checkpoint.adapter import Adapter
from .checkpoint.base_model import base_to_wrap, check_attachable, check_base, record_base
from .configuration_gradmem import GradMemConfig
from .losses import LOSSES, Passed, needed, outer_loss
from .memory.phase import Phase
from .memory.written import GradMemMemory, Memories
from .modeling_wrapper import GradMemPreTrainedModel, compiled_in_parts
from .reading.answering import Answer, answer_questions
from .reading.generation import (
    can_generate_from_base,
    checked_arguments,
    generate_from_base,
    generate_from_forward,
    with_prompts,
)
from .reading.output import GradMemOutput
from .reading.queries import checked_prompts, checked_queries
from .reading.read import answer_loss, prompted_by, read
from .writing.contexts import Context, Contexts, given_contexts, tokenize_contexts
from .writing.objectives.reconstruction import OnToken, reconstruct
from .writing.write import write_contexts, write_in_forward
from .writing.writers import Writer, WriteTrace

Tensor = torch.Tensor


class GradMemForCausalLM(GradMemPreTrainedModel, GenerationMixin):
    """A frozen decoder with a memory that WRITE fills and READ answers from.

    Attributes:
        decoder ([`~hf_gradmem.base.decoder.Decoder`]): runs the base.
        form ([`~hf_gradmem.memory.form.MemoryForm`]): what a memory is.
        write_phase, read_phase ([`~hf_gradmem.memory.phase.Phase`]): the conditions that the base is run under.
        writer ([`~hf_gradmem.writing.writers.Writer`]): how a context becomes a memory.

    Args:
        config ([`GradMemConfig`]): its `text_config` describes the base.
        base_model ([`~transformers.PreTrainedModel`], *optional*): the decoder; one of random weights when absent.

    Raises:
        TypeError: the base is not a decoder that takes `inputs_embeds`.
        ValueError: an option of the configuration does not fit the base.
    """

    _writer: tuple[tuple, Writer] | None = None  # and the settings that it was made from

    def __init__(self, config: GradMemConfig, base_model: PreTrainedModel | None = None) -> None:
        super().__init__(config)
        self.base_model = base_to_wrap(config, base_model)
        self.decoder = Decoder(self.base_model)
        self.form = variants.build("memory_form", config, self, self.decoder)
        self.write_phase, self.read_phase = (Phase(name, self, self.decoder, self.form) for name in PHASES)
        self.write_head = self.write_log_learning_rate = None
        self.writer.add_parameters()
        take_over(self.base_model, self)
        with lora_taken_back(self.base_model):
            with torch.random.fork_rng(devices=[]):  # a seed draws one start, whatever LoRA stands beside it
                for phase, lora in ((self.write_phase, config.write_lora), (self.read_phase, config.read_lora)):
                    if lora is not None:
                        phase.add_lora(lora)
            self.post_init()
            if self.device.type != "meta":
                self.form.check()
                self.write_phase.check()
        self.eval()

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        if module is self:
            phases = (self.write_phase, self.read_phase)
            self.form.init_vectors(["memory_init", *(name for phase in phases for name in phase.control_vectors)])
            self.writer.init_parameters()
        else:
            self.form.init_module(module)
            self.write_phase.init_module(module)

    @property
    def writer(self) -> Writer:
        """The writer that the configuration describes now: a change of one of its options makes another."""
        settings = variants.settings(self.config)
        if self._writer is None or self._writer[0] != settings:
            self._writer = settings, variants.build("writer", self.config, self.write_phase)
            if self._compiled is not None:
                self.compile(*self._compiled[0], **self._compiled[1])
        return self._writer[1]

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
            context: a text, or the `Path` of a text file; a list of them is that many contexts, a list of lists
                contexts in segments. Tokenised without special tokens.
            input_ids: `(batch, length)` tokens in place of text, padded on either side.
            attention_mask: `(batch, length)`; all ones by default.
            segment_ids: `(batch, length)`; a segment is a run of equal values.
            memory: go on from these in place of the learned start: a further context is appended.
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
        contexts = given_contexts(context, input_ids, attention_mask, segment_ids, self.tokenize)
        if memory is not None:
            self.check_memory(memory)
        return write_contexts(
            self.writer,
            contexts,
            identity=self.identity(),
            start=memory,
            write_steps=write_steps,
            write_learning_rate=write_learning_rate,
            tolerance=tolerance,
            batch_size=batch_size,
            show_progress=show_progress,
            measure_final_loss=measure_final_loss,
        )

    def tokenize(self, context: Context) -> Contexts:
        """Texts as the tokens that `write` takes, by this model's tokenizer.

        Args:
            context: as in `write`.

        Raises:
            TypeError: something in there is not a text.
        """
        return tokenize_contexts(context, self.tokenizer, **self.writer.cutting)

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
        memory: Memories | None = None,
        context_index: Tensor | None = None,
        write_steps: int | None = None,
        return_dict: bool | None = None,
    ) -> GradMemOutput | tuple:
        """Write the context, or take a memory that was written, and read the queries from it.

        With gradients enabled the loss is differentiated through the write. Without a query it is L(M_K; C), to train
        WRITE on texts that nothing is asked about.

        Args:
            input_ids: `(batch, query_length)`, or `(batch, queries, query_length)` for several queries on each
                context, or flat queries with `context_index`. The answer follows the question in the same row.
            attention_mask: of the shape of `input_ids`; padding may be on either side.
            labels: of the shape of `input_ids` and not shifted; −100 is not scored. The first query token may have a
                label: it is predicted from the memory.
            context_input_ids: `(batch, length)`, the contexts to write.
            context_attention_mask: `(batch, length)`.
            context_segment_ids: `(batch, length)`; a segment is a run of equal values.
            memory: read these in place of writing `context_input_ids`; a list of memories is read together. Beside them
                contexts are for `distillation_loss_weight` alone, whose teacher reads them.
            context_index: `(rows,)`, which context each flat query is about.
            write_steps: steps of WRITE; the configuration's by default.
            return_dict: `False` for a plain tuple; the configuration's by default.

        Raises:
            ValueError: neither or both of context and memory, shapes that do not match, a query longer than the base's
                window, or `meta_gradient="none"` with nothing to train but the start and what is WRITE's own.
        """
        of_contexts = (context_attention_mask, context_segment_ids)
        contexts = None if context_input_ids is None else Contexts(context_input_ids, *of_contexts)
        if all(given is None for given in (input_ids, attention_mask, labels, memory, context_index)):
            writing, memory = self._written(contexts, write_steps, asked=False)
            loss = memory.final_write_loss.mean()  # type: ignore[union-attr] # it was asked for
            return self._returned(GradMemOutput(loss=loss, write_losses=writing.losses, memory=memory), return_dict)
        if memory is None:
            trace, memory = self._written(contexts, write_steps)
        else:
            taught = labels is not None and self.config.distillation_loss_weight != 0
            given = (write_steps,) if taught else (context_input_ids, *of_contexts, write_steps)
            trace, memory = None, self.memory_to_read(memory, *given)
        with torch.inference_mode(False):  # the copies may be read for a gradient, whatever the caller runs under
            queries = checked_queries(input_ids, attention_mask, labels, context_index, len(memory), self.device)
        found, loss = read(self.read_phase, memory.embeddings, queries), None
        if found.loss is not None and found.scored is not None:
            again = functools.partial(answer_loss, self.read_phase, queries)
            prompted = prompted_by(self.read_phase, contexts, queries, len(memory))
            loss = outer_loss(Passed(found.loss, trace, memory, again, found.scored, prompted), LOSSES, self.config)
        write_losses = None if trace is None else trace.losses
        return self._returned(GradMemOutput(loss, found.logits, found.loss, write_losses, memory), return_dict)

    def _returned(self, output: GradMemOutput, return_dict: bool | None) -> GradMemOutput | tuple:
        return_dict = self.config.return_dict if return_dict is None else return_dict
        return output if return_dict else output.to_tuple()

    def _written(
        self, contexts: Contexts | None, steps: int | None, *, asked: bool = True
    ) -> tuple[WriteTrace, GradMemMemory]:
        """The contexts, written now: where a forward pass is given no memory. Where nothing is asked, with its loss."""
        if contexts is None:
            raise ValueError("There is nothing to read from: give context_input_ids, or a memory.")
        keep = needed(LOSSES, self.config) if asked else ()
        return write_in_forward(
            self.writer, contexts, steps, keep=keep, identity=self.identity, measure_final_loss=not asked
        )

    def memory_to_read(self, memory: Memories, *of_contexts: Any) -> GradMemMemory:
        """What READ is given for a memory, or for a list of them, read together; on the model's device."""
        if any(argument is not None for argument in of_contexts):
            raise ValueError(
                "Give either a memory or context_input_ids, and not both; context_attention_mask, context_segment_ids "
                "and write_steps go with the latter."
            )
        return self.read_phase.memory_to_read(memory, lambda: self.identity(thorough=False)).to(self.device)

    @torch.no_grad()
    def generate(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        *,
        memory: Memories | None = None,
        context_input_ids: Tensor | None = None,
        context_attention_mask: Tensor | None = None,
        context_segment_ids: Tensor | None = None,
        context_index: Tensor | None = None,
        write_steps: int | None = None,
        generation_config: GenerationConfig | None = None,
        streamer: Any = None,
        **kwargs: Any,
    ) -> Tensor | ModelOutput:
        """Continue prompts from a memory, as `generate` of any decoder would with the context in the prompt.

        Args:
            input_ids: `(rows, prompt_length)` prompts, padded on either side.
            attention_mask: `(rows, prompt_length)`.
            memory: one memory for all prompts, or one for each; a list of memories is read together, side by side.
            context_input_ids, context_attention_mask, context_segment_ids, write_steps: contexts to write first,
                in place of a memory.
            context_index: `(rows,)`, which memory each prompt reads.
            generation_config: the base's by default.
            streamer: as in `generate` of the base.
            kwargs: passed on to `generate` of the base. `max_length` and `min_length` count the prompt but not the
                memory; it ends where the base's window does. Processors that look at the prompt's tokens, such as
                `repetition_penalty`, see the new ones only.

        Returns:
            Prompt and continuation, `(rows · num_return_sequences, prompt_length + new)`; the prompt as it was given.

        Raises:
            ValueError: neither a memory nor a context, shapes that do not match, no room for a new token, or a setting
                that has no meaning behind a memory (`assistant_model`, `guidance_scale`).
        """
        if memory is None:
            if context_input_ids is None:
                raise ValueError("There is nothing to read from: give a memory, or context_input_ids.")
            memory = self.write(
                input_ids=context_input_ids,
                attention_mask=context_attention_mask,
                segment_ids=context_segment_ids,
                write_steps=write_steps,
            )
        else:
            of_contexts = (context_input_ids, context_attention_mask, context_segment_ids, write_steps)
            memory = self.memory_to_read(memory, *of_contexts)
        queries = checked_prompts(input_ids, attention_mask, context_index, len(memory), self.device)
        arguments = {**kwargs, "generation_config": generation_config, "streamer": streamer}
        arguments = checked_arguments(self.read_phase, memory.embeddings, queries, arguments, self.generation_config)
        if can_generate_from_base(self.read_phase, queries):
            output = generate_from_base(self.read_phase, memory.embeddings, queries, arguments)
        else:
            output = generate_from_forward(self, memory, queries, arguments)
        return with_prompts(output, queries.input_ids)

    def prepare_inputs_for_generation(
        self, input_ids: Tensor, prompts: Tensor, inputs_embeds: Any = None, past_key_values: Any = None, **kwargs: Any
    ) -> dict[str, Any]:
        """What `forward` needs at each step of generation: prompt and new tokens, since nothing is cached."""
        return {"input_ids": torch.cat([prompts, input_ids], dim=1)} | {
            name: kwargs[name] for name in ("attention_mask", "memory", "context_index") if name in kwargs
        }

    def answer(
        self,
        questions: str | Sequence[str],
        memory: Memories,
        *,
        context_index: Sequence[int] | Tensor | None = None,
        **options: Any,
    ) -> list[Answer]:
        """Greedy answers to questions, with how sure the model is of each: see [`Answer`].

        Args:
            questions: texts, put into the adapter's template.
            memory: one memory for all questions, or one for each; a list of memories is read together, side by side.
            context_index: `(questions,)`, which memory each question is about.
            options: `memory_ids`, names of the memories for the answers; `max_new_tokens` (50); `template`, the words
                around a question in place of the adapter's; `batch_size` (32), questions at a time.

        Raises:
            ValueError: a question is empty, the numbers do not match, or a memory is of another model.
        """
        return answer_questions(self, questions, memory, context_index=context_index, **options)

    @torch.no_grad()
    def reconstruct(
        self, memory: GradMemMemory, prefix_input_ids: Tensor | None = None, on_token: OnToken | None = None
    ) -> Tensor:
        """Decode memories greedily under the conditions they were written in: WRITE's control tokens, head and LoRA.

        Args:
            memory: what to decode.
            prefix_input_ids: `(batch, prefix_length)` tokens that the decoded ones follow. A memory written in
                segments needs them: each of its segments was written after the one before.
            on_token: called before each token; what it raises leaves the rest undone.

        Returns:
            `(batch, length)` tokens: each sample's recorded length, or, after a prefix, its longest segment; 0 beyond.

        Raises:
            ValueError: a memory written in segments, without prefixes; of another model; longer than the base's window;
                prefixes that are not one for each memory, or of tokens that the base does not have.
        """
        self.check_memory(memory)
        memory = memory.to(self.device)
        if prefix_input_ids is None and bool(memory.is_segmented.any()):
            raise ValueError(
                "This memory was written in several segments, each after the one before it. Give the tokens before the "
                "segment to decode as prefix_input_ids."
            )
        before = torch.empty((len(memory), 0), dtype=torch.long, device=self.device)
        if prefix_input_ids is not None:
            before = checked_tokens("prefix_input_ids", prefix_input_ids, self.device, dims=(2,))
        return reconstruct(self.writer.phase, memory.embeddings, before, memory.segment_lengths.amax(1), on_token)


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
        check_base(base_model)
        record_base(config, base_model)
        model = GradMemForCausalLM(config, base_model)
    else:
        adapter = Adapter.open(config)
        check_attachable(adapter.config, base_model, config)
        model = adapter.attach(GradMemForCausalLM, base_model)
        model.tokenizer = adapter.tokenizer
    if tokenizer is not None:
        model.tokenizer = tokenizer
    return model


__all__ = ["GradMemForCausalLM", "GradMemOutput", "get_gradmem_model"]
