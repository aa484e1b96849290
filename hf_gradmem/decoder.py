"""The base decoder, as this package runs it: through public calls, on embeddings.

What a path needs to know of the base is probed once, by comparing with the plain path, and never looked up by the
model's type.
"""

import functools
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from transformers import GenerationConfig, PreTrainedModel

from .writing.output_loss import OutputHead
from .writing.packing import packed_layout

Tensor = torch.Tensor

# Largest difference between two routes to the same logits, relative to the logits' spread, that is rounding.
_ROUNDING = {torch.float64: 1e-5, torch.float32: 2e-3}
_ROUNDING_HALF = 0.1
_AMPLIFIED = 1024.0


class Decoder:
    """Runs a base decoder on embeddings and knows what the base can do.

    Args:
        base_model: a decoder with a language-model head.
    """

    def __init__(self, base_model: PreTrainedModel) -> None:
        self.base_model = base_model
        self._kept_apart: dict[tuple[int, int, str | None], bool] = {}

    def embed(self, input_ids: Tensor) -> Tensor:
        """Token embeddings `(rows, length, hidden_size)`."""
        return self.base_model.get_input_embeddings()(input_ids)

    @property
    def vocab_size(self) -> int:
        return self.base_model.get_input_embeddings().weight.shape[0]

    def prefix_ids(self, prefix: Tensor) -> Tensor:
        """Ids to stand where memory vectors are: an ordinary token, since some bases count padding ids."""
        return torch.full(prefix.shape[:2], self._placeholder, dtype=torch.long, device=prefix.device)

    def probe(self) -> None:
        """Find out now what every run needs to know of the base, which none that is traced can find out."""
        self.embeddings_suffice, self._placeholder  # noqa: B018

    @property
    def window(self) -> int | None:
        """Positions that the base can take; `None` where its configuration sets no limit."""
        positions = getattr(self.base_model.config.get_text_config(), "max_position_embeddings", None)
        return positions if positions is not None and positions > 0 else None

    @functools.cached_property
    def _placeholder(self) -> int:
        return self._ordinary_tokens(1)[0]

    def logits(self, *inputs: Tensor) -> Tensor:
        """Logits `(rows, length, vocab)`.

        Args:
            inputs: `inputs_embeds` `(rows, length, hidden_size)`; `attention_mask` `(rows, length)`, or `(rows, 1,
                length, length)` to add to the scores; `input_ids` `(rows, length)` of the same positions,
                [`prefix_ids`] where there are none; optionally `position_ids` `(rows, length)`.
        """
        return self._run(self.base_model, *inputs).logits

    def hidden_states(self, *inputs: Tensor) -> Tensor:
        """Last hidden states `(rows, length, hidden_size)`, without the cost of the logits; likewise."""
        return self._run(self.base_model.get_decoder(), *inputs).last_hidden_state

    def _run(
        self,
        module: nn.Module,
        inputs_embeds: Tensor,
        attention_mask: Tensor,
        input_ids: Tensor,
        position_ids: Tensor | None = None,
    ) -> Any:
        mask = attention_mask.long() if attention_mask.dim() == 2 else attention_mask
        arguments = {"attention_mask": mask, "use_cache": False}
        if position_ids is not None:
            arguments["position_ids"] = position_ids
        if self.embeddings_suffice:
            return module(inputs_embeds=inputs_embeds, **arguments)
        with _embeddings_replaced(self.base_model, inputs_embeds):
            return module(input_ids=input_ids, **arguments)

    @functools.cached_property
    def embeddings_suffice(self) -> bool:
        """Whether the base makes the same of embedded tokens as of token ids.

        Some scale embeddings, or look up further ones, on the way from ids only; some take no embeddings but those of
        tokens. They are then run on ids, with the output of the embedding layer replaced.

        Raises:
            TypeError: the base runs on neither.
        """
        with self._probing() as (ids, mask):
            try:
                from_ids = self.base_model(input_ids=ids, attention_mask=mask, use_cache=False).logits
            except Exception:  # nothing to compare with: the base is run on embeddings and says itself what it lacks
                return True
            self._check_logits(from_ids, ids)
            own_error = None
            try:
                embeds = self.embed(ids)
                of_tokens, of_others = (
                    self.base_model(inputs_embeds=vectors, attention_mask=mask, use_cache=False).logits
                    for vectors in (embeds.clone(), embeds.roll(1, dims=1) + embeds)
                )
                if same_but_for_rounding(of_tokens, from_ids) and of_others.shape == from_ids.shape:
                    return True
            except Exception as error:  # whatever a base raises, it says that it needs the ids
                own_error = error
            self._check_replacement(ids, mask, from_ids, own_error)
        return False

    def _check_logits(self, logits: Tensor, ids: Tensor) -> None:
        """Refuse what is not one sequence of next-token logits for each row; warn of a base that looks ahead."""
        name = type(self.base_model).__name__
        if logits.shape[:2] != ids.shape:
            raise TypeError(
                f"{name} gives logits of shape {tuple(logits.shape)} for tokens of shape {tuple(ids.shape)}. A decoder "
                "with one sequence of logits for each row is needed."
            )
        changed = ids.clone()
        changed[:, -1] = ids[:, 0]
        seen = self.base_model(input_ids=changed, attention_mask=torch.ones_like(ids), use_cache=False).logits
        if not same_but_for_rounding(seen[:, :-1], logits[:, :-1]):
            warnings.warn(
                f"{name} is not causal: its logits depend on later tokens, so WRITE sees what it reconstructs and the "
                "memory has nothing to hold. Load the base as a decoder (for many, is_decoder=True in its "
                "configuration).",
                stacklevel=2,
            )

    def _check_replacement(self, ids: Tensor, mask: Tensor, expected: Tensor, own_error: Exception | None) -> None:
        name = type(self.base_model).__name__
        refusal = f"{name} cannot be run on embeddings" + (f": {own_error}" if own_error else ".")
        try:
            with _embeddings_replaced(self.base_model, self.embed(ids)):
                logits = self.base_model(input_ids=ids, attention_mask=mask, use_cache=False).logits
        except RuntimeError as error:
            raise TypeError(refusal) from (own_error or error)
        if not same_but_for_rounding(logits, expected):
            raise TypeError(refusal) from own_error

    @functools.cached_property
    def generates_from_embeddings(self) -> bool:
        """Whether the base's own `generate(inputs_embeds=...)`, cached and left-padded, follows its plain forward pass.

        Some refuse embeddings there, some place left-padded tokens wrongly, some lose state between steps.
        """
        if not self.embeddings_suffice:
            return False
        new_tokens = 3
        with self._probing() as (ids, mask), plain_generation(self.base_model):
            mask[1, :2] = 0
            try:
                output = self.base_model.generate(
                    inputs_embeds=self.embed(ids),
                    attention_mask=mask,
                    max_new_tokens=new_tokens,
                    return_dict_in_generate=True,
                    output_logits=True,
                )
            except Exception:  # whatever a base raises, there is the plain forward pass to fall back on
                return False
            generated = torch.stack(output.logits, dim=1)
            for row, real in enumerate(mask.bool()):
                tokens = torch.cat([ids[row, real], output.sequences[row, -new_tokens:]])[None]
                plain = self.base_model(
                    inputs_embeds=self.embed(tokens), attention_mask=torch.ones_like(tokens), use_cache=False
                ).logits[0, -new_tokens - 1 : -1]
                if not same_but_for_rounding(generated[row], plain):
                    return False
        return True

    def keeps_segments_apart(self, prefix_length: int, longest: int) -> bool:
        """Whether segments side by side in one row come out as in rows of their own.

        The base is given a mask of which position sees which, and position ids that start anew. Some mix neighbours
        beside attention, some place tokens otherwise, some have a window of their own.

        Args:
            prefix_length: positions that all segments see.
            longest: tokens in a row at most.
        """
        asked = prefix_length, longest, self.base_model.config._attn_implementation
        if asked not in self._kept_apart:
            self._kept_apart[asked] = longest >= 2 and self._probe_segments(prefix_length, longest)
        return self._kept_apart[asked]

    def _probe_segments(self, prefix_length: int, longest: int) -> bool:
        """One long segment and one short one, in one row and in two."""
        short = min(4, longest // 2)
        with self._probing() as (like, _):
            ids = like.new_tensor(self._ordinary_tokens(prefix_length + longest))
            prefix, long_one, short_one = ids.split([prefix_length, longest - short, short])
            starts = torch.zeros_like(ids[prefix_length:])
            starts[-short:] = longest - short
            mask, positions, _ = packed_layout(starts[None], prefix_length, self.base_model.dtype)
            apart = []
            try:
                together = self.hidden_states(self.embed(ids[None]), mask, ids[None], positions)[0]
                for segment in (long_one, short_one):
                    row = torch.cat([prefix, segment])[None]
                    apart.append(self.hidden_states(self.embed(row), torch.ones_like(row), row)[0, prefix_length:])
            except torch.OutOfMemoryError:  # which says nothing of the base
                raise
            except Exception:  # whatever a base raises, it does not take these
                return False
            return same_but_for_rounding(together[prefix_length:], torch.cat(apart))

    @functools.cached_property
    def head_is_linear(self) -> bool:
        """Whether the base's logits are its output embeddings' weight times the decoder's last hidden state."""
        weight = getattr(self.base_model.get_output_embeddings(), "weight", None)
        return weight is not None and weight.dim() == 2 and self._logits_come_from(OutputHead(weight))

    @property
    def output_head(self) -> OutputHead | None:
        """The base's head, where it makes the logits of the decoder's last hidden state and nothing else does.

        `None` where the logits are capped or scaled on the way, or where the head is more than a weight and a bias.
        """
        module = self.base_model.get_output_embeddings()
        own = dict(module.named_parameters(recurse=False)) if module is not None else {}
        head = OutputHead(own.get("weight"), own.get("bias"))
        if head.weight is None or head.weight.dim() != 2 or any(module.children()):
            return None
        return head if self._output_head_is_all else None

    @functools.cached_property
    def _output_head_is_all(self) -> bool:
        module = self.base_model.get_output_embeddings()
        if not self._logits_come_from(OutputHead(module.weight, getattr(module, "bias", None))):
            return False
        # A cap hardly bends small logits. Behind a head whose output is many times as large it cannot hide.
        with self._probing() as (ids, mask):
            embeds = self.embed(ids)
            expected = self.logits(embeds, mask, ids) * _AMPLIFIED
            handle = module.register_forward_hook(lambda module, arguments, output: output * _AMPLIFIED)
            try:
                return same_but_for_rounding(self.logits(embeds, mask, ids), expected)
            finally:
                handle.remove()

    def _logits_come_from(self, head: OutputHead) -> bool:
        with self._probing() as (ids, mask):
            embeds = self.embed(ids)
            try:
                through_head = head(self.hidden_states(embeds, mask, ids))
            except (AttributeError, RuntimeError, TypeError):
                return False
            return same_but_for_rounding(through_head, self.logits(embeds, mask, ids))

    @contextmanager
    def _probing(self) -> Iterator[tuple[Tensor, Tensor]]:
        """Two rows of six ordinary tokens and their mask, for a span that leaves no trace.

        Autocast is off: it would keep the casts made here, without their graph, for what follows.
        """
        device = self.base_model.get_input_embeddings().weight.device
        ids = torch.tensor(self._ordinary_tokens(12), device=device).view(2, 6)
        with torch.no_grad(), torch.autocast(device.type, enabled=False), modules_in_eval(self.base_model):
            yield ids, torch.ones_like(ids)

    def _ordinary_tokens(self, count: int) -> list[int]:
        """Ids spread over the vocabulary, none of which the base's configuration gives a meaning of its own."""
        special = set(_special_ids(self.base_model.config.to_dict()))
        ordinary = [token for token in range(self.vocab_size) if token not in special] or [0]
        return [ordinary[(2 * index + 1) * len(ordinary) // (2 * count)] for index in range(count)]


def _special_ids(config: dict[str, Any]) -> Iterator[int]:
    """Every number called a token id or index in a configuration, sub-configurations included."""
    for name, value in config.items():
        if isinstance(value, dict):
            yield from _special_ids(value)
        elif str(name).endswith(("token_id", "token_index", "token_ids")):
            yield from (token for token in (value if isinstance(value, list) else [value]) if isinstance(token, int))


def same_but_for_rounding(values: Tensor, reference: Tensor) -> bool:
    """Whether two routes gave the same logits, at the precision they were computed in."""
    if values.shape != reference.shape:
        return False
    rounding = _ROUNDING.get(reference.dtype, _ROUNDING_HALF)
    difference = (values.double() - reference.double()).abs().max()
    return bool(difference <= rounding * reference.double().std())


@contextmanager
def _embeddings_replaced(base_model: PreTrainedModel, inputs_embeds: Tensor) -> Iterator[None]:
    """Have the base's embedding layer answer its next call with `inputs_embeds`.

    Raises:
        RuntimeError: the layer was not called, or for another shape.
    """
    replaced = False

    def replace(module: nn.Module, arguments: tuple, output: Tensor) -> Tensor | None:
        nonlocal replaced
        if replaced:
            return None
        if output.shape != inputs_embeds.shape:
            raise RuntimeError(
                f"the embedding layer was called for {tuple(output.shape)}, not {tuple(inputs_embeds.shape)}"
            )
        replaced = True
        return inputs_embeds.clone()

    handle = base_model.get_input_embeddings().register_forward_hook(replace)
    try:
        yield
    finally:
        handle.remove()
    if not replaced:
        raise RuntimeError("the embedding layer was not called")


@contextmanager
def plain_generation(base_model: PreTrainedModel) -> Iterator[None]:
    """The base's `generate` as plain greedy decoding, with nothing in its configuration that stops or bends it."""
    settings = base_model.generation_config
    base_model.generation_config = GenerationConfig(do_sample=False)
    try:
        yield
    finally:
        base_model.generation_config = settings


@contextmanager
def modules_in_eval(model: nn.Module) -> Iterator[None]:
    """Eval mode for a span, each module back in its own mode afterwards."""
    training = [module for module in model.modules() if module.training]
    for module in training:
        module.training = False
    try:
        yield
    finally:
        for module in training:
            module.training = True
