"""Generation: the base's own from memory and prompt where that is right, else from this model's forward pass."""

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch.nn import functional
from transformers import (
    DynamicCache,
    GenerationConfig,
    GenerationMixin,
    LogitsProcessorList,
    PreTrainedTokenizerBase,
    RepetitionPenaltyLogitsProcessor,
)
from transformers.utils import ModelOutput

from ..base.layout import reorder, token_order
from ..base.modes import generator
from ..base.running import generation_arguments
from ..memory.phase import Phase
from ..memory.written import GradMemMemory
from .queries import Queries
from .read import read_inputs

Tensor = torch.Tensor
_NEW_TOKENS = 20  # what `generate` gives where nothing sets a length
_PROMPTS = ("inputs", "inputs_embeds", "past_key_values", "position_ids")
_REPEATING = ("num_beams", "num_return_sequences")  # each of which multiplies the rows


def can_generate_from_base(phase: Phase, queries: Queries) -> bool:
    """Whether the base's own `generate` follows its forward pass behind memories and these prompts.

    Behind a memory in the cache it takes rows of one length alone: padding would stand between the memory and the
    prompt, and push the memory out of a sliding window.
    """
    return phase.generates and (not phase.form.in_cache or bool(queries.attention_mask.all()))


def runs_of_prompts(phase: Phase, attention_mask: Tensor, room: float = math.inf) -> list[tuple[list[int], int]]:
    """How left-padded prompts are best generated from: all together, or those of one length.

    The latter where a memory lies in the base's cache, since the base's own generation, which keeps what it has read,
    then bears no padding; and where the longest prompt would cut the answers to the others short.

    Args:
        phase: READ.
        attention_mask: `(prompts, length)`.
        room: most tokens of a prompt behind which the base's window has room for a whole answer.

    Returns:
        The rows of each run, and the position where its prompts begin.
    """
    if not phase.form.in_cache and attention_mask.shape[1] <= room:
        return [(list(range(len(attention_mask))), 0)]
    lengths, width = attention_mask.sum(1).tolist(), attention_mask.shape[1]
    return [
        ([row for row, own in enumerate(lengths) if own == length], width - length) for length in sorted(set(lengths))
    ]


def new_sequences(
    model: Any,
    memory: GradMemMemory,
    input_ids: Tensor,
    attention_mask: Tensor,
    context_index: Sequence[int] | Tensor,
    **arguments: Any,
) -> list[list[list[int]]]:
    """The tokens that `model.generate` puts behind left-padded prompts, in as many runs as is best.

    Args:
        model: the reader; its class is on a floor above.
        memory: what is read.
        input_ids, attention_mask: `(prompts, length)`.
        context_index: the memory of each prompt.
        arguments: of `generate`.

    Returns:
        For each prompt, the new tokens of each sequence that is returned for it. Those of one run are as long as its
        longest.
    """
    index, found = torch.as_tensor(context_index), [list[list[int]]()] * len(input_ids)
    phase, width = model.read_phase, input_ids.shape[1]
    room = phase.room(phase.memories_in(memory.embeddings))
    whole, default = math.inf, model.generation_config
    if room is not None:
        whole = room - _most_new_tokens(count_new_tokens(arguments, default, width), default)
    for rows, start in runs_of_prompts(phase, attention_mask, whole):
        prompts, mask = input_ids[rows, start:], attention_mask[rows, start:]
        output = model.generate(prompts, attention_mask=mask, memory=memory, context_index=index[rows], **arguments)
        sequences = output if isinstance(output, Tensor) else output.sequences
        new = sequences[:, prompts.shape[1] :]
        for row, of_one in zip(rows, new.tensor_split(len(rows)), strict=True):
            found[row] = of_one.tolist()
    return found


def new_tokens(*arguments: Any, **options: Any) -> list[list[int]]:
    """The new tokens of each prompt, of which one sequence is returned: as [`new_sequences`]."""
    return [tokens for (tokens,) in new_sequences(*arguments, **options)]


