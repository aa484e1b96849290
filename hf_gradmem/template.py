"""The words around a context and a question: one setting of an adapter, for training, evaluation and answers alike.

A base that was taught by instructions answers what is put to it as a question, and goes on with anything else. The
words stand around what READ is given, and around a context that stands in a prompt; WRITE takes a context as it is.
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from jinja2 import TemplateError
from transformers import PreTrainedTokenizerBase

_FIELDS = ("context", "query")
_ANSWER_AFTER = "answer_after"
_FIELD = re.compile(r"\{(context|query|memory)\}")
_MEMORY, _CONTEXT = "{memory}", "{context}"
TEMPLATES: dict[str, dict[str, str]] = {
    "plain": {"context": "{context}", "query": "{query}"},
    "question": {"context": "{context}\n", "query": "Question: {query}\nAnswer:"},
    "quote": {
        "context": "{context}\n",
        "query": "Question: {query}\nQuote:",
        "answer_after": "\nAnswer:",
    },
    "recite": {"context": "{context}\n", "query": "{context}Question: {query}\nAnswer:"},
}
"""The templates that are spelled out, by name. `"chat"` and `"chat_inside"` are the tokenizer's own."""
CHAT, CHAT_INSIDE = "chat", "chat_inside"
TEMPLATE_NAMES = (*TEMPLATES, CHAT, CHAT_INSIDE)


@dataclass(frozen=True)
class Template:
    """Words with `{context}` and `{query}` in them.

    Attributes:
        query: around a query alone, as it stands behind a memory; the answer follows.
        prompt: around a context and a query, as they stand in a prompt; the answer follows.
        header: what stands before the memory, in READ alone.
        recites: whether the memory is decoded first, and what it decodes to stands before the query.
        answer_after: words that end what the answer rests on, a quote from the context, and begin the answer itself;
            empty where an answer stands alone.
    """

    query: str
    prompt: str
    header: str = ""
    answer_after: str = ""
    recites: bool = False

    def question(self, query: str, recited: str | None = None) -> str:
        """What READ is given behind the memory.

        Args:
            query: what is asked.
            recited: what the memory decodes to, where the template [`recites`]; nothing stands for it without.
        """
        if self.recites and recited is not None:
            return _filled(self.prompt.removeprefix(self.header), context=recited, query=query)
        return _filled(self.query, query=query)

    def without_memory(self, query: str) -> str:
        """What the plain base is given where no context is."""
        return self.header + self.question(query)

    def in_prompt(self, context: str, query: str) -> str:
        """What the plain base is given."""
        return _filled(self.prompt, context=context, query=query)

    def target(self, target: str, quote: str = "") -> str:
        """An answer as it follows: words that end in white space part it from the query already.

        Args:
            target: the answer, with the space that parts it from the query.
            quote: what it rests on; nothing is quoted where this is empty, nor by a template without `answer_after`.
        """
        if quote and self.answer_after:
            target = f" {quote}{self.answer_after}{target}"
        return target.lstrip() or target if self.query[-1:].isspace() else target

    def split(self, text: str, ended: bool = True) -> tuple[str | None, str]:
        """What was generated, as the quote and the answer; no quote where nothing is quoted.

        Args:
            text: that was generated.
            ended: whether nothing follows. Before, what may be a quote that is being told is no answer yet.
        """
        if not self.answer_after or self.answer_after not in text:
            return None, text if ended or not self.answer_after else ""
        quote, _, answer = text.partition(self.answer_after)  # the first, behind which what is told stays as it is
        return quote.strip(), answer


