"""Which tokens of a context a memory holds, and which tokens of an answer come from it: each with it and without.

Of a context three conditions are compared, by the reconstruction loss, on the same tokens after the same unscored
prefixes as in WRITE:

- from the memory, under WRITE's own conditions (control tokens, head and LoRA);
- from the memory's start M0, under the same conditions;
- by the plain base, without memory vectors, head or LoRA. A token with nothing before it is not predicted there, and
  has the loss NaN.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from transformers import PreTrainedTokenizerBase

from ..base.modes import evaluating
from ..base.output_head import cross_entropy
from ..memory.written import GradMemMemory
from ..modeling_gradmem import GradMemForCausalLM
from ..reading.answering import generate_answers
from ..reading.queries import Queries
from ..reading.read import read
from ..reading.reciting import tokenize_asked
from ..template import leading_tokens
from ..writing.contexts import Context
from ..writing.objectives.reconstruction import ReconstructionObjective
from ..writing.rows import ContextRows

Tensor = torch.Tensor
_POSITIONS_AT_ONCE = 2**12
_DECODED_BEFORE = 8  # tokens that settle the spacing of the one after them


@dataclass(frozen=True)
class TokenLosses:
    """The reconstruction losses of one context, in nats, one for each of its tokens.

    Attributes:
        tokens: their texts.
        base (`torch.Tensor` of shape `(tokens,)`): by the plain base, without a memory; NaN where nothing precedes.
        start (`torch.Tensor` of shape `(tokens,)`): from the memory's start.
        memory (`torch.Tensor` of shape `(tokens,)`): from the memory.
    """

    tokens: list[str]
    base: Tensor
    start: Tensor
    memory: Tensor

    @property
    def bits_over_base(self) -> float:
        """Bits of the context that the memory adds to what the base predicts by itself; see [`bits_recovered`]."""
        return float(bits_recovered(self.base, self.memory))

    @property
    def bits_over_start(self) -> float:
        """Bits of the context that WRITE added to the memory's start; see [`bits_recovered`]."""
        return float(bits_recovered(self.start, self.memory))

    def to_dict(self) -> dict[str, Any]:
        """Ready for JSON: `None` stands for NaN."""
        columns = {name: getattr(self, name).tolist() for name in ("base", "start", "memory")}
        losses = {name: [None if math.isnan(loss) else loss for loss in values] for name, values in columns.items()}
        bits = {"bits_over_start": self.bits_over_start, "bits_over_base": self.bits_over_base}
        return {"tokens": self.tokens, **losses, **bits}


@dataclass(frozen=True)
class AnswerTokens:
    """Where an answer's tokens come from: how likely each is under its memory, and under M0, which holds nothing.

    Attributes:
        question: the question.
        tokens: the text of each token of the answer, its end token among them where it ended.
        memory: `(tokens,)`, log-probabilities in nats, given the memory, the question and the tokens before.
        start: `(tokens,)`, the same given M0 in place of the memory.
    """

    question: str
    tokens: list[str]
    memory: Tensor
    start: Tensor

    @property
    def gain(self) -> Tensor:
        """What the memory adds to each token, in nats; 0 or below where the reader would have said it without."""
        return self.memory - self.start


def bits_recovered(without: Tensor, with_memory: Tensor) -> Tensor:
    """Σ_i (loss_without,i − loss_with,i) / ln 2, a sum over the tokens that have both losses.

    That is their number times the difference of the mean losses, in bits; below 0 where the memory misleads.

    Args:
        without: `(tokens,)`, nats; NaN where there is no such loss.
        with_memory: `(tokens,)`, nats.
    """
    return (without - with_memory).nansum() / math.log(2)


@torch.no_grad()
def answer_tokens(
    model: GradMemForCausalLM, question: str, memory: GradMemMemory, *, max_new_tokens: int = 50
) -> AnswerTokens:
    """The greedy answer to a question, token by token, with what each owes to the memory.

    Args:
        model: the reader, with a tokenizer.
        question: a text, put into the adapter's template.
        memory: of one context.
        max_new_tokens: most tokens of the answer.

    Raises:
        ValueError: an empty question, several memories, or a memory of another model.
    """
    if len(memory) != 1:
        raise ValueError(f"One memory is read for an answer, got {len(memory)}: choose one by memory[number].")
    model.check_memory(memory)
    tokens = generate_answers(model, [question], memory, [0], max_new_tokens).tokens[0]
    asked, _ = tokenize_asked(model, memory, [question], [0], model.config.template)
    ids = torch.cat([asked, torch.tensor([tokens])], dim=1).to(model.device)
    only = torch.zeros(1, dtype=torch.long, device=model.device)
    queries = Queries(ids, torch.ones_like(ids), None, only, (1,))
    with evaluating():
        found = []
        for vectors in (memory.to(model.device).embeddings, model.form.start(1)):
            logits = read(model.read_phase, vectors, queries).logits
            predicting = logits[0, asked.shape[1] - 1 : -1].float()
            found.append(predicting.log_softmax(-1).gather(1, ids[0, asked.shape[1] :, None])[:, 0].cpu())
    return AnswerTokens(question, token_texts(model.tokenizer, tokens), *found)


