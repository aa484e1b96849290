"""Search by words: BM25 (Robertson and Zaragoza, 2009) over the texts that memories were written from."""

import importlib.util
from collections.abc import Sequence
from typing import Any

from .search import SearchResult


class WordIndex:
    """An index of texts. It is made in working memory: about a second for ten thousand paragraphs.

    Args:
        ids: names of the texts.
        texts: what is to be found.

    Raises:
        ImportError: the package `bm25s` is missing.
    """

    def __init__(self, ids: Sequence[str], texts: Sequence[str]) -> None:
        package, tokens = _package(), self._tokens(texts)
        self._ids = ids
        self._index = package.BM25()
        self._words: set[str] = set(tokens.vocab)  # of two letters or more
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
        """The best `count`; all, where that would cut among those that share no word with the question."""
        ranked = self.best(question)
        return ranked if any(result.score == 0 for result in ranked[:count]) else ranked[:count]

    def _tokens(self, texts: Sequence[str], **options: Any) -> Any:
        # No list of stop words, which would be of one language: words that many texts have weigh little by themselves.
        return _package().tokenize(list(texts), stopwords=None, show_progress=False, **options)


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