def check_template(value: Any) -> None:
    """Refuse what is no template.

    Args:
        value: `"plain"`, `"question"`, `"quote"`, `"recite"`, `"chat"`, `"chat_inside"`, or
            `{"context": "...", "query": "..."}` with `{context}` and `{query}` once in the words of that name. A
            `{memory}` before `{query}` says where the memory stands, a `{context}` before it that the memory is
            decoded first and where that text stands, in the words for a context; `"answer_after": "..."` beside them
            says what parts a quote from the answer behind it.

    Raises:
        ValueError: it is something else, or its words lack their field.
    """
    if isinstance(value, str) and value in TEMPLATE_NAMES:
        return
    if not isinstance(value, Mapping) or set(value) - {_ANSWER_AFTER} != set(_FIELDS):
        raise ValueError(
            f"template must be one of {', '.join(TEMPLATE_NAMES)}, or a mapping with {' and '.join(_FIELDS)} (and "
            f"{_ANSWER_AFTER}, if answers are to quote), got {value!r}."
        )
    after = value.get(_ANSWER_AFTER, " ")
    if not isinstance(after, str) or not after:
        raise ValueError(f"{_ANSWER_AFTER} in a template must be words that begin an answer, got {after!r}.")
    for name in _FIELDS:
        words = value[name]
        fields = _FIELD.findall(words) if isinstance(words, str) else []
        for optional in ("memory", "context") if name == "query" else ():
            if fields[:1] == [optional]:
                del fields[0]
        if fields != [name]:
            before = f" ({_MEMORY}, then {_CONTEXT} may stand before it)" if name == "query" else ""
            raise ValueError(
                f"The words for {name} in a template hold {{{name}}} once and no other field{before}, got {words!r}."
            )


def places_memory(value: str | Mapping[str, str]) -> bool:
    """Whether a template says where the memory stands, behind words of its own; otherwise it stands first."""
    return value == CHAT_INSIDE or (isinstance(value, Mapping) and _MEMORY in value["query"])


def get_template(value: str | Mapping[str, str], tokenizer: PreTrainedTokenizerBase) -> Template:
    """The template that a setting stands for.

    Args:
        value: as in [`check_template`].
        tokenizer: whose chat template `"chat"` is.

    Raises:
        ValueError: it is no template, or the tokenizer has none.
    """
    check_template(value)
    if value in (CHAT, CHAT_INSIDE):
        query, prompt = (_chat(turn, tokenizer) for turn in ("{query}", "{context}\n\n{query}"))
        if value == CHAT:
            return Template(query, prompt)
        header, _, query = _chat(f"{_MEMORY}{{query}}", tokenizer).partition(_MEMORY)
        return Template(query, prompt, header)
    words = TEMPLATES[value] if isinstance(value, str) else value
    header, _, query = words["query"].rpartition(_MEMORY)
    recites = _CONTEXT in query
    prompt = query.replace(_CONTEXT, words["context"]) if recites else words["context"] + query
    return Template(query.replace(_CONTEXT, ""), header + prompt, header, words.get(_ANSWER_AFTER, ""), recites)


def template_in_use(
    given: str | Mapping[str, str] | None, own: str | Mapping[str, str], tokenizer: PreTrainedTokenizerBase
) -> str | Mapping[str, str]:
    """The template given for a call, or the model's own.

    Args:
        given: for the call; `None` is the model's own.
        own: `config.template` of the model, which says what READ puts before a memory.
        tokenizer: the model's.

    Raises:
        ValueError: the two differ in what stands before the memory.
    """
    if given is None or given == own:
        return own
    if (places_memory(given) or places_memory(own)) and (
        get_template(given, tokenizer).header != get_template(own, tokenizer).header
    ):
        raise ValueError(
            f"The template {given!r} has the memory at another place than the model's own, {own!r}, and READ puts it "
            "there. Set model.config.template to it."
        )
    return given


def _chat(turn: str, tokenizer: PreTrainedTokenizerBase) -> str:
    return chat_text([{"role": "user", "content": turn}], tokenizer)


def chat_text(turns: Sequence[Mapping[str, str]], tokenizer: PreTrainedTokenizerBase) -> str:
    """The tokenizer's chat template around turns, up to where the answer begins.

    A token that begins every text is left out: what stands before a query is a memory. One of each turn stays.

    Args:
        turns: the `role` and the `content` of each.
        tokenizer: whose chat template it is.

    Raises:
        ValueError: it has none, or refuses these turns.
    """
    if tokenizer.chat_template is None:
        raise ValueError(
            f"The tokenizer of {tokenizer.name_or_path} has no chat template. Use template 'plain' or 'question', or "
            "words of your own."
        )
    try:
        text = str(tokenizer.apply_chat_template(list(map(dict, turns)), add_generation_prompt=True, tokenize=False))
    except TemplateError as error:  # many refuse a system turn, or two turns in a row of one role
        roles = ", ".join(turn["role"] for turn in turns)
        raise ValueError(f"The chat template of the tokenizer refuses turns of {roles}: {error}") from error
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
