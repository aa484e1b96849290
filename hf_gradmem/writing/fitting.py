"""Texts cut so that they fit: what makes a write of a long file just work."""

from collections.abc import Sequence

from transformers import PreTrainedTokenizerBase

from ..texts.cutting import cut_text
from .writers.writer import Writer


def fit_contexts(
    writer: Writer,
    tokenizer: PreTrainedTokenizerBase,
    contexts: Sequence[str | list[str]],
    segment_length: int | None = None,
) -> list[str | list[str]]:
    """Contexts that can be written: one that is longer than the base's window is cut into segments that fit.

    Args:
        writer: of the model that writes them, `model.writer`.
        tokenizer: the model's.
        contexts: texts, or lists of texts, their segments.
        segment_length: most tokens of a segment, for every context. By default contexts that fit stay as they are, and
            of others each text that is longer than `writer.longest_segment` is cut to that, by
            [`~hf_gradmem.cut_text`].

    Returns:
        A text for a context in one piece, else the list of its segments. Those of a writer that reads contexts whole
        are as they were.

    Raises:
        ValueError: `segment_length` is below 1 or does not fit into the base's window, or the writer takes no segments.
    """
    longest = writer.longest_segment
    if segment_length is not None:
        _check(writer, segment_length)
        return [_cut(writer, tokenizer, context, segment_length) for context in contexts]
    if not writer.takes_segments or longest is None or longest < 1:
        return list(contexts)
    return [
        context if _fits(writer, tokenizer, context) else _cut(writer, tokenizer, context, longest)
        for context in contexts
    ]


def _check(writer: Writer, segment_length: int) -> None:
    if not writer.takes_segments:
        raise ValueError("This adapter's writer reads a context whole and takes no segments: leave segment_length out.")
    if segment_length < 1:
        raise ValueError(f"segment_length must be at least 1, got {segment_length}.")
    longest = writer.longest_segment
    if longest is not None and segment_length > longest:
        before = f", with the {writer.prefix_segments} before it," if writer.prefix_segments else ""
        raise ValueError(
            f"segment_length={segment_length} does not fit: a segment{before} shares the base's window of "
            f"{writer.phase.decoder.window} positions with the memory and its control tokens. It can be at most "
            f"{longest}."
        )


def _fits(writer: Writer, tokenizer: PreTrainedTokenizerBase, context: str | list[str]) -> bool:
    """Whether each segment fits into a row with those before it."""
    lengths = [len(ids) for ids in _encoded(tokenizer, _texts(writer, context))]
    if len(lengths) == 1 and writer.segment_length is not None:
        whole, rest = divmod(lengths[0], writer.segment_length)
        lengths = [*[writer.segment_length] * min(whole, 1 + writer.prefix_segments), rest]
    rows = (sum(lengths[max(0, last - writer.prefix_segments) : last + 1]) for last in range(len(lengths)))
    return writer.room is None or max(rows, default=0) <= writer.room


def _texts(writer: Writer, context: str | list[str]) -> list[str]:
    return writer.segments([context] if isinstance(context, str) else context)


def _encoded(tokenizer: PreTrainedTokenizerBase, texts: list[str]) -> list[list[int]]:
    if not texts:
        return []
    return tokenizer(texts, add_special_tokens=False, return_attention_mask=False, verbose=False).input_ids


def _cut(writer: Writer, tokenizer: PreTrainedTokenizerBase, context: str | list[str], length: int) -> str | list[str]:
    segments = [segment for text in _texts(writer, context) for segment in cut_text(text, tokenizer, length)]
    return segments[0] if isinstance(context, str) and len(segments) == 1 else segments
