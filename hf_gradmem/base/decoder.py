"""The base decoder, as this package runs it: through public calls, in the way that probes found right for it."""

import functools

import torch
from transformers import PreTrainedModel

from . import probes
from .output_head import OutputHead
from .running import DecoderInputs, KeyValues, embedding_weight, run

Tensor = torch.Tensor


class Decoder:
    """Runs a base decoder and knows what the base can do.

    What a path needs to know of the base is probed once, when it is first asked for.

    Args:
        base_model: a decoder with a language-model head.
    """

    def __init__(self, base_model: PreTrainedModel) -> None:
        self.base_model = base_model
        self._kept_in_cache: dict[int, bool] = {}
        self._kept_apart: dict[tuple[int, int, str | None], bool] = {}

    def embed(self, input_ids: Tensor) -> Tensor:
        """Token embeddings `(rows, length, hidden_size)`."""
        return self.base_model.get_input_embeddings()(input_ids)

    @property
    def name(self) -> str:
        """The class of the base, for messages."""
        return type(self.base_model).__name__

    @property
    def device(self) -> torch.device:
        """Where the base takes its input."""
        return embedding_weight(self.base_model).device

    @property
    def vocab_size(self) -> int:
        return embedding_weight(self.base_model).shape[0]

    @property
    def window(self) -> int | None:
        """Positions that the base can take; `None` where its configuration sets no limit."""
        config = self.base_model.config.get_text_config()
        positions = getattr(config, "max_position_embeddings", None) or getattr(config, "max_seq_len", None)  # MPT's
        return positions if positions is not None and positions > 0 else None

    # ------------------------------------------------------------------------------------------------ running

    def tokens(self, input_ids: Tensor, attention_mask: Tensor) -> DecoderInputs:
        """Tokens `(rows, length)` as inputs."""
        return DecoderInputs(self.embed(input_ids), attention_mask, input_ids)

    def vectors(self, embeddings: Tensor, past: KeyValues | None = None) -> DecoderInputs:
        """Vectors `(rows, length, hidden_size)` that stand for no tokens, behind what is in the cache."""
        # Ordinary tokens stand for them where ids are asked for: some bases count padding ids.
        ids = torch.full(embeddings.shape[:2], self._placeholder, dtype=torch.long, device=embeddings.device)
        return DecoderInputs(embeddings, torch.ones_like(ids, dtype=torch.bool), ids, past=past)

    @functools.cached_property
    def _placeholder(self) -> int:
        return probes.ordinary_tokens(self.base_model, 1)[0]

    def logits(self, inputs: DecoderInputs) -> Tensor:
        """Logits `(rows, length, vocab)`."""
        return run(self.base_model, self.base_model, inputs, self.embeddings_suffice).logits

    def hidden_states(self, inputs: DecoderInputs) -> Tensor:
        """Last hidden states `(rows, length, hidden_size)`, without the cost of the logits."""
        return run(self.base_model, self.base_model.get_decoder(), inputs, self.embeddings_suffice).last_hidden_state

    def keys_and_values(self, inputs: DecoderInputs) -> KeyValues:
        """Keys and values of these positions in each layer.

        Raises:
            ValueError: the base keeps none of every position in every layer, or does not go on from them.
        """
        if not self.goes_on_from_cache:
            raise ValueError(
                f"{self.name} does not keep keys and values of every position in every layer, or does not go on from "
                "them as from the positions themselves."
            )
        return probes.cached(self.base_model, inputs, self.embeddings_suffice)

    # ------------------------------------------------------------------------------------------------ what it can do

    def probe(self) -> None:
        """Find out now what every run needs to know of the base, which none that is traced can find out."""
        self.vectors(torch.zeros((1, 1, 1)))
        _ = self.embeddings_suffice

    @functools.cached_property
    def embeddings_suffice(self) -> bool:
        """Whether the base makes the same of embedded tokens as of token ids; otherwise it is run on ids.

        Raises:
            TypeError: the base runs on neither.
        """
        return probes.embeddings_suffice(self.base_model)

    @functools.cached_property
    def generates_from_embeddings(self) -> bool:
        """Whether the base's own `generate(inputs_embeds=...)`, cached and left-padded, follows its forward pass."""
        return self.embeddings_suffice and probes.generates(self.base_model, from_cache=False)

    @functools.cached_property
    def goes_on_from_cache(self) -> bool:
        """Whether cached keys and values can stand for the positions that they were made from."""
        return probes.goes_on_from_cache(self.base_model, self.embeddings_suffice)

    @functools.cached_property
    def generates_from_cache(self) -> bool:
        """Whether the base's own `generate`, given a cache and no padding behind it, follows its forward pass."""
        usable = self.generates_from_embeddings and self.goes_on_from_cache
        return usable and probes.generates(self.base_model, from_cache=True)

    def keeps_in_cache(self, positions: int) -> bool:
        """Whether cached keys and values can stand for so many positions; a base with sliding windows cuts them."""
        if positions not in self._kept_in_cache:
            self._kept_in_cache[positions] = self.goes_on_from_cache and probes.keeps_in_cache(
                self.base_model, self.embeddings_suffice, positions
            )
        return self._kept_in_cache[positions]

    def keeps_segments_apart(self, prefix_length: int, longest: int) -> bool:
        """Whether segments side by side in one row come out as in rows of their own.

        Args:
            prefix_length: positions that all segments see.
            longest: tokens in a row at most.
        """
        asked = prefix_length, longest, self.base_model.config._attn_implementation
        if asked not in self._kept_apart:
            self._kept_apart[asked] = longest >= 2 and probes.keeps_segments_apart(
                self.base_model, self.embeddings_suffice, prefix_length, longest
            )
        return self._kept_apart[asked]

    @functools.cached_property
    def head_is_linear(self) -> bool:
        """Whether the base's logits are its output embeddings' weight times the decoder's last hidden state."""
        weight = getattr(self.base_model.get_output_embeddings(), "weight", None)
        if weight is None or weight.dim() != 2:
            return False
        return probes.logits_come_from(self.base_model, self.embeddings_suffice, OutputHead(weight))

    @property
    def output_head(self) -> OutputHead | None:
        """The base's head, where it makes the logits of the decoder's last hidden state and nothing else does.

        `None` where the logits are capped or scaled on the way, or where the head is more than a weight and a bias.
        """
        module = self.base_model.get_output_embeddings()
        own = dict(module.named_parameters(recurse=False)) if module is not None else {}
        weight = own.get("weight")
        if weight is None or weight.dim() != 2 or any(module.children()):
            return None
        return OutputHead(weight, own.get("bias")) if self._output_head_is_all else None

    @functools.cached_property
    def _output_head_is_all(self) -> bool:
        return probes.output_head_is_all(self.base_model, self.embeddings_suffice)