def token_losses(model: GradMemForCausalLM, memory: GradMemMemory, context: Context) -> list[TokenLosses]:
    """The loss of each token of a context from its memory, from the memory's start, and by the base alone.

    Args:
        model: the model that wrote the memory, with a tokenizer.
        memory: the memories.
        context: what they were written from, as in `model.write`; or any other text, of which they should hold little.

    Returns:
        One entry for each context.

    Raises:
        ValueError: an empty context, another number of contexts than memories, or a memory of another model.
    """
    tokenizer = model.tokenizer
    rows = model.writer.rows(model.tokenize(context).checked(model.device))
    model.check_memory(memory)
    sizes = rows.num_tokens.tolist()
    if len(sizes) != len(memory):
        raise ValueError(f"There are {len(memory)} memories for {len(sizes)} contexts; each context needs its own.")
    texts = [token_texts(tokenizer, ids.tolist()) for ids in rows.targets.split(sizes)]
    with torch.no_grad(), evaluating():
        start = model.form.start(len(sizes))
    conditions = (
        base_token_losses(model, rows),
        memory_token_losses(model, rows, start),
        memory_token_losses(model, rows, memory.to(model.device).embeddings),
    )
    by_context = zip(texts, *(losses.cpu().split(sizes) for losses in conditions), strict=True)
    return [TokenLosses(*of_one) for of_one in by_context]


@torch.no_grad()
def memory_token_losses(model: GradMemForCausalLM, rows: ContextRows, embeddings: Tensor) -> Tensor:
    """−log f(c_i | [w_start; P(M); w_end; prefix; c_<i]) of each context token, one context after another.

    Args:
        model: the writer.
        rows: the contexts.
        embeddings: `(batch, num_memory_tokens, hidden_size)`.

    Returns:
        `(tokens,)`, nats.
    """
    objective = ReconstructionObjective(rows, model.write_phase)
    with evaluating():
        return torch.cat([objective.token_losses(embeddings, part) for part in _parts(rows)])


@torch.no_grad()
def base_token_losses(model: GradMemForCausalLM, rows: ContextRows) -> Tensor:
    """−log f(c_i | prefix; c_<i) of each context token by the plain base: no memory, no head or LoRA of WRITE.

    Returns:
        `(tokens,)`, nats, in the order of [`memory_token_losses`]; NaN where nothing stands before the token.
    """
    start = leading_tokens(model.tokenizer)
    with evaluating():
        return torch.cat([_base_part(model, part, start) for part in _parts(rows)])


def _base_part(model: GradMemForCausalLM, rows: ContextRows, start: list[int]) -> Tensor:
    ids = torch.cat([rows.input_ids.new_tensor(start).expand(len(rows.input_ids), -1), rows.input_ids], dim=1)
    mask = torch.cat([rows.attention_mask.new_ones((len(ids), len(start))), rows.attention_mask], dim=1)
    logits = model.decoder.logits(model.decoder.tokens(ids, mask))[:, :-1]
    first = 1 - len(start)  # the first token of a row that something stands before
    predicted = rows.scored[:, first:]
    losses = logits.new_full(rows.scored.shape, torch.nan, dtype=torch.promote_types(logits.dtype, torch.float32))
    losses[:, first:][predicted] = cross_entropy(logits[predicted], rows.input_ids[:, first:][predicted])
    return rows.of_scored(losses)


def _parts(rows: ContextRows) -> Iterator[ContextRows]:
    """The rows in their order, so many at a time that their logits fit into memory."""
    at_once = max(1, _POSITIONS_AT_ONCE // rows.input_ids.shape[1])
    for part in torch.arange(len(rows.input_ids), device=rows.input_ids.device).split(at_once):
        yield rows.take(part)


def token_texts(tokenizer: PreTrainedTokenizerBase, ids: list[int]) -> list[str]:
    """The text of each token with the spacing that it has after those before it; put together they are the text.

    A character that several tokens make up stands at the last of them.
    """

    def decode(tokens: list[int]) -> str:
        return str(tokenizer.decode(tokens, clean_up_tokenization_spaces=False))  # a list for several sequences alone

    texts, first, told = [], 0, 0
    for end in range(1, len(ids) + 1):
        text = decode(ids[first:end])
        piece = "" if text.endswith("\ufffd") and end < len(ids) else text[told:]
        texts.append(piece)
        if not piece:
            continue
        told = len(text)
        if end - first > _DECODED_BEFORE:  # go on from this token, so that the work does not grow with the text
            first, told = end - 1, len(decode(ids[end - 1 : end]))
    return texts
