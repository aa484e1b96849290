"""What memories decode to, as text: before an answer, where the adapter's template has it recited first."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from itertools import chain
from typing import Any
from weakref import WeakKeyDictionary

import torch

from ..base.weights import hash_tensors
from ..memory.written import GradMemMemory
from ..template import get_template
from ..writing.objectives.reconstruction import OnToken
from .queries import tokenize_queries

Tensor = torch.Tensor

_KEPT = 1024  # decoded memories of one model
_known: WeakKeyDictionary[Any, dict[str, list[int]]] = WeakKeyDictionary()


def recite(model: Any, memory: GradMemMemory, on_token: OnToken | None = None) -> list[str]:
    """The text that each memory decodes to, greedily: as many tokens as were written, right or wrong.

    A memory that was written in segments is decoded one segment after the other, each behind what came before it. The
    last tokens of a model are kept, so the next question on a memory does not wait for it again; a model or a memory
    that has changed is decoded anew.

    Args:
        model: the writer, with a tokenizer; its class is on a floor above.
        memory: as many as there are texts to be.
        on_token: called at each token; what it raises leaves the rest undone.

    Raises:
        ValueError: a memory of another model, or in segments of which none was written behind another.
    """
    known = _known.setdefault(model, {})
    config = model.config
    writer = (
        model.identity(thorough=False).fingerprint,
        model.dtype,
        config.write_prompt,
        config.write_prefix_segments,
    )
    lengths = [tuple(length for length in row if length) for row in memory.segment_lengths.tolist()]
    keys = [
        hash_tensors({"memory": one}, [writer, length]) for one, length in zip(memory.embeddings, lengths, strict=True)
    ]
    found = {key: known[key] for key in keys if key in known}
    missing = {key: index for index, key in enumerate(keys) if key not in found}
    if missing:
        found |= zip(missing, _decoded(model, memory[list(missing.values())], on_token), strict=True)
    known.update(found)
    for key in list(known)[:-_KEPT]:
        known.pop(key, None)
    return [model.tokenizer.decode(found[key], clean_up_tokenization_spaces=False) for key in keys]


def _decoded(model: Any, memory: GradMemMemory, on_token: OnToken | None) -> list[list[int]]:
    """The tokens of each."""
    tokens: list[list[int]] = [[] for _ in range(len(memory))]
    whole = (~memory.is_segmented).nonzero().flatten().tolist()
    if whole:
        decoded = model.reconstruct(memory[whole], on_token=on_token).tolist()
        for index, row, length in zip(whole, decoded, memory[whole].num_context_tokens.tolist(), strict=True):
            tokens[index] = row[:length]
    for index in memory.is_segmented.nonzero().flatten().tolist():
        tokens[index] = _segments(model, memory[index], on_token)
    return tokens


def _segments(model: Any, memory: GradMemMemory, on_token: OnToken | None) -> list[int]:
    before = model.config.write_prefix_segments
    if not before:
        raise ValueError(
            "This memory was written in segments of which none follows another (write_prefix_segments=0): nothing "
            "says which comes next, so they cannot be recited. Answer under a template without {context} in the words "
            "for a query."
        )
    segments: list[list[int]] = []
    for length in filter(None, memory.segment_lengths[0].tolist()):  # 0 may stand between: where it was written on
        prefix = torch.tensor([list(chain(*segments[-before:]))], dtype=torch.long)
        one = replace(memory, segment_lengths=torch.tensor([[length]]))
        segments.append(model.reconstruct(one, prefix, on_token)[0].tolist())
    return list(chain(*segments))


def recited(
    model: Any,
    memory: GradMemMemory,
    context_index: Sequence[int],
    template: str | Mapping[str, str],
) -> list[str | None]:
    """What the memory of each question recites; `None` under a template that has nothing recited.

    Args:
        model: the reader.
        memory: what is read.
        context_index: the memory of each question.
        template: the words around a question.

    Raises:
        ValueError: as of [`recite`], and for memories that are read side by side.
    """
    asked = sorted(set(context_index))
    if not asked or not get_template(template, model.tokenizer).recites:
        return [None] * len(context_index)
    if memory.shape[1] != model.form.num_memory_tokens:
        raise ValueError(
            "Several memories read side by side are not recited. Read one at a time, or answer under a template "
            "without {context} in the words for a query."
        )
    of_index = dict(zip(asked, recite(model, memory[asked]), strict=True))
    return [of_index[index] for index in context_index]


def tokenize_asked(
    model: Any,
    memory: GradMemMemory,
    questions: Sequence[str],
    context_index: Sequence[int],
    template: str | Mapping[str, str],
) -> tuple[Tensor, Tensor]:
    """Questions as [`tokenize_queries`] gives them, each behind what its memory recites; otherwise as [`recited`]."""
    before = recited(model, memory, context_index, template)
    return tokenize_queries(questions, model.tokenizer, template, before)
