"""Search by words: BM25 (Robertson and Zaragoza, 2009) over the texts that memories were written from."""

import importlib.util
import itertools
import re
from collections.abc import Sequence
from typing import Any

from .search import SearchResult


class WordIndex:
    """An index of texts. It is made in working memory: about a second for ten thousand paragraphs.

    Args:
        ids: names of the texts.
        texts: what is to be found, each as its segments.

    Raises:
        ImportError: the package `bm25s` is missing.
    """

    def __init__(self, ids: Sequence[str], texts: Sequence[Sequence[str]]) -> None:
        package, tokens = _package(), self._tokens(list(map(_searchable, texts)))
        self._ids = ids
        self._index = package.BM25()
        self._words: set[str] = set(tokens.vocab)
        if self._words:
            self._index.index(tokens, show_progress=False)

    def best(self, question: str, count: int | None = None) -> list[SearchResult]:
        """The best `count` texts for a question, or all, best first; of equals, the earlier one.

        The score of a text that shares no word with the question is 0.
        """
        words = self._tokens([question], return_ids=False)[0]
        if not self._words.intersection(words):
            return [SearchResult(name, 0.0) for name in self._ids[:count]]
        scores = self._index.get_scores(words)
        order = (-scores).argsort(kind="stable")[:count]
        return [SearchResult(self._ids[number], float(scores[number])) for number in order]

    def shortlist(self, question: str, count: int | None) -> list[SearchResult]:
        """The best `count`, and those that are equal to the last of them; all of them that share no word, so."""
        ranked = self.best(question)
        if count is None or count >= len(ranked):
            return ranked
        least = ranked[count - 1].score
        return list(itertools.takewhile(lambda result: result.score >= least, ranked))

    def _tokens(self, texts: list[str], **options: Any) -> Any:
        # No list of stop words, which would be of one language: words that many texts have weigh little by themselves.
        # A word may be one letter or digit, by which gate 7 is told from gate 8.
        return _package().tokenize(texts, stopwords=None, token_pattern=r"(?u)\b\w+\b", show_progress=False, **options)


def _searchable(segments: Sequence[str]) -> str:
    """Segments as one text. They may be texts of their own, or cut within a word, which then counts as well."""
    words = [*segments]
    for before, behind in itertools.pairwise(segments):
        end, beginning = re.search(r"\w+\Z", before), re.match(r"\w+", behind)
        if end and beginning:
            words.append(end[0] + beginning[0])
    return " ".join(words)


def can_search_words() -> bool:
    """Whether the package that this needs is installed."""
    return importlib.util.find_spec("bm25s") is not None


def _package() -> Any:
    try:
        import bm25s  # type: ignore[import-untyped]
    except ImportError as error:
        raise ImportError(
            "Search by words needs the package bm25s, which is not installed: pip install hf-gradmem[search]. "
            "Or search by the likelihood of the question alone."
        ) from error
    return bm25s
