"""Rows as a recipe's limits leave them: what is measured is then what a run with these limits sees."""

from bisect import bisect_right
from collections.abc import Iterable, Mapping
from typing import Any

from transformers import PreTrainedTokenizerBase

from ..modeling_gradmem import GradMemForCausalLM
from ..tasks.collator import LIMITS, DataCollatorForGradMem
from ..template import template_in_use

Row = dict[str, Any]


def limits_of(recipe: Any) -> dict[str, int | None]:
    """The limits of a recipe, by their names: of what [`~hf_gradmem.training.recipe.RecipeArguments`] holds."""
    return {name: getattr(recipe, name) for name in LIMITS}


def limited_rows(
    model: GradMemForCausalLM,
    rows: Iterable[Row],
    limits: Mapping[str, int | None],
    template: str | Mapping[str, str] | None = None,
) -> list[Row]:
    """The rows with contexts of at most so many tokens, and at most so many queries on each.

    Args:
        model: whose tokenizer counts, and whose writer says how a context comes to its segments.
        rows: of a task.
        limits: of [`limits_of`], or some of them; `None` is no limit.
        template: the words that stand around each query; the adapter's by default.

    Raises:
        ValueError: a query with its answer is longer than `max_query_length`: an answer is generated to a whole query.
            Or no query is left.
    """
    of_context, of_query, of_row = (limits.get(name) for name in LIMITS)
    if of_row == 0:
        raise ValueError(
            "queries_per_context is 0: the recipe asks nothing, so there is no answer to measure. Ask the queries of "
            "its rows by --override queries_per_context=null."
        )
    limited = [
        row | {name: row[name][:of_row] for name in ("queries", "targets", "answers", "quotes") if row.get(name)}
        for row in rows
    ]
    if of_context is not None:
        limited = [row | {"context": _beginning(model, row["context"], of_context)} for row in limited]
    if of_query is not None:  # which may recite its context, or what is left of it
        _check_queries(model, limited, of_query, template_in_use(template, model.config.template, model.tokenizer))
    return limited


def _check_queries(model: GradMemForCausalLM, rows: list[Row], limit: int, template: str | Mapping[str, str]) -> None:
    collate = DataCollatorForGradMem(model.tokenizer, template=template)
    for number, row in enumerate(rows):
        longest = int(collate([row])["attention_mask"].sum(-1).max())
        if longest > limit:
            raise ValueError(
                f"A query of row {number} takes {longest} tokens with its answer, and max_query_length is {limit}: "
                "training leaves out its beginning, and answers are generated to whole queries. Measure them whole, "
                "by --override max_query_length=null, or shorten the query."
            )


def _beginning(model: GradMemForCausalLM, context: str | list[str], limit: int) -> str | list[str]:
    """The context itself where it fits, else its first tokens."""
    segments = model.writer.segments([context] if isinstance(context, str) else context)
    encoded = model.tokenizer(segments, add_special_tokens=False, verbose=False).input_ids
    if sum(map(len, encoded)) <= limit:
        return context
    kept: list[str] = []
    for segment, tokens in zip(segments, encoded, strict=True):
        if limit < len(tokens):
            kept += [_first_tokens(model.tokenizer, segment, limit)] if limit else []
            break
        kept.append(segment)
        limit -= len(tokens)
    return kept[0] if isinstance(context, str) and len(segments) == 1 else kept


def _first_tokens(tokenizer: PreTrainedTokenizerBase, text: str, count: int) -> str:
    """The text of so many tokens, or, where the tokenizer does not tell where they lie, the most that has no more."""
    if tokenizer.is_fast:
        encoded = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
        spans = encoded["offset_mapping"]
        (start, end), after = spans[count - 1], spans[count][0]
        # A letter of several tokens has its whole span in each: one that does not fit is left out, if not all of it.
        return text[: start if start > 0 and after < end else end]

    def tokens_before(end: int) -> int:
        return len(tokenizer(text[:end], add_special_tokens=False, verbose=False).input_ids)

    return text[: bisect_right(range(len(text) + 1), count, key=tokens_before) - 1]
