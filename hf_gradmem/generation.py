"""Generating from a memory, and decoding what a memory holds."""

from typing import Any

import torch
from transformers import GenerationConfig, GenerationMixin
from transformers.utils import ModelOutput

from .adapters import lora_phase
from .decoder import modules_in_eval
from .inputs import Queries, checked_queries
from .memory import GradMemMemory
from .padding import reorder, token_order
from .reading import count_new_tokens
from .writing.objective import whole_rows

Tensor = torch.Tensor


class GradMemGenerationMixin(GenerationMixin):
    """The part of [`GradMemForCausalLM`] that generates."""

    @torch.no_grad()
    def generate(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        *,
        memory: GradMemMemory | None = None,
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
            memory: one memory for all prompts, or one for each.
            context_input_ids, context_attention_mask, context_segment_ids, write_steps: contexts to write first,
                in place of a memory.
            context_index: `(rows,)`, which memory each prompt reads.
            generation_config: the base's by default.
            streamer: as in `generate` of the base.
            kwargs: passed on to `generate` of the base. `max_length` and `min_length` count the prompt but not the
                memory. Processors that look at the prompt's tokens, such as `repetition_penalty`, see the new ones
                only.

        Returns:
            Prompt and continuation, `(rows · num_return_sequences, prompt_length + new)`; the prompt as it was given.

        Raises:
            ValueError: neither a memory nor a context, shapes that do not match, or no room for a new token.
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
        elif context_input_ids is not None:
            raise ValueError("Give either a memory or context_input_ids, and not both.")
        self._check_memory(memory)
        memory = memory.to(self.device)
        if input_ids is not None and input_ids.dim() != 2:
            raise ValueError(
                f"generate takes flat prompts (rows, prompt_length), got shape {tuple(input_ids.shape)}. Flatten them "
                "and say with context_index which memory each one reads."
            )
        queries = checked_queries(input_ids, attention_mask, None, context_index, len(memory), self.device)
        arguments = {**kwargs, "generation_config": generation_config, "streamer": streamer}
        if self.decoder.generates_from_embeddings:
            output = self._generate_from_embeddings(memory, queries, arguments)
        else:
            output = self._generate_from_forward(memory, queries, arguments)
        new_tokens_from = 0 if self.decoder.generates_from_embeddings else queries.input_ids.shape[1]
        sequences = output.sequences if isinstance(output, ModelOutput) else output
        prompt = queries.input_ids.repeat_interleave(len(sequences) // len(queries.input_ids), dim=0)
        sequences = torch.cat([prompt, sequences[:, new_tokens_from:]], dim=1)
        if not isinstance(output, ModelOutput):
            return sequences
        output.sequences = sequences
        return output

    def _generate_from_embeddings(
        self, memory: GradMemMemory, queries: Queries, arguments: dict[str, Any]
    ) -> Tensor | ModelOutput:
        """The base's own, cached generation from `[padding, memory, prompt]`; gives the new tokens alone."""
        embeds, mask, _, _ = self._read_inputs(memory, queries, "left")
        if arguments["streamer"] is not None:
            arguments["streamer"].put(queries.input_ids.cpu())
        arguments = count_new_tokens(arguments, self.generation_config, prompt_length=queries.input_ids.shape[1])
        with lora_phase(self.base_model, "read"):
            return self.base_model.generate(inputs_embeds=embeds, attention_mask=mask.long(), **arguments)

    def _generate_from_forward(
        self, memory: GradMemMemory, queries: Queries, arguments: dict[str, Any]
    ) -> Tensor | ModelOutput:
        """Generation from this model's own forward pass, for bases that cannot go on from embeddings.

        Slower, since nothing is cached, but right wherever `forward` is; gives prompt and new tokens.
        """
        order = token_order(queries.attention_mask, "left")
        return super().generate(
            reorder(queries.input_ids, order),
            attention_mask=reorder(queries.attention_mask, order).long(),
            memory=memory,
            context_index=queries.memory_index,
            **arguments | {"use_cache": False},
        )

    def prepare_inputs_for_generation(self, input_ids: Tensor, **kwargs: Any) -> dict[str, Any]:
        """What `forward` needs at each step of generation; the whole sequence, since nothing is cached."""
        return {"input_ids": input_ids} | {
            name: kwargs[name] for name in ("attention_mask", "memory", "context_index") if name in kwargs
        }

    @torch.no_grad()
    def reconstruct(self, memory: GradMemMemory, prefix_input_ids: Tensor | None = None) -> Tensor:
        """Decode memories greedily under the conditions they were written in: WRITE's control tokens, head and LoRA.

        Args:
            memory: what to decode.
            prefix_input_ids: `(batch, prefix_length)` tokens that the decoded ones follow. A memory written in
                segments needs them: each of its segments was written after the one before.

        Returns:
            `(batch, length)` tokens: as many as each sample's recorded length, or, after a prefix, its longest
            segment; 0 beyond.

        Raises:
            ValueError: a memory written in segments, without prefixes; a memory of another model.
        """
        self._check_memory(memory)
        memory = memory.to(self.device)
        if prefix_input_ids is None and bool(memory.is_segmented.any()):
            raise ValueError(
                "This memory was written in several segments, each after the one before it. Give the tokens before the "
                "segment to decode as prefix_input_ids."
            )
        lengths = memory.segment_lengths.max(dim=1).values
        start = self._prefix(memory.embeddings, self.write_start, self.write_end)
        before = decoded = torch.empty((len(memory), 0), dtype=torch.long, device=self.device)
        if prefix_input_ids is not None:
            before = checked_queries(prefix_input_ids, None, None, None, len(memory), self.device).input_ids
        unknown = before.new_zeros((len(memory), 1))
        with modules_in_eval(self):
            for _ in range(int(lengths.max())):
                rows = whole_rows(before, torch.cat([decoded, unknown], dim=1))
                decoded = torch.cat([decoded, self._write_logits(start, rows)[:, -1:].argmax(-1)], dim=1)
        return decoded.masked_fill(torch.arange(decoded.shape[1], device=self.device) >= lengths[:, None], 0)
