"""Sentences of running text, by punctuation alone."""

import re

# The end of a sentence: its last mark with the quotes and brackets that close there, then white space, then a letter or
# digit of any script, which begins a sentence unless it is a small letter.
_END = re.compile(r"""[.!?…]["'”’“»)\]]*(?=\s+["'“‘„«(\[_]*([^\W_]))""")
# Words whose full stop ends no sentence, and initials: capitals, and small letters outside English (г. Тула).
_ABBREVIATION = re.compile(
    r"(?:^|[\s(\[\"'“‘„«])(?:Mr|Mrs|Ms|Messrs|Dr|Prof|Rev|Hon|Gen|Col|Capt|Lt|Sgt|Gov|Sen|Rep|Pres|St|Mt|Jr|Sr|vs|etc|No|"
    r"Nos|Vol|Fig|Ch|cf|ca|approx|e\.g|i\.e|(?:[^\W\d_a-z]\.)*[^\W\d_a-z])\.$"
)
_LONGEST_ABBREVIATION = 24


def sentences(text: str) -> list[str]:
    """The sentences of a text, each with the white space before it; put together they are the text."""
    return [text[start:end] for start, end in split_sentences(text)]


def split_sentences(text: str) -> list[tuple[int, int]]:
    """Where the sentences of `text` begin and end.

    The slices follow each other without a gap and cover the text: the white space between two sentences belongs to
    the second. A full stop after an abbreviation, an initial or a title ends nothing.
    """
    ends = []
    for match in _END.finditer(text):
        if match[1].islower():
            continue
        stop = match.start() + 1
        if text[match.start()] == "." and _ABBREVIATION.search(text[max(0, stop - _LONGEST_ABBREVIATION) : stop]):
            continue
        ends.append(match.end())
    ends.append(len(text))
    spans = list(zip([0, *ends[:-1]], ends, strict=True))
    if len(spans) > 1 and not text[slice(*spans[-1])].strip():
        (start, _), (_, end) = spans[-2:]
        spans[-2:] = [(start, end)]
    return [(start, end) for start, end in spans if end > start]