def generate_from_base(
    phase: Phase, memory: Tensor, queries: Queries, arguments: dict[str, Any]
) -> Tensor | ModelOutput:
    """The base's own, cached generation from `[padding, memory, prompt]`; gives the new tokens alone.

    Args:
        phase: READ.
        memory: `(memories, num_memory_tokens, width)`.
        queries: the prompts.
        arguments: as of [`checked_arguments`], `streamer` among them.
    """
    inputs, _ = read_inputs(phase, memory, queries, "left")
    base_model = generator(phase.decoder.base_model)
    _stream_prompts(queries, arguments)
    given = generation_arguments(inputs)
    if inputs.past is not None:
        arguments = arguments | {"cache_implementation": None}  # whatever the base's settings say: there is a cache
        # `generate` repeats the rows for beams and returned sequences, and leaves a cache that it is given as it is.
        times = max(_setting(arguments, base_model.generation_config, name) or 1 for name in _REPEATING)
        given["past_key_values"].batch_repeat_interleave(times)
    with phase.active():
        return base_model.generate(**given, **arguments)


def generate_from_forward(
    model: Any, memory: GradMemMemory, queries: Queries, arguments: dict[str, Any]
) -> Tensor | ModelOutput:
    """For bases that cannot go on from a memory: slower, since nothing is cached, but right where `forward` is.

    Gives the new tokens alone, and shows no others to processors, as [`generate_from_base`] does.

    Args:
        model: the reader, a `GenerationMixin`.
        memory: what is read.
        queries: the prompts.
        arguments: as in [`generate_from_base`].
    """
    for name in ("output_hidden_states", "output_attentions"):
        if _setting(arguments, model.generation_config, name):
            raise ValueError(
                f"{name}=True needs a base that goes on from this memory by its cache, and prompts of one length where "
                "it is keys and values. Leave it out."
            )
    prompts, mask = _sorted_prompts(queries)
    _stream_prompts(queries, arguments)
    return GenerationMixin.generate(
        model,
        # They stand for the prompts, and are not read.
        inputs_embeds=torch.zeros((*prompts.shape, 1), device=prompts.device),
        prompts=prompts,
        attention_mask=mask,
        memory=memory,
        context_index=queries.memory_index,
        # From vectors it insists on a cache, and not every base's can be made: this one stays empty.
        **arguments | {"cache_implementation": None, "past_key_values": DynamicCache()},
    )


def _stream_prompts(queries: Queries, arguments: dict[str, Any]) -> None:
    if arguments["streamer"] is not None:
        arguments["streamer"].put(queries.input_ids.cpu())


def _sorted_prompts(queries: Queries) -> tuple[Tensor, Tensor]:
    """Prompts and their mask with the padding on the left, where generation goes on from the right.

    There is one position at least, if only of padding: `generate` looks at the last one.
    """
    missing = max(1 - queries.input_ids.shape[1], 0)
    input_ids, mask = (functional.pad(part, (missing, 0)) for part in (queries.input_ids, queries.attention_mask))
    order = token_order(mask, "left")
    return reorder(input_ids, order), reorder(mask, order).long()


