"""The words around a context and a question: one setting of an adapter, for training, evaluation and answers alike.

A base that was taught by instructions answers what is put to it as a question, and goes on with anything else. The
words stand around what READ is given, and around a context that stands in a prompt; WRITE takes a context as it is.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from transformers import PreTrainedTokenizerBase

_FIELDS = ("context", "query")
_FIELD = re.compile(r"\{(context|query)\}")
TEMPLATES: dict[str, dict[str, str]] = {
    "plain": {"context": "{context}", "query": "{query}"},
    "question": {"context": "{context}\n", "query": "Question: {query}\nAnswer:"},
}
"""The templates that are spelled out, by name. `"chat"` is the tokenizer's own."""
CHAT = "chat"


@dataclass(frozen=True)
class Template:
    """Words with `{context}` and `{query}` in them.

    Attributes:
        query: around a query alone, as it stands behind a memory; the answer follows.
        prompt: around a context and a query, as they stand in a prompt; the answer follows.
    """

    query: str
    prompt: str

    def question(self, query: str) -> str:
        """What READ is given."""
        return _filled(self.query, query=query)

    def in_prompt(self, context: str, query: str) -> str:
        """What the plain base is given."""
        return _filled(self.prompt, context=context, query=query)

    def target(self, target: str) -> str:
        """An answer as it follows: words that end in white space part it from the query already."""
        return target.lstrip() or target if self.query[-1:].isspace() else target


def check_template(value: Any) -> None:
    """Refuse what is no template.

    Args:
        value: `"plain"`, `"question"`, `"chat"`, or `{"context": "...", "query": "..."}` with `{context}` and `{query}`
            once in the words of that name.

    Raises:
        ValueError: it is something else, or its words lack their field.
    """
    if isinstance(value, str) and (value in TEMPLATES or value == CHAT):
        return
    if not isinstance(value, Mapping) or set(value) != set(_FIELDS):
        raise ValueError(
            f"template must be one of {', '.join([*TEMPLATES, CHAT])}, or a mapping with {' and '.join(_FIELDS)}, got "
            f"{value!r}."
        )
    for name in _FIELDS:
        words = value[name]
        if not isinstance(words, str) or _FIELD.findall(words) != [name]:
            raise ValueError(
                f"The words for {name} in a template hold {{{name}}} once and no other field, got {words!r}."
            )


def get_template(value: str | Mapping[str, str], tokenizer: PreTrainedTokenizerBase) -> Template:
    """The template that a setting stands for.

    Args:
        value: as in [`check_template`].
        tokenizer: whose chat template `"chat"` is.

    Raises:
        ValueError: it is no template, or the tokenizer has none.
    """
    check_template(value)
    if value == CHAT:
        query, prompt = (_chat(turn, tokenizer) for turn in ("{query}", "{context}\n\n{query}"))
        return Template(query, prompt)
    words = TEMPLATES[value] if isinstance(value, str) else value
    return Template(words["query"], words["context"] + words["query"])


def _chat(turn: str, tokenizer: PreTrainedTokenizerBase) -> str:
    """The tokenizer's chat template around a user's turn, up to where the answer begins.

    A token that begins every text is left out: what stands before a query is a memory.
    """
    if tokenizer.chat_template is None:
        raise ValueError(
            f"The tokenizer of {tokenizer.name_or_path} has no chat template. Use template 'plain' or 'question', or "
            "words of your own."
        )
    messages = [{"role": "user", "content": turn}]
    text = str(tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False))
    return text.removeprefix(str(tokenizer.bos_token)) if leading_tokens(tokenizer) else text


def leading_tokens(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """What the tokenizer itself puts in front of a text: its begin token, or nothing.

    A base that was trained with it predicts badly without.
    """
    ids = tokenizer("").input_ids[:1]
    return ids if ids == [tokenizer.bos_token_id] else []


def _filled(words: str, **texts: str) -> str:
    """The words with texts in place of their fields; what looks like a field in a text stays."""
    return _FIELD.sub(lambda field: texts[field[1]], words)
