"""What a base can do, found out by comparing with the plain path, never looked up by the model's type."""

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from transformers import PreTrainedModel

from .layout import packed_layout
from .modes import evaluating, generator, plain_generation, settled
from .output_head import OutputHead
from .running import (
    DecoderInputs,
    KeyValues,
    embedding_weight,
    embeddings_replaced,
    generation_arguments,
    output_changed,
    run,
    side_by_side,
)

Tensor = torch.Tensor

# Largest difference between two routes to the same logits, relative to the logits' spread, that is rounding. In half
# precision it is the root of the mean square at a position: of 49,000 logits there, the one farthest off always is.
_ROUNDING = {torch.float64: 1e-5, torch.float32: 2e-3}
_ROUNDING_HALF = 0.1
_AMPLIFIED = 1024.0
_NEW_TOKENS = 3


def same_but_for_rounding(values: Tensor, reference: Tensor) -> bool:
    """Whether two routes gave the same logits, at the precision they were computed in."""
    if values.shape != reference.shape:
        return False
    difference, spread = (values.double() - reference.double()).abs(), reference.double().std()
    if reference.dtype in _ROUNDING:
        return bool(difference.max() <= _ROUNDING[reference.dtype] * spread)
    return bool(difference.square().mean(-1).sqrt().max() <= _ROUNDING_HALF * spread)


@contextmanager
def probing(base_model: PreTrainedModel) -> Iterator[tuple[Tensor, Tensor]]:
    """Two rows of six ordinary tokens and their mask, for a span that leaves no trace.

    Autocast is off: it would keep the casts made here, without their graph, for what follows.
    """
    device = embedding_weight(base_model).device
    ids = torch.tensor(ordinary_tokens(base_model, 12), device=device).view(2, 6)
    with torch.no_grad(), torch.autocast(device.type, enabled=False), evaluating(), settled(base_model):
        yield ids, torch.ones_like(ids)


