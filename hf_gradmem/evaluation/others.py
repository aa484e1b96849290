"""The memory of another context: what is answered from it is what the reader guesses."""

from collections.abc import Callable, Mapping, Sequence
from itertools import chain
from typing import Any

from ..memory.written import GradMemMemory
from ..tasks.rows import context_text

Row = Mapping[str, Any]


def other_rows(rows: Sequence[Row], wrap: int) -> list[int]:
    """For each row the number of the nearest one before it that has another context.

    Another context is neither the same text nor the beginning of it, nor does it go on from it: where questions on one
    text are rows of their own, or stories are asked about as they go on, the row before holds the answer.

    Args:
        rows: of a task.
        wrap: of how many rows the last ones come before the first one.

    Raises:
        ValueError: a row has no such other.
    """
    texts = [context_text(row["context"]) for row in rows]
    others: list[int] = []
    for number, text in enumerate(texts):
        if number and text == texts[number - 1]:
            others.append(others[-1])
            continue
        nearest = chain(range(number - 1, -1, -1), range(min(wrap, len(rows)) - 1, number, -1), range(wrap, len(rows)))
        apart = (each for each in nearest if not (text.startswith(texts[each]) or texts[each].startswith(text)))
        other = next(apart, None)
        if other is None:
            raise ValueError(
                f"Questions are also asked of another context's memory, and of {len(rows)} rows none has another "
                f"context than row {number} ({text[:60]!r}): give two rows at least, with contexts of which none "
                "begins with the other."
            )
        others.append(other)
    return others


class OtherMemories:
    """For each row the memory of its other row, batch after batch.

    Args:
        rows: all of them.
        others: of [`other_rows`].
    """

    def __init__(self, rows: Sequence[Row], others: Sequence[int]) -> None:
        self._rows, self._others, self._done = rows, others, 0
        self._last_reader = {other: number for number, other in enumerate(others)}
        self._kept: dict[int, GradMemMemory] = {}

    def of_next(self, memory: GradMemMemory, write: Callable[[Row], GradMemMemory]) -> GradMemMemory:
        """What the rows of the next batch read in place of their own memories.

        Args:
            memory: their own.
            write: the memory of a row; asked for one that is read before its batch comes.
        """
        first, self._done = self._done, self._done + len(memory)
        known = self._kept | {first + place: memory[place] for place in range(len(memory))}
        read = self._others[first : self._done]
        for number in read:
            if number not in known:
                known[number] = write(self._rows[number])
        self._kept = {number: each for number, each in known.items() if self._last_reader.get(number, 0) >= self._done}
        return GradMemMemory.cat([known[number] for number in read])