def with_prompts(output: Tensor | ModelOutput, prompts: Tensor) -> Tensor | ModelOutput:
    """What `generate` gave, new tokens, each sequence behind its prompt as it was given.

    Args:
        output: of `generate`.
        prompts: `(rows, prompt_length)`.
    """
    sequences = output["sequences"] if isinstance(output, ModelOutput) else output
    prompts = prompts.repeat_interleave(len(sequences) // len(prompts), dim=0)
    sequences = torch.cat([prompts, sequences], dim=1)
    if not isinstance(output, ModelOutput):
        return sequences
    output.sequences = sequences
    return output


def _setting(arguments: dict[str, Any], default: GenerationConfig, name: str) -> Any:
    """A setting of a generation: given by itself, in a `generation_config`, or by default."""
    given = (arguments.get(name), getattr(arguments.get("generation_config"), name, None), getattr(default, name, None))
    return next((value for value in given if value is not None), None)


def _most_new_tokens(counted: dict[str, Any], default: GenerationConfig) -> int:
    """How many new tokens `generate` would give at most, by arguments as of [`count_new_tokens`]."""
    asked = _setting(counted, default, "max_new_tokens")
    return _NEW_TOKENS if asked is None else asked


def _check_settings(phase: Phase, arguments: dict[str, Any], default: GenerationConfig) -> None:
    refused = {
        "assistant_model": None,
        "assistant_early_exit": None,
        "guidance_scale": 1,
        "prefill_chunk_size": None,
    }
    if given := [name for name in _PROMPTS if arguments.get(name) is not None]:
        raise ValueError(
            f"{' and '.join(given)} of generate means the prompt, which stands behind a memory here. Give input_ids "
            "and attention_mask alone."
        )
    if phase.form.in_cache or not phase.generates:
        refused["prompt_lookup_num_tokens"] = None
    for name, nothing in refused.items():
        value = _setting(arguments, default, name)
        if value not in (None, nothing):
            shown = type(value).__name__ if name == "assistant_model" else repr(value)
            raise ValueError(
                f"{name}={shown} runs the base without the memory, or over what is cached of it. Leave it out."
            )


def _with_own_penalty(arguments: dict[str, Any], default: GenerationConfig) -> dict[str, Any]:
    """The repetition penalty as a processor of our own: `generate` takes as many tokens for padding, which it does not
    look at, as there are before a row's prompt, though the prompt is not among the tokens that it looks at."""
    penalty = _setting(arguments, default, "repetition_penalty")
    if penalty in (None, 1):
        return arguments
    processors = [RepetitionPenaltyLogitsProcessor(penalty), *(arguments.get("logits_processor") or ())]
    return arguments | {"repetition_penalty": 1.0, "logits_processor": LogitsProcessorList(processors)}


def checked_arguments(
    phase: Phase, memory: Tensor, queries: Queries, arguments: dict[str, Any], default: GenerationConfig
) -> dict[str, Any]:
    """Arguments of `generate` that mean the same behind a memory, for either way to generate.

    Lengths count new tokens, which end where the base's window does, and a repetition penalty is of new tokens alone.

    Args:
        phase: READ.
        memory: `(memories, num_memory_tokens, width)`.
        queries: the prompts.
        arguments: those of `generate`, `generation_config` among them.
        default: the generation configuration behind them.

    Raises:
        ValueError: there is no room for a new token, or a setting has no such meaning.
    """
    _check_settings(phase, arguments, default)
    arguments = _with_own_penalty(arguments, default)
    width, room = queries.input_ids.shape[1], phase.room(phase.memories_in(memory))
    counted = count_new_tokens(arguments, default, width)
    most = _most_new_tokens(counted, default)
    if room is None or width + most <= room:
        return counted
    longest = int(queries.attention_mask.sum(1).max()) if width else 0
    if longest >= room:
        raise ValueError(
            f"The longest prompt has {longest} tokens, but {phase.told_room(room)} for it and a new token. Shorten it."
        )
    return counted | {"max_new_tokens": min(most, room - longest)}


def count_new_tokens(arguments: dict[str, Any], default: GenerationConfig, prompt_length: int) -> dict[str, Any]:
    """Turn lengths that count the prompt into lengths that count new tokens.

    `generate(inputs_embeds=...)` of the base would count the memory's vectors as well.

    Args:
        arguments: those of `generate`, `generation_config` among them.
        default: the generation configuration behind them.
        prompt_length: tokens in the prompt.

    Raises:
        ValueError: `max_length` leaves no room for a new token.
    """
    max_length, max_new_tokens, min_length, min_new_tokens = (
        _setting(arguments, default, name) for name in ("max_length", "max_new_tokens", "min_length", "min_new_tokens")
    )
    lengths = {}
    if max_new_tokens is None and max_length is not None:
        if max_length <= prompt_length:
            raise ValueError(
                f"max_length={max_length} leaves no room after a prompt of {prompt_length} tokens. "
                "Raise it, or give max_new_tokens."
            )
        lengths["max_new_tokens"] = max_length - prompt_length
    if min_new_tokens is None and min_length:
        lengths["min_new_tokens"] = max(min_length - prompt_length, 0)
    kept = {name: value for name, value in arguments.items() if name not in ("max_length", "min_length")}
    return kept | lengths


def ending_tokens(tokenizer: PreTrainedTokenizerBase, default: GenerationConfig) -> dict[str, Any]:
    """Which tokens end an answer, and which one fills up those that ended early, as arguments of `generate`.

    An answer ends in the tokenizer's end token, which training puts there, or in one of the base's own.
    """
    base = default.eos_token_id
    ends = [*(base if isinstance(base, list) else [base]), tokenizer.eos_token_id]
    ends = list(dict.fromkeys(token for token in ends if token is not None))
    padding = (tokenizer.pad_token_id, default.pad_token_id, *ends)
    arguments = {"eos_token_id": ends or None, "pad_token_id": next((t for t in padding if t is not None), None)}
    return {name: value for name, value in arguments.items() if value is not None}