def ordinary_tokens(base_model: PreTrainedModel, count: int) -> list[int]:
    """Ids spread over the vocabulary, none of which the base's configuration gives a meaning of its own."""
    special = set(_special_ids(base_model.config.to_dict()))
    vocabulary = embedding_weight(base_model).shape[0]
    ordinary = [token for token in range(vocabulary) if token not in special] or [0]
    return [ordinary[(2 * index + 1) * len(ordinary) // (2 * count)] for index in range(count)]


def _special_ids(config: dict[str, Any]) -> Iterator[int]:
    """Every number called a token id or index in a configuration, sub-configurations included."""
    for name, value in config.items():
        if isinstance(value, dict):
            yield from _special_ids(value)
        elif str(name).endswith(("token_id", "token_index", "token_ids")):
            yield from (token for token in (value if isinstance(value, list) else [value]) if isinstance(token, int))


def _tokens(base_model: PreTrainedModel, ids: Tensor) -> DecoderInputs:
    return DecoderInputs(base_model.get_input_embeddings()(ids), torch.ones_like(ids), ids)


def embeddings_suffice(base_model: PreTrainedModel) -> bool:
    """Whether the base makes the same of embedded tokens as of token ids.

    Some scale embeddings, or look up further ones, on the way from ids only; some take no embeddings but those of
    tokens. They are then run on ids, with the output of the embedding layer replaced.

    Raises:
        TypeError: the base runs on neither.
        ValueError: its logits are NaN or infinite.
    """
    with probing(base_model) as (ids, mask):
        try:
            from_ids = base_model(input_ids=ids, attention_mask=mask, use_cache=False).logits
        except Exception:  # nothing to compare with: the base is run on embeddings and says itself what it lacks
            return True
        _check_finite(base_model, from_ids)
        _check_logits(base_model, from_ids, ids)
        own_error = None
        try:
            embeds = base_model.get_input_embeddings()(ids)
            of_tokens, of_others = (
                base_model(inputs_embeds=vectors, attention_mask=mask, use_cache=False).logits
                for vectors in (embeds.clone(), embeds.roll(1, dims=1) + embeds)
            )
            if same_but_for_rounding(of_tokens, from_ids) and of_others.shape == from_ids.shape:
                return True
        except Exception as error:  # whatever a base raises, it says that it needs the ids
            own_error = error
        _check_replacement(base_model, ids, mask, from_ids, own_error)
    return False


def _check_finite(base_model: PreTrainedModel, logits: Tensor) -> None:
    """Blame broken weights on themselves, before a comparison blames them on what is compared."""
    if logits.isfinite().all():
        return
    broken = [name for name, weight in base_model.named_parameters() if not weight.isfinite().all()]
    where = f"its weight {broken[0]} is, the first of {len(broken)}" if broken else "though none of its weights is"
    raise ValueError(
        f"The logits of {type(base_model).__name__} in {base_model.dtype} are NaN or infinite for ordinary tokens, "
        f"{where}. Load the base again, or in a type with more range."
    )


def _check_logits(base_model: PreTrainedModel, logits: Tensor, ids: Tensor) -> None:
    """Refuse what is not one sequence of next-token logits for each row; warn of a base that looks ahead."""
    name = type(base_model).__name__
    if logits.shape[:2] != ids.shape:
        raise TypeError(
            f"{name} gives logits of shape {tuple(logits.shape)} for tokens of shape {tuple(ids.shape)}. A decoder "
            "with one sequence of logits for each row is needed."
        )
    changed = ids.clone()
    changed[:, -1] = ids[:, 0]
    seen = base_model(input_ids=changed, attention_mask=torch.ones_like(ids), use_cache=False).logits
    if not same_but_for_rounding(seen[:, :-1], logits[:, :-1]):
        warnings.warn(
            f"{name} is not causal: its logits depend on later tokens, so WRITE sees what it reconstructs and the "
            "memory has nothing to hold. Load the base as a decoder (for many, is_decoder=True in its "
            "configuration).",
            stacklevel=2,
        )


def _check_replacement(
    base_model: PreTrainedModel, ids: Tensor, mask: Tensor, expected: Tensor, own_error: Exception | None
) -> None:
    refusal = f"{type(base_model).__name__} cannot be run on embeddings" + (f": {own_error}" if own_error else ".")
    try:
        with embeddings_replaced(base_model, base_model.get_input_embeddings()(ids)):
            logits = base_model(input_ids=ids, attention_mask=mask, use_cache=False).logits
    except RuntimeError as error:
        raise TypeError(refusal) from (own_error or error)
    if not same_but_for_rounding(logits, expected):
        raise TypeError(refusal) from own_error


def generates(base_model: PreTrainedModel, from_cache: bool) -> bool:
    """Whether the base's own `generate(inputs_embeds=...)`, cached and left-padded, follows its plain forward pass.

    Some refuse embeddings there, some place left-padded tokens wrongly, some lose state between steps.

    Args:
        base_model: one that can be run on embeddings.
        from_cache: with the first positions given as keys and values, and no padding.
    """
    first = 2 if from_cache else 0
    with plain_generation(), probing(base_model) as (ids, mask):
        if not from_cache:
            mask[1, :2] = 0
        inputs = _tokens(base_model, ids[:, first:])._replace(attention_mask=mask[:, first:])
        try:
            if from_cache:
                inputs = inputs._replace(past=cached(base_model, _tokens(base_model, ids[:, :first]), True))
            output = generator(base_model).generate(
                **generation_arguments(inputs),
                max_new_tokens=_NEW_TOKENS,
                return_dict_in_generate=True,
                output_logits=True,
            )
        except Exception:  # whatever a base raises, there is the plain forward pass to fall back on
            return False
        generated = torch.stack(output.logits, dim=1)
        for row, real in enumerate(mask.bool()):
            tokens = torch.cat([ids[row, real], output.sequences[row, -_NEW_TOKENS:]])[None]
            plain = run(base_model, base_model, _tokens(base_model, tokens), True).logits[0, -_NEW_TOKENS - 1 : -1]
            if not same_but_for_rounding(generated[row], plain):
                return False
    return True


def cached(base_model: PreTrainedModel, inputs: DecoderInputs, on_embeddings: bool) -> KeyValues:
    """Keys and values that the base caches of these positions, differentiable as the logits are.

    Raises:
        ValueError: it does not keep both of every position in every layer.
    """
    arguments = {"attention_mask": inputs.attention_mask.long(), "use_cache": True}
    decoder = base_model.get_decoder()
    with settled(base_model):
        if on_embeddings:
            output = decoder(inputs_embeds=inputs.embeddings, **arguments)
        else:
            with embeddings_replaced(base_model, inputs.embeddings):
                output = decoder(input_ids=inputs.input_ids, **arguments)
    layers = getattr(getattr(output, "past_key_values", None), "layers", ())
    pairs: tuple[tuple[Any, Any], ...] = tuple(
        (getattr(layer, "keys", None), getattr(layer, "values", None)) for layer in layers
    )
    expected = inputs.embeddings.shape[:2]
    for tensor in (tensor for pair in pairs for tensor in pair):
        if tensor is None or tensor.dim() != 4 or (tensor.shape[0], tensor.shape[2]) != expected:
            pairs = ()
    if not pairs:
        raise ValueError(f"{type(base_model).__name__} does not keep keys and values of each position in every layer.")
    return pairs


def goes_on_from_cache(base_model: PreTrainedModel, on_embeddings: bool) -> bool:
    """Whether the base makes the same of tokens behind a cache as of tokens behind the positions that filled it."""
    with probing(base_model) as (ids, _):
        try:
            first, rest = _tokens(base_model, ids[:, :3]), _tokens(base_model, ids[:, 3:])
            expected = run(base_model, base_model, side_by_side([first, rest]), on_embeddings).logits[:, 3:]
            behind = rest._replace(past=cached(base_model, first, on_embeddings))
            return same_but_for_rounding(run(base_model, base_model, behind, on_embeddings).logits, expected)
        except Exception:  # whatever a base raises, it does not take these
            return False


def keeps_in_cache(base_model: PreTrainedModel, on_embeddings: bool, positions: int) -> bool:
    """Whether the base's cache holds keys and values of so many positions in every layer; sliding windows cut it."""
    with probing(base_model) as (like, _):
        ids = like.new_tensor(ordinary_tokens(base_model, positions))
        try:
            cached(base_model, _tokens(base_model, ids[None]), on_embeddings)
        except ValueError:
            return False
        return True


def keeps_segments_apart(base_model: PreTrainedModel, on_embeddings: bool, prefix_length: int, longest: int) -> bool:
    """Whether one long segment and one short one come out of one row as out of two.

    The base is given a mask of which position sees which, and position ids that start anew. Some mix neighbours beside
    attention, some place tokens otherwise, some have a window of their own.
    """
    short = min(4, longest // 2)
    with probing(base_model) as (like, _):

        def hidden(inputs: DecoderInputs) -> Tensor:
            return run(base_model, base_model.get_decoder(), inputs, on_embeddings).last_hidden_state

        ids = like.new_tensor(ordinary_tokens(base_model, prefix_length + longest))
        prefix, long_one, short_one = ids.split([prefix_length, longest - short, short])
        starts = torch.zeros_like(ids[prefix_length:])
        starts[-short:] = longest - short
        mask, positions, _ = packed_layout(starts[None], prefix_length, base_model.dtype)
        apart = []
        try:
            together = hidden(_tokens(base_model, ids[None])._replace(attention_mask=mask, position_ids=positions))[0]
            for segment in (long_one, short_one):
                row = torch.cat([prefix, segment])[None]
                apart.append(hidden(_tokens(base_model, row))[0, prefix_length:])
        except torch.OutOfMemoryError:  # which says nothing of the base
            raise
        except Exception:  # whatever a base raises, it does not take these
            return False
        return same_but_for_rounding(together[prefix_length:], torch.cat(apart))


def logits_come_from(base_model: PreTrainedModel, on_embeddings: bool, head: OutputHead) -> bool:
    """Whether the base's logits are what `head` makes of the decoder's last hidden state."""
    with probing(base_model) as (ids, _):
        inputs = _tokens(base_model, ids)
        try:
            hidden = run(base_model, base_model.get_decoder(), inputs, on_embeddings).last_hidden_state
            through_head = head(hidden)
        except (AttributeError, RuntimeError, TypeError):
            return False
        return same_but_for_rounding(through_head, run(base_model, base_model, inputs, on_embeddings).logits)


def output_head_is_all(base_model: PreTrainedModel, on_embeddings: bool) -> bool:
    """Whether the base's output layer, and nothing behind it, makes the logits of the last hidden state."""
    module = base_model.get_output_embeddings()
    if not logits_come_from(base_model, on_embeddings, OutputHead(module.weight, getattr(module, "bias", None))):
        return False
    # A cap hardly bends small logits. Behind a head whose output is many times as large it cannot hide.
    with probing(base_model) as (ids, _):
        inputs = _tokens(base_model, ids)
        expected = run(base_model, base_model, inputs, on_embeddings).logits * _AMPLIFIED
        with output_changed(module, lambda output: output * _AMPLIFIED):
            return same_but_for_rounding(run(base_model, base_model, inputs, on_embeddings).logits, expected)
