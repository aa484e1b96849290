"""Stories of bAbI's first five tasks (Weston et al., arXiv 1502.05698), drawn without end.

People walk between rooms and take, drop and give things (QA1, QA2, QA3, QA5), or two sentences say how three rooms lie
(QA4). The worlds, sentences and questions are those of the published files, as they were found by counting in them:
two sentences, then a question if one of the last five sentences gives rise to one, until five were asked. A row is a
story up to one of its questions, as in [`~hf_gradmem.tasks.babi`], so what is trained here is evaluated there.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
from datasets import Dataset, IterableDataset
from transformers import PreTrainedTokenizerFast

from . import generated
from .babi import word_tokenizer
from .babi_world import PEOPLE, ROOMS, TALES, THINGS, Asked, Event, World
from .generated import number_range
from .rows import SPLITS, check_split
from .task import Task

MOVED = ("moved to", "went to", "journeyed to", "travelled to", "went back to")
GOT = ("got", "grabbed", "picked up", "took")
DROPPED = ("discarded", "dropped", "left", "put down")
GAVE = ("gave", "handed", "passed")
OPPOSITE = {"north": "south", "south": "north", "east": "west", "west": "east"}
QUESTION_WORDS = "Where is was before ? What Who did give received to of The the there ."

PER_STORY = 5  # questions asked of a story; one in QA4
TRIES = 10_000  # stories that are drawn to find one of a length
# How often "there" is said of getting and of dropping something.
SAYS_THERE = {2: (1.0, 0.2), 3: (0.2, 0.2), 5: (1.0, 0.2)}
FEWEST = {1: 2, 2: 2, 3: 4, 4: 2, 5: 2}  # sentences before the first question can be asked


def _sentence(world: World, event: Event, qa: int) -> str:
    if event.kind == "move":
        return f"{event.person} {world.one_of(MOVED)} the {event.what}.\n"
    if event.kind == "give":
        return f"{event.person} {world.one_of(GAVE)} the {event.what} to {event.receiver}.\n"
    getting, dropping = SAYS_THERE[qa]
    verbs, share = (GOT, getting) if event.kind == "get" else (DROPPED, dropping)
    there = " there" if world.rng.random() < share else ""
    return f"{event.person} {world.one_of(verbs)} the {event.what}{there}.\n"


def _directions(rng: np.random.Generator, ways_asked: float) -> tuple[list[str], Callable[[], Asked]]:
    """QA4: how two rooms lie from the one between them, and the questions on it, of which some ask for the way."""
    middle, *ends = (ROOMS[int(room)] for room in rng.permutation(len(ROOMS))[:3])
    direction = list(OPPOSITE)[int(rng.integers(len(OPPOSITE)))]
    told = []
    for end, way in zip(ends, (direction, OPPOSITE[direction]), strict=True):
        # Two thirds of the sentences begin with an end.
        told.append((end, way, middle) if rng.random() < 2 / 3 else (middle, OPPOSITE[way], end))

    def ask() -> Asked:
        room, way, other = told[int(rng.integers(2))]
        if ways_asked and rng.random() < ways_asked:  # no number is drawn, and no story changed, where it is 0
            return f"Where is the {room} of the {other}?", way
        if rng.random() < 0.5:
            return f"What is {way} of the {other}?", room
        return f"What is the {other} {OPPOSITE[way]} of?", room

    return [f"The {room} is {way} of the {other}.\n" for room, way, other in told], ask


@dataclass(frozen=True)
class BabiStories:
    """The distribution that stories are drawn from; `row` is a pure function of its seed and an index.

    Attributes:
        qa: number of the task, 1 to 5, or a list of them, of which each story draws one.
        num_statements: sentences of a context, or the smallest and largest number; as many as it takes when `None`.
            Questions follow every second sentence, so a span must hold an even number. A story of QA3 may be told in
            more than 200.
        question: which of a story's questions a row ends with, or the first and last of those, of which each row
            draws one. QA4 asks one of a story.
        queries_per_context: most questions on a context. One, as in the files; above it, further ones that could have
            been asked in its place.
        ways_asked: share of QA4's questions that ask which way a room lies from another ("Where is the office of the
            kitchen?" "north"), as the files never do. What they ask for stands before all that the question names, so
            it can only be found backwards, and a model that is asked nothing else learns neither to store the ways nor
            to read them.
        hops_asked: share of the further questions on a story of QA2 or QA3 that ask for a part of the way to an answer:
            "Where is Mary?" or "Who got the milk?", as those files never do; in QA3 "Where was Mary before the
            kitchen?" and QA2's question as well. Asked for the whole alone, a model is slow to learn the parts.
        seed: of the stream.
        split: streams of different splits are independent.

    Raises:
        ValueError: a value is out of range, or no context of the task has so many sentences.
    """

    qa: int | Sequence[int] = 1
    num_statements: int | Sequence[int] | None = None
    question: int | Sequence[int] = (1, PER_STORY)
    queries_per_context: int = 1
    ways_asked: float = 0.0
    hops_asked: float = 0.0
    seed: int = 0
    split: str = "train"

    def __post_init__(self) -> None:
        check_split(self.split)
        if not self.tasks or not set(self.tasks) <= FEWEST.keys():
            raise ValueError(f"qa must be a task of bAbI from 1 to 5, or a list of such, got {self.qa!r}.")
        for task in self.tasks:
            self._check_span(task)
        for name, lowest in (("queries_per_context", 1), ("seed", 0)):
            if getattr(self, name) < lowest:
                raise ValueError(f"{name} must be at least {lowest}, got {getattr(self, name)}.")
        for name in ("ways_asked", "hops_asked"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"{name} is a share of the questions, 0 to 1, got {getattr(self, name)}.")

    @property
    def tasks(self) -> tuple[int, ...]:
        """The tasks that a story draws one of."""
        return (self.qa,) if isinstance(self.qa, int) else tuple(self.qa)

    @property
    def span(self) -> tuple[int, float]:
        """The smallest and the largest number of sentences."""
        if self.num_statements is None:
            return 1, float("inf")
        return number_range("num_statements", self.num_statements)

    def _check_span(self, task: int) -> None:
        """Refuse a span that no story fits: QA1 asks after every two sentences, QA4 once, the others when they can."""
        first, last = (1, 1) if task == 4 else number_range("question", self.question)
        fewest = FEWEST[task] + 2 * (first - 1)
        most = 2 * last if task in (1, 4) else float("inf")
        lowest = max(self.span[0], fewest)
        if min(self.span[1], most) < lowest + lowest % 2:
            raise ValueError(
                f"num_statements={self.num_statements} fits no story of QA{task}: before question {self.question} "
                f"stands an even number of sentences, {fewest} {'or more' if most > 2 * last else f'to {most}'}."
            )

    def row(self, index: int) -> dict[str, Any]:
        """The story of this index in the stream, up to one of its questions.

        Raises:
            ValueError: no story of so many sentences was found.
        """
        rng = np.random.default_rng([self.seed, SPLITS.index(self.split), index])
        task = self.tasks[int(rng.integers(len(self.tasks)))]
        for _ in range(TRIES):
            told = self._story(rng, task)
            if told is not None:
                sentences, asked = told
                queries, answers = zip(*asked, strict=True)
                return {"context": sentences, "queries": list(queries), "targets": [f" {word}" for word in answers]}
        raise ValueError(
            f"None of {TRIES:,} stories of QA{task} has num_statements={self.num_statements} before question "
            f"{self.question}. Give a wider span."
        )

    def _story(self, rng: np.random.Generator, task: int) -> tuple[list[str], list[Asked]] | None:
        """Sentences and questions, if a story of the span came of it."""
        if task == 4:
            sentences, ask = _directions(rng, self.ways_asked)
            return sentences, self._different(ask)
        first, last = number_range("question", self.question)
        ends_with = int(rng.integers(first, last + 1))
        tale = TALES[task]
        world, sentences, number = World(rng, tale.people), [], 0
        while len(sentences) + 2 <= self.span[1]:
            sentences += [_sentence(world, world.happen(tale.kinds), task) for _ in range(2)]
            asked = tale.ask(world)
            number += asked is not None
            if asked is not None and number == ends_with:
                found = self._different(partial(tale.ask_further, world, self.hops_asked), asked)
                return (sentences, found) if len(sentences) >= self.span[0] else None
        return None

    def _different(self, ask: Callable[[], Asked | None], *first: Asked) -> list[Asked]:
        """So many different questions on a context, or as many as turn up."""
        found = dict.fromkeys(first)
        for _ in range(8 * self.queries_per_context):
            if len(found) == self.queries_per_context:
                break
            asked = ask()
            if asked is not None:
                found[asked] = None
        return list(found)


def load(split: str = "train", *, num_contexts: int = 1000, **arguments: Any) -> Dataset:
    """The first `num_contexts` contexts of a stream, as a table; `arguments` are those of [`BabiStories`]."""
    return generated.table(BabiStories(split=split, **arguments), num_contexts)


def stream(
    split: str = "train", *, num_contexts: int | None = None, num_shards: int = 1, first: int = 0, **arguments: Any
) -> IterableDataset:
    """The same contexts, generated as they are needed.

    Args:
        split: `"train"`, `"validation"` or `"test"`.
        num_contexts: how many contexts; endless when `None`.
        num_shards: how many readers can share the stream.
        first: index of the first of them.
        arguments: those of [`BabiStories`].
    """
    return generated.stream(BabiStories(split=split, **arguments), num_contexts, num_shards, first)


def build_tokenizer(rows: Iterable[Mapping[str, Any]] = ()) -> PreTrainedTokenizerFast:
    """One token for each word of the five tasks, so that a base trained on one knows the words of all.

    Args:
        rows: not looked at. The vocabulary does not depend on them.
    """
    names = [*ROOMS, *THINGS, *PEOPLE[1], *PEOPLE[5], *OPPOSITE]
    return word_tokenizer([*names, *MOVED, *GOT, *DROPPED, *GAVE, QUESTION_WORDS])


TASK = Task(load, stream, build_tokenizer)
