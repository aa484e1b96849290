"""The tokens of a request's prompt: a plain text, or a chat in the words that the adapter was trained with."""

import math
from collections.abc import Sequence

from transformers import PreTrainedTokenizerBase

from ..modeling_gradmem import GradMemForCausalLM
from ..template import CHAT, chat_text, get_template
from .schema import Message


def text_prompt(model: GradMemForCausalLM, text: str) -> list[int]:
    """A prompt as it stands.

    Raises:
        ValueError: it has no token.
    """
    return _checked(model, model.tokenizer(text, add_special_tokens=False).input_ids)


def chat_prompt(model: GradMemForCausalLM, messages: Sequence[Message], before: str | None = None) -> list[int]:
    """A chat up to where the answer begins.

    Under the chat template all turns count. Any other template has words for one question.

    Args:
        model: the reader.
        messages: the turns.
        before: what the memory recites, under a template that has it stand before the question.

    Raises:
        ValueError: the last turn is not the user's, or there are more than the template has words for.
    """
    if messages[-1].role != "user":
        raise ValueError(f"The last message must be the user's, got one of the {messages[-1].role}.")
    if model.config.template == CHAT:
        return _checked(model, _chat_tokens(model.tokenizer, messages))
    if len(messages) > 1:
        raise ValueError(
            f"This adapter's template {model.config.template!r} takes one question: send one message of the user, got "
            f"{len(messages)} messages."
        )
    words = get_template(model.config.template, model.tokenizer)
    return text_prompt(model, words.question(messages[0].content, before))


def _chat_tokens(tokenizer: PreTrainedTokenizerBase, messages: Sequence[Message]) -> list[int]:
    if len(messages) == 1:
        text = get_template(CHAT, tokenizer).question(messages[0].content)
    else:
        text = chat_text([message.model_dump() for message in messages], tokenizer)
    return tokenizer(text, add_special_tokens=False).input_ids


def _checked(model: GradMemForCausalLM, tokens: list[int]) -> list[int]:
    if not tokens:
        raise ValueError("The prompt is empty.")
    if room_for_answer(model, tokens) < 1:
        raise ValueError(
            f"The prompt has {len(tokens)} tokens, and the base takes {model.decoder.window} with the memory's "
            f"{model.read_phase.prefix_length} and the answer."
        )
    return tokens


def room_for_answer(model: GradMemForCausalLM, prompt: Sequence[int]) -> float:
    """How many tokens the base can take behind a memory and a prompt."""
    room = model.read_phase.room()
    return math.inf if room is None else room - len(prompt)
