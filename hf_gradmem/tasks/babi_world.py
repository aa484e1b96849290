"""The world of bAbI's stories about people: what happens in it, and what is asked of it (QA1, QA2, QA3 and QA5).

People walk between rooms and take, drop and give things. What is possible, and which questions arise, was found by
counting in the published files.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TypeVar

import numpy as np

Choice = TypeVar("Choice")
Asked = tuple[str, str]  # a question and its answer

ROOMS = ("bathroom", "bedroom", "garden", "hallway", "kitchen", "office")
# Whoever and whatever stands first is given to, and given away, first: so it is in the files.
THINGS = ("apple", "football", "milk")
PEOPLE = {1: ("Daniel", "John", "Mary", "Sandra"), 5: ("Mary", "Fred", "Bill", "Jeff")}
WINDOW = 5  # a question is about one of so many last sentences


@dataclass
class Event:
    """What a sentence tells: somebody did something, to a room or thing, and perhaps for somebody."""

    kind: str
    person: str
    what: str
    receiver: str = ""


@dataclass
class World:
    """Where everybody and everything is, and what was told of it.

    Attributes:
        place: of each person, and of each thing that nobody holds. Where they start is not told.
        holder: of each thing that is held.
        known: people whose room was told.
        events: what happened, in order.
        last: for each thing, when it was last taken or dropped.
        carried: for each thing, the rooms that it was carried into since it was last taken.
    """

    rng: np.random.Generator
    people: Sequence[str]
    place: dict[str, str] = field(default_factory=dict)
    holder: dict[str, str] = field(default_factory=dict)
    known: set[str] = field(default_factory=set)
    events: list[Event] = field(default_factory=list)
    last: dict[str, int] = field(default_factory=dict)
    carried: dict[str, list[str]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.place = {name: self.one_of(ROOMS) for name in (*self.people, *THINGS)}

    def one_of(self, choices: Sequence[Choice]) -> Choice:
        return choices[int(self.rng.integers(len(choices)))]

    def happen(self, kinds: Sequence[str]) -> Event:
        """Something that is possible: kinds and people are drawn until one is."""
        event = None
        while event is None:
            kind, person = self.one_of(kinds), self.one_of(self.people)
            event = self._gift() if kind == "give" else self._possible(kind, person)
        self._tell(event)
        return event

    def _possible(self, kind: str, person: str) -> Event | None:
        room = self.place[person]
        if kind == "move":
            choices = [self.one_of(ROOMS)]
            choices = [] if choices == [room] else choices
        elif kind == "get":
            choices = [thing for thing in THINGS if thing not in self.holder and self.place[thing] == room]
        else:
            choices = [thing for thing in THINGS if self.holder.get(thing) == person]
        return Event(kind, person, self.one_of(choices)) if choices else None

    def _gift(self) -> Event | None:
        """The first thing that can be given, to the first person that it can be given to."""
        for thing in filter(self.holder.__contains__, THINGS):
            giver = self.holder[thing]
            for receiver in self.people:
                if receiver != giver and self.place[receiver] == self.place[giver]:
                    return Event("give", giver, thing, receiver)
        return None

    def _tell(self, event: Event) -> None:
        if event.kind == "move":
            self.place[event.person] = event.what
            self.known.add(event.person)
            for thing, holder in self.holder.items():
                if holder == event.person:
                    self.carried[thing].append(event.what)
        elif event.kind != "give":
            self.last[event.what] = len(self.events)
        if event.kind == "get":
            self.holder[event.what] = event.person
            self.carried[event.what] = []
        elif event.kind == "drop":
            del self.holder[event.what]
            self.place[event.what] = self.place[event.person]
        elif event.kind == "give":
            self.holder[event.what] = event.receiver
        self.events.append(event)

    def recent(self) -> list[Event]:
        """The takings and droppings in the last sentences that are the last of their thing."""
        found = [self.events[last] for last in self.last.values() if len(self.events) - last <= WINDOW]
        return sorted(found, key=lambda event: event.what)


def _ask_person(world: World) -> Asked | None:
    """QA1: where somebody is of whom one of the last sentences told."""
    person = world.one_of(world.events[-WINDOW:]).person
    return f"Where is {person}?", world.place[person]


def _ask_thing(world: World) -> Asked | None:
    """QA2: where something is that was dropped, or taken and carried off, in one of the last sentences."""
    things = {}
    for event in world.recent():
        if event.kind == "get" and world.carried[event.what]:
            things[event.what] = world.place[event.person]
        # Whoever drops something in an untold room leaves it in one.
        elif event.kind == "drop" and _told(world, event):
            things[event.what] = world.place[event.what]
    if not things:
        return None
    thing, room = world.one_of(sorted(things.items()))
    return f"Where is the {thing}?", room


def _told(world: World, event: Event) -> bool:
    """Whether the room was told that somebody was in at an event."""
    before = world.events[: world.last[event.what]]
    return any(earlier.kind == "move" and earlier.person == event.person for earlier in before)


def _ask_hop(world: World) -> Asked:
    """A part of what QA2 and QA3 ask: where somebody is, or who got something and has it still."""
    asked = [(f"Where is {person}?", world.place[person]) for person in sorted(world.known)]
    asked += [(f"Who got the {thing}?", holder) for thing, holder in sorted(world.holder.items())]
    return world.one_of(asked)


def _before(rooms: Sequence[str]) -> list[tuple[str, str]]:
    """The rooms that were come into from a room, each for the last time in it, and that room before it."""
    return [(rooms[at], rooms[at - 1]) for at in range(1, len(rooms)) if rooms[at] not in rooms[at + 1 :]]


def _ask_person_before(world: World) -> Asked | None:
    """A part of what QA3 asks: where somebody was before the last time in a room."""
    moves = [event for event in world.events if event.kind == "move"]
    steps = [
        (person, *step)
        for person in sorted(world.known)
        for step in _before([event.what for event in moves if event.person == person])
    ]
    if not steps:
        return None
    person, room, before = world.one_of(steps)
    return f"Where was {person} before the {room}?", before


def _ask_before(world: World) -> Asked | None:
    """QA3: where something was before somebody carried it into a room, that being its last time in there."""
    carries = {}
    for event in world.recent():
        steps = _before(world.carried[event.what])
        if steps:
            carries[event.what] = steps
    if not carries:
        return None
    thing, steps = world.one_of(sorted(carries.items()))
    room, before = world.one_of(steps)
    return f"Where was the {thing} before the {room}?", before


def _ask_gift(world: World) -> Asked | None:
    """QA5: who gave what to whom in one of the last sentences. Its giver, thing and receiver are asked for alike."""
    gifts = {event.what: event for event in world.events[-WINDOW:] if event.kind == "give"}  # the last of each thing
    if not gifts:
        return None
    gift = world.one_of(list(gifts.values()))
    giver, thing, receiver = gift.person, gift.what, gift.receiver
    who_gave = [(f"Who gave the {thing}?", giver), (f"Who gave the {thing} to {receiver}?", giver)]
    who_got = [(f"Who received the {thing}?", receiver), (f"Who did {giver} give the {thing} to?", receiver)]
    asked = [who_gave, who_got]
    between = [event for event in world.events if (event.person, event.receiver) == (giver, receiver)]
    if between[-1] is gift:  # a later gift of his to her would be another answer
        asked.append([(f"What did {giver} give to {receiver}?", thing)])
    return world.one_of(world.one_of(asked))


@dataclass(frozen=True)
class Tale:
    """A task about people: who they are, what happens, what is asked, and what may be asked of the parts of that."""

    people: Sequence[str]
    kinds: Sequence[str]
    ask: Callable[[World], Asked | None]
    parts: Sequence[Callable[[World], Asked | None]] = ()

    def ask_further(self, world: World, hops_asked: float) -> Asked | None:
        """A question of the task, or, as often as this share says, of one of its parts."""
        if self.parts and hops_asked and world.rng.random() < hops_asked:
            return world.one_of(self.parts)(world)
        return self.ask(world)


TALES = {
    1: Tale(PEOPLE[1], ("move",), _ask_person),
    2: Tale(PEOPLE[1], ("move", "get", "drop"), _ask_thing, (_ask_hop,)),
    3: Tale(PEOPLE[1], ("move", "get", "drop"), _ask_before, (_ask_hop, _ask_thing, _ask_person_before)),
    5: Tale(PEOPLE[5], ("move", "get", "drop", "give"), _ask_gift),
}
