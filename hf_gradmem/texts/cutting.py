"""Long texts cut into segments that fit: at paragraphs, within them at sentences, within these between tokens."""

import re
from bisect import bisect_right
from collections.abc import Callable, Iterator

from transformers import PreTrainedTokenizerBase

from .sentences import sentences

_BETWEEN_PARAGRAPHS = re.compile(r"\n\s*\n")


def cut_text(text: str, tokenizer: PreTrainedTokenizerBase, max_length: int) -> list[str]:
    """Cut a text into segments of at most so many tokens, for contexts that are longer than the base's window.

    A text that fits stays whole. A longer one is cut into its paragraphs, a paragraph that is still too long into its
    sentences, and such a sentence between tokens. Then neighbours are joined again for as long as they fit together.
    Put together, the segments are the text, character for character: white space between two belongs to the second.

    Args:
        text: what to cut.
        tokenizer: counts the tokens of each segment on its own, without special tokens, as WRITE takes them.
        max_length: most tokens of a segment. `model.writer.longest_segment` is the most that a model can write.

    Returns:
        The segments, one at least. `model.write([cut_text(...)])` writes them into one memory.

    Raises:
        ValueError: `max_length` is below 1, or below the tokens of a single character.

    Examples:

        >>> segments = cut_text(text, model.tokenizer, model.writer.longest_segment)  # doctest: +SKIP
        >>> memory = model.write([segments])  # doctest: +SKIP
    """
    if max_length < 1:
        raise ValueError(f"max_length must be at least 1, got {max_length}.")

    def count(piece: str) -> int:
        return len(tokenizer(piece, add_special_tokens=False, return_attention_mask=False, verbose=False).input_ids)

    if count(text) <= max_length:
        return [text]
    cuts: list[Callable[[str], list[str]]] = [
        split_paragraphs,
        sentences,
        lambda piece: list(_between_tokens(piece, tokenizer, count, max_length)),
    ]
    pieces = [(text, count(text))]
    for cut in cuts:
        pieces = [
            part
            for piece, length in pieces
            for part in ([(piece, length)] if length <= max_length else [(each, count(each)) for each in cut(piece)])
        ]
    return list(_joined(pieces, count, max_length))


def split_paragraphs(text: str) -> list[str]:
    """The paragraphs of a text, each with the empty lines before it; put together they are the text."""
    first, last = len(text) - len(text.lstrip()), len(text.rstrip())
    inner = [match.start() for match in _BETWEEN_PARAGRAPHS.finditer(text) if first < match.start() < last]
    return [text[start:end] for start, end in zip([0, *inner], [*inner, len(text)], strict=True)]


def _joined(pieces: list[tuple[str, int]], count: Callable[[str], int], max_length: int) -> Iterator[str]:
    """Pieces with as many of those after them as fit; each comes with its number of tokens, and fits alone."""
    first = 0
    while first < len(pieces):
        last, total = first + 1, pieces[first][1]
        while last < len(pieces) and total + pieces[last][1] <= max_length:
            total += pieces[last][1]
            last += 1
        # Tokens are not quite a sum: a tokenizer may make more of two pieces together than of each.
        while last > first + 1 and count(_text(pieces[first:last])) > max_length:
            last -= 1
        yield _text(pieces[first:last])
        first = last


def _text(pieces: list[tuple[str, int]]) -> str:
    return "".join(text for text, _ in pieces)


def _between_tokens(
    text: str, tokenizer: PreTrainedTokenizerBase, count: Callable[[str], int], max_length: int
) -> Iterator[str]:
    """Pieces of at most so many tokens, each as long as it can be and ending where a token does."""
    places = _token_starts(text, tokenizer)
    start = 0
    while start < len(text):
        first = bisect_right(places, start)
        ends = places[first : first + max_length]
        end = _last_that_fits(text, start, ends, count, max_length)
        if end is None:  # cut off from what is before it, a token may become several
            end = _last_that_fits(text, start, list(range(start + 1, ends[0])), count, max_length)
        if end is None:
            raise ValueError(
                f"max_length={max_length} is too small: the character {text[start]!r} alone has {count(text[start])} "
                "tokens."
            )
        yield text[start:end]
        start = end


def _token_starts(text: str, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Where tokens begin, and the end of the text; every place, with a tokenizer that does not tell."""
    if not tokenizer.is_fast:
        return list(range(len(text) + 1))
    encoded = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
    return sorted({start for start, _ in encoded["offset_mapping"]} | {len(text)})


def _last_that_fits(text: str, start: int, ends: list[int], count: Callable[[str], int], max_length: int) -> int | None:
    """The last of these ends with which the piece from `start` fits; `None` where there is none."""
    below, above = 0, len(ends)  # those before `below` fit, those from `above` on do not
    while below < above:
        middle = above - 1 if above == len(ends) else (below + above) // 2  # mostly the last one fits
        if count(text[start : ends[middle]]) <= max_length:
            below = middle + 1
        else:
            above = middle
    return ends[below - 1] if below else None
