"""A decoder's inputs as one value, and a run of the base on them: on embeddings, or on token ids in their place."""

import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import nn
from transformers import DynamicCache, PreTrainedModel

from .layout import reorder
from .modes import settled

Tensor = torch.Tensor
# Keys and values of each layer, `(rows, heads, positions, size)`.
KeyValues = tuple[tuple[Tensor, Tensor], ...]
# PyTorch numbers hooks without a lock, and one takes the place of another of its number.
_REGISTERING = threading.Lock()


class DecoderInputs(NamedTuple):
    """Positions that a decoder runs over, with what stands in its cache before them.

    Attributes:
        embeddings: `(rows, length, hidden_size)`.
        attention_mask: `(rows, length)`, non-zero at what is no padding; or `(rows, 1, length, cached + length)`, to
            add to the scores.
        input_ids: `(rows, length)`, the tokens; an ordinary one where a vector stands for none.
        position_ids: `(rows, length)`; the base counts by itself when `None`.
        past: keys and values of the positions before these, all of them seen, *optional*.
    """

    embeddings: Tensor
    attention_mask: Tensor
    input_ids: Tensor
    position_ids: Tensor | None = None
    past: KeyValues | None = None

    @property
    def length(self) -> int:
        return self.embeddings.shape[1]

    @property
    def cached_length(self) -> int:
        """Positions in the cache before these."""
        return 0 if self.past is None else self.past[0][0].shape[2]

    def take(self, rows: Tensor) -> "DecoderInputs":
        """Some of the rows, or rows several times. Position ids are not carried over."""
        past = self.past
        if past is not None:
            past = tuple((keys.index_select(0, rows), values.index_select(0, rows)) for keys, values in past)
        embeddings, attention_mask, input_ids = (part.index_select(0, rows) for part in self[:3])
        return DecoderInputs(embeddings, attention_mask, input_ids, past=past)

    def reordered(self, order: Tensor) -> "DecoderInputs":
        """The positions `(rows, length)` in another order; the cache stays in front."""
        embeddings, attention_mask, input_ids = (reorder(part, order) for part in self[:3])
        return DecoderInputs(embeddings, attention_mask, input_ids, past=self.past)


def side_by_side(parts: Sequence[DecoderInputs]) -> DecoderInputs:
    """The positions of each part behind those of the one before; the first may have a cache in front."""
    return DecoderInputs(
        embeddings=torch.cat([part.embeddings for part in parts], dim=1),
        attention_mask=torch.cat([part.attention_mask for part in parts], dim=1),
        input_ids=torch.cat([part.input_ids for part in parts], dim=1),
        past=parts[0].past,
    )


def run(base_model: PreTrainedModel, module: nn.Module, inputs: DecoderInputs, on_embeddings: bool) -> Any:
    """One forward pass.

    Args:
        base_model: the whole base, which has the embedding layer.
        module: the base, or its decoder alone.
        inputs: what to run on.
        on_embeddings: whether the base makes the same of embeddings as of ids. Otherwise it is run on the ids, with the
            output of its embedding layer replaced.
    """
    mask = inputs.attention_mask
    if mask.dim() == 2:
        mask = mask.long()
        if inputs.past is not None:
            mask = torch.cat([mask.new_ones((mask.shape[0], inputs.cached_length)), mask], dim=1)
    arguments: dict[str, Any] = {"attention_mask": mask, "use_cache": False}
    if inputs.position_ids is not None:
        arguments["position_ids"] = inputs.position_ids
    if inputs.past is not None:
        arguments["past_key_values"] = cache_of(inputs.past)
    with settled(base_model):
        if on_embeddings:
            return module(inputs_embeds=inputs.embeddings, **arguments)
        with embeddings_replaced(base_model, inputs.embeddings):
            return module(input_ids=inputs.input_ids, **arguments)


def generation_arguments(inputs: DecoderInputs) -> dict[str, Any]:
    """What the base's own `generate` is given to go on from these positions, padded on the left."""
    mask, embeddings = inputs.attention_mask.long(), inputs.embeddings
    if inputs.past is None:
        return {"inputs_embeds": embeddings, "attention_mask": mask}
    # It takes the whole sequence and cuts off as many positions as the cache holds: what stands there is not read.
    cached = (len(mask), inputs.cached_length)
    return {
        "inputs_embeds": torch.cat([embeddings.new_zeros((*cached, embeddings.shape[2])), embeddings], dim=1),
        "attention_mask": torch.cat([mask.new_ones(cached), mask], dim=1),
        "past_key_values": cache_of(inputs.past),
    }


def embedding_weight(base_model: PreTrainedModel) -> Tensor:
    """The base's token embedding, `(vocabulary, hidden_size)`."""
    embeddings: Any = base_model.get_input_embeddings()  # a module, of which no type says that it has a weight
    return embeddings.weight


def cache_of(past: KeyValues) -> DynamicCache:
    """A cache of Transformers that holds `past`: a new one, since a run writes into it."""
    return DynamicCache(past)


@contextmanager
def output_changed(module: nn.Module, change: Callable[[Tensor], Tensor | None]) -> Iterator[None]:
    """Have a module's output changed for a span, where this thread calls it.

    Args:
        module: of the base.
        change: gives another output, or `None` for its own.
    """
    thread = threading.get_ident()

    def hook(module: nn.Module, arguments: tuple, output: Tensor) -> Tensor | None:
        return change(output) if threading.get_ident() == thread else None

    with _REGISTERING:
        handle = module.register_forward_hook(hook)
    try:
        yield
    finally:
        handle.remove()


@contextmanager
def embeddings_replaced(base_model: PreTrainedModel, inputs_embeds: Tensor) -> Iterator[None]:
    """Have the base's embedding layer answer its next call with `inputs_embeds`.

    Raises:
        RuntimeError: the layer was not called, or for another shape.
    """
    replaced = False

    def replace(output: Tensor) -> Tensor | None:
        nonlocal replaced
        if replaced:
            return None
        if output.shape != inputs_embeds.shape:
            raise RuntimeError(
                f"the embedding layer was called for {tuple(output.shape)}, not {tuple(inputs_embeds.shape)}"
            )
        replaced = True
        return inputs_embeds.clone()

    with output_changed(base_model.get_input_embeddings(), replace):
        yield
    if not replaced:
        raise RuntimeError("the embedding layer was not called")
