"""Facts in English about invented people: their jobs, towns, dates and amounts, told in varied sentences.

A context tells several facts about one to three people, a sentence each; a question asks for one of them. Some
questions ask what the context does not tell, about the same people or about others, and are to be answered by saying
so. Names, towns, dates and amounts are drawn independently, so nothing but the context holds an answer. A quote is the
sentence that tells it. Some words that a question can be put in are kept out of training, to ask for the same facts in
other words.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from datasets import Dataset, IterableDataset

from . import generated
from .generated import number_range
from .rows import FEATURES_WITH_QUOTES, SPLITS, check_split
from .task import Task

NOT_TOLD = "not in memory"


def _list(words: str) -> list[str]:
    return words.split()


_FIRST = _list(
    "Ada Anton Bela Bruno Carla Cyrus Dalia Dmitri Edith Emil Farah Felix Greta Gustav Hanna Hugo Ines Ivan Judith "
    "Jonas Katia Kurt Leila Lars Marta Milan Nadia Nils Olga Oscar Petra Pavel Rosa Rafael Selma Stefan Tilda Tobias "
    "Ursula Viktor Wanda Walter Yara Yusuf Zelda Zoran Amara Basil Clio Darius Elif Fergus Ginny Harun Isolde Jasper "
    "Kira Leon Mabel Noah Orla Piers Quinn Ruth Silas Thea Uma Vera Willem Xenia"
)
_LAST = _list(
    "Abbot Almeida Archer Bauer Becker Blake Brandt Brook Carver Castell Cole Corbin Dahl Dorsey Drake Eklund Ellis "
    "Ferro Finch Fischer Garland Graves Haas Hale Harper Holm Ibsen Jansen Keller Kern Knox Kovac Lang Larkin Lindt "
    "Lowe Marsh Mercer Moss Nash Novak Olsen Osborn Palmer Pike Quill Rand Reyes Rossi Sato Shaw Silva Stone Strand "
    "Tanner Thorne Tremain Ulrich Vance Vidal Voss Wade Webb Weiss Winter Wolfe Yates York Zander Zeller"
)
_TOWNS = _list(
    "Aberdeen Antwerp Athens Bergen Bilbao Boston Bremen Bristol Cairo Calais Cologne Cork Cracow Dallas Denver Dover "
    "Dublin Durban Florence Geneva Genoa Ghent Granada Hamburg Helsinki Houston Istanbul Kyoto Leeds Leipzig Lima "
    "Lisbon Lyon Madrid Malaga Marseille Milan Montreal Munich Nairobi Naples Nice Odessa Osaka Oslo Ottawa Oxford "
    "Palermo Porto Prague Quito Riga Rotterdam Seattle Seville Sofia Split Stockholm Sydney Tampere Toronto Trieste "
    "Turin Utrecht Valencia Vienna Warsaw York Zagreb Zurich"
)
_JOBS = _list(
    "architect baker botanist butcher carpenter chemist cook dentist doctor driver editor electrician engineer farmer "
    "fisherman florist gardener geologist glazier judge lawyer librarian locksmith mechanic midwife miner musician "
    "nurse painter pharmacist photographer pilot plumber potter printer sailor sculptor surgeon surveyor tailor "
    "teacher translator vet watchmaker weaver welder"
)
_MONTHS = _list("January February March April May June July August September October November December")
_THINGS = _list(
    "bicycle boat camera carpet chair clock coat cupboard desk drum flute guitar harp horse kettle ladder lamp "
    "lantern microscope mirror oven painting piano printer radio ring saddle sofa stove telescope tent trumpet "
    "typewriter violin wagon watch"
)
_COMPANIES = _list(
    "Alder Anchor Arrow Beacon Bluebird Bridge Cedar Compass Copper Crown Delta Eagle Ember Falcon Globe Granite "
    "Harbour Heron Ivory Juniper Lantern Lotus Maple Meridian Nova Oak Orion Phoenix Pine Polar Raven Ridge Saturn "
    "Sierra Summit Swan Tiger Union Vega Willow"
)
_DRINKS = _list("ale cider cocoa coffee lemonade milk rum sherry tea water whisky wine")


def _one_of(words: Sequence[str], form: str = "{}") -> Any:
    """Draws a value: a word, put into a form."""
    return lambda rng: form.format(words[int(rng.integers(len(words)))])


def _date(rng: np.random.Generator) -> str:
    return f"{int(rng.integers(1, 29))} {_one_of(_MONTHS)(rng)} {int(rng.integers(1901, 2020))}"


def _between(low: int, high: int, form: str = "{:,}", step: int = 1) -> Any:
    return lambda rng: form.format(int(rng.integers(low // step, high // step)) * step)


@dataclass(frozen=True)
class _Relation:
    """Something that can be told of a person.

    Attributes:
        draw: a value, given a random generator.
        told: sentences that tell it, of a person `{p}` and a value `{v}`, before which `{a}` is "a" or "an".
        asked: questions for it that are trained on.
        asked_otherwise: questions for it in words that training does not use.
    """

    draw: Any
    told: tuple[str, ...]
    asked: tuple[str, ...]
    asked_otherwise: tuple[str, ...]


_RELATIONS = {
    "job": _Relation(
        _one_of(_JOBS),
        ("{p} works as {a} {v}.", "{p} is {a} {v}.", "{p} earns a living as {a} {v}.", "By trade, {p} is {a} {v}."),
        ("What is {p}'s job?", "What does {p} work as?", "What is {p} by trade?"),
        ("What does {p} do for a living?", "Which occupation does {p} have?"),
    ),
    "home": _Relation(
        _one_of(_TOWNS),
        ("{p} lives in {v}.", "{p} has a flat in {v}.", "The home of {p} is in {v}.", "{p} settled in {v}."),
        ("Where does {p} live?", "In which town does {p} live?", "Where is {p}'s home?"),
        ("Which town is home to {p}?", "Where would one find {p}'s house?"),
    ),
    "birth": _Relation(
        _date,
        ("{p} was born on {v}.", "{p}'s date of birth is {v}.", "On {v}, {p} was born."),
        ("When was {p} born?", "What is {p}'s date of birth?", "On which day was {p} born?"),
        ("What is {p}'s birthday?", "When did {p} come into the world?"),
    ),
    "trip": _Relation(
        _one_of(_TOWNS),
        ("{p} is about to travel to {v}.", "Next week {p} flies to {v}.", "{p} has booked a journey to {v}."),
        ("Where does {p} travel to?", "Which town will {p} visit?", "Where is {p} going?"),
        ("What is the destination of {p}'s journey?", "Where is {p} headed?"),
    ),
    "salary": _Relation(
        _between(1000, 9900, "{:,} crowns", 100),
        ("{p} earns {v} a month.", "Every month {p} is paid {v}.", "{p}'s monthly pay is {v}."),
        ("How much does {p} earn?", "What is {p}'s monthly pay?", "How much is {p} paid a month?"),
        ("What does {p} make in a month?", "How large is {p}'s wage?"),
    ),
    "thing": _Relation(
        _one_of(_THINGS),
        ("{p} bought {a} {v}.", "{p} got {a} {v} for a birthday.", "{p} has a new {v}.", "The old {v} belongs to {p}."),
        ("What did {p} get?", "What belongs to {p}?", "What new thing does {p} have?"),
        ("Which object is {p}'s?", "What is it that {p} owns?"),
    ),
    "company": _Relation(
        _one_of(_COMPANIES, "{} Limited"),
        ("{p} is employed by {v}.", "{p}'s employer is {v}.", "{p} works for {v}.", "{v} has hired {p}."),
        ("Who employs {p}?", "Which company does {p} work for?", "Who is {p}'s employer?"),
        ("At which firm is {p}?", "Whose payroll is {p} on?"),
    ),
    "room": _Relation(
        _between(101, 999, "{}"),
        ("{p}'s office is room {v}.", "{p} sits in room {v}.", "You will find {p} in room {v}."),
        ("In which room is {p}?", "What is the number of {p}'s office?", "Which room is {p}'s?"),
        ("Where in the building does {p} sit?", "What number is on {p}'s door?"),
    ),
    "drink": _Relation(
        _one_of(_DRINKS),
        ("{p} likes {v} best.", "{p} always drinks {v}.", "The favourite drink of {p} is {v}."),
        ("What does {p} drink?", "What is {p}'s favourite drink?", "What does {p} like to drink?"),
        ("Which drink does {p} prefer?", "What should one pour for {p}?"),
    ),
    "friend": _Relation(
        lambda rng: f"{_one_of(_FIRST)(rng)} {_one_of(_LAST)(rng)}",
        ("{p} is a friend of {v}.", "{p} is married to {v}.", "{p} shares a flat with {v}.", "{p} is engaged to {v}."),
        ("Who is close to {p}?", "Whom is {p} close to?"),
        ("With whom is {p} close?", "Who is the person close to {p}?"),
    ),
}


@dataclass(frozen=True)
class Facts:
    """The distribution that contexts are drawn from; `row` is a pure function of its seed and an index.

    Attributes:
        num_facts: facts in a context, or the smallest and largest number, of which each context draws one.
        num_people: people that a context is about, likewise.
        queries_per_context: questions on a context; as many as there are facts when `None`, `not_told` among them.
        not_told: share of the questions whose answer the context does not hold; their target is "not in memory".
        other_words: ask in words that are kept out of training.
        segmented: whether each sentence is a segment; otherwise the context is one.
        seed: of the stream.
        split: streams of different splits are independent.

    Raises:
        ValueError: a value is out of range, or so many facts cannot be told of so few people.
    """

    num_facts: int | Sequence[int] = (4, 8)
    num_people: int | Sequence[int] = (1, 3)
    queries_per_context: int | None = None
    not_told: float = 0.25
    other_words: bool = False
    segmented: bool = True
    seed: int = 0
    split: str = "train"

    def __post_init__(self) -> None:
        check_split(self.split)
        generated.check_flags_of(self)
        _, most = number_range("num_facts", self.num_facts)
        fewest, most_people = number_range("num_people", self.num_people)
        named = min(len(_FIRST), len(_LAST)) - 1  # one more is a stranger
        if most_people > named:
            raise ValueError(f"num_people={most_people} are more than the {named} that there are names for.")
        if not 0 <= self.not_told < 1:
            raise ValueError(f"not_told is a share and must lie in 0..1, 1 excluded, got {self.not_told}.")
        if self.queries_per_context is not None and self.queries_per_context < 1:
            raise ValueError(f"queries_per_context must be at least 1, got {self.queries_per_context}.")
        if self.seed < 0:
            raise ValueError(f"seed must be at least 0, got {self.seed}.")
        if most > fewest * len(_RELATIONS):
            raise ValueError(
                f"num_facts={most} are more than the {len(_RELATIONS)} that can be told of each of {fewest} people."
            )

    def row(self, index: int) -> dict[str, Any]:
        """The context of this index in the stream, with its questions and their answers."""
        rng = np.random.default_rng([self.seed, SPLITS.index(self.split), index])
        people = _people(rng, _drawn(rng, number_range("num_people", self.num_people)))
        pairs = [(person, relation) for person in people for relation in _RELATIONS]
        count = _drawn(rng, number_range("num_facts", self.num_facts))
        told = [pairs[int(place)] for place in rng.permutation(len(pairs))[:count]]
        values = {pair: _RELATIONS[pair[1]].draw(rng) for pair in told}
        telling = {pair: _sentence(_words(rng, _RELATIONS[pair[1]].told), pair[0], values[pair]) for pair in told}
        segments = [(" " if place else "") + sentence for place, sentence in enumerate(telling.values())]
        queries, targets, quotes = [], [], []
        for person, relation in self._asked(rng, people, told):
            asked = _RELATIONS[relation]
            queries.append(_words(rng, asked.asked_otherwise if self.other_words else asked.asked).format(p=person))
            targets.append(f" {values.get((person, relation), NOT_TOLD)}")
            quotes.append(telling.get((person, relation), ""))
        context = segments if self.segmented else ["".join(segments)]
        return {"context": context, "queries": queries, "targets": targets, "quotes": quotes}

    def _asked(self, rng: np.random.Generator, people: list[str], told: list[tuple[str, str]]) -> list[tuple[str, str]]:
        """The facts that are asked for: told ones, and in place of a share of them ones that are not."""
        count = self.queries_per_context or len(told)
        asked = [told[int(place)] for place in rng.permutation(len(told))]
        asked = [asked[place % len(asked)] for place in range(count)]
        return [self._other(rng, people, told) if rng.random() < self.not_told else pair for pair in asked]

    @staticmethod
    def _other(rng: np.random.Generator, people: list[str], told: list[tuple[str, str]]) -> tuple[str, str]:
        """Something that is not told: of one of the people, or of a stranger."""
        missing = [(person, relation) for person in people for relation in _RELATIONS if (person, relation) not in told]
        if missing and rng.random() < 0.5:
            return missing[int(rng.integers(len(missing)))]
        stranger = next(name for name in _people(rng, len(people) + 1) if name not in people)
        return stranger, _words(rng, tuple(_RELATIONS))


def _drawn(rng: np.random.Generator, span: tuple[int, int]) -> int:
    return int(rng.integers(span[0], span[1] + 1))


def _words(rng: np.random.Generator, choices: Sequence[str]) -> str:
    return choices[int(rng.integers(len(choices)))]


def _sentence(words: str, person: str, value: str) -> str:
    return words.format(p=person, v=value, a="an" if value[0] in "aeiou" else "a")


def _people(rng: np.random.Generator, count: int) -> list[str]:
    """Names of people, no two of whom share a first or a last name."""
    first, last = (rng.permutation(len(names))[:count] for names in (_FIRST, _LAST))
    return [f"{_FIRST[int(a)]} {_LAST[int(b)]}" for a, b in zip(first, last, strict=True)]


def load(split: str = "train", *, num_contexts: int = 1000, **arguments: Any) -> Dataset:
    """The first `num_contexts` contexts of a stream, as a table; `arguments` are those of [`Facts`]."""
    return generated.table(Facts(split=split, **arguments), num_contexts, FEATURES_WITH_QUOTES)


def stream(
    split: str = "train", *, num_contexts: int | None = None, first: int = 0, **arguments: Any
) -> IterableDataset:
    """The same contexts from the index `first` on, generated as they are needed; without end for `None` of them."""
    task = Facts(split=split, **arguments)
    return generated.stream(task, num_contexts, first=first, features=FEATURES_WITH_QUOTES)


TASK = Task(load, stream)
