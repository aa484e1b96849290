"""Drawn stories of bAbI: what they tell answers what they ask, and they are told as the published files are.

A solver of its own replays the sentences. It is held to the published training files where they are at hand
(`../shared/data`), and so are the facts about them that the drawn stories are compared with everywhere.
"""

import re
from collections import Counter
from functools import cache
from itertools import pairwise
from pathlib import Path

import pytest

from hf_gradmem.tasks import TASKS, load_task
from hf_gradmem.tasks.babi_stories import BabiStories
from hf_gradmem.tasks.babi_world import PEOPLE, ROOMS, THINGS

FILES = Path(__file__).parents[3] / "shared" / "data" / "babi" / "en-10k"
needs_files = pytest.mark.skipif(not FILES.is_dir(), reason="the published files of bAbI are not at hand")
QA = (1, 2, 3, 4, 5)

# What the published files hold. P is a person, R a room, T a thing.
MOVES = {f"P {verb} the R." for verb in ("moved to", "went to", "journeyed to", "travelled to", "went back to")}
GETS = {f"P {verb} the T{{}}." for verb in ("got", "grabbed", "picked up", "took")}
DROPS = {f"P {verb} the T{{}}." for verb in ("discarded", "dropped", "left", "put down")}
SOMETIMES = {text.format(there) for text in GETS for there in ("", " there")}
ALWAYS = {text.format(" there") for text in GETS}
PUT = {text.format(there) for text in DROPS for there in ("", " there")}
GIFTS = {"P gave the T to P.", "P handed the T to P.", "P passed the T to P."}
WAYS = ("north", "south", "east", "west")
SENTENCES = {
    1: MOVES,
    2: MOVES | ALWAYS | PUT,
    3: MOVES | SOMETIMES | PUT,
    4: {f"The R is {way} of the R." for way in WAYS},
    5: MOVES | ALWAYS | PUT | GIFTS,
}
QUESTIONS = {
    1: {"Where is P?"},
    2: {"Where is the T?"},
    3: {"Where was the T before the R?"},
    4: {f"What is {way} of the R?" for way in WAYS} | {f"What is the R {way} of?" for way in WAYS},
    5: {
        "What did P give to P?",
        "Who gave the T?",
        "Who gave the T to P?",
        "Who received the T?",
        "Who did P give the T to?",
    },
}
# Sentences before a question: mean, median, and the number that nine tenths of the questions stay within.
LENGTHS = {1: (6.0, 6, 10), 2: (15.6, 14, 26), 3: (50.0, 42, 96), 4: (2.0, 2, 2), 5: (20.1, 16, 38)}
# Shares of the sentences that tell of a move, of taking, of dropping and of giving; of the answers that name one.
KINDS = {1: (1, 0, 0, 0), 2: (0.66, 0.2, 0.14, 0), 3: (0.64, 0.19, 0.17, 0), 5: (0.58, 0.18, 0.11, 0.13)}
ANSWERS = {
    "Mary": 0.185,
    "Fred": 0.175,
    "Bill": 0.159,
    "Jeff": 0.145,
    "apple": 0.137,
    "football": 0.108,
    "milk": 0.091,
}


class Solver:
    """Replays sentences and answers questions, by regular expressions and nothing of the package."""

    def __init__(self) -> None:
        self.room: dict[str, str] = {}
        self.holder: dict[str, str] = {}
        self.been: dict[str, list[str]] = {}  # rooms in which somebody or something was told to be, in order
        self.gifts: list[tuple[str, str, str]] = []
        self.lies: set[tuple[str, str, str]] = set()

    def tell(self, sentence: str) -> None:
        if found := re.fullmatch(r"(\w+) [\w ]+ to the (\w+)\.", sentence):
            self.room[found[1]] = found[2]
            self.been.setdefault(found[1], []).append(found[2])
            for thing in (thing for thing, holder in self.holder.items() if holder == found[1]):
                self.been.setdefault(thing, []).append(found[2])
        elif found := re.fullmatch(r"(\w+) (?:gave|handed|passed) the (\w+) to (\w+)\.", sentence):
            assert self.holder[found[2]] == found[1] != found[3], sentence
            assert self.room.get(found[1]) == self.room.get(found[3]) or not {found[1], found[3]} <= self.room.keys()
            self.gifts.append((found[1], found[2], found[3]))
            self.holder[found[2]] = found[3]
        elif found := re.fullmatch(r"(\w+) (?:got|grabbed|picked up|took) the (\w+)(?: there)?\.", sentence):
            assert found[2] not in self.holder, sentence
            if (lies := self.room.get(found[2])) and found[1] in self.room:
                assert lies == self.room[found[1]], sentence
            self.holder[found[2]] = found[1]
        elif found := re.fullmatch(r"(\w+) (?:discarded|dropped|left|put down) the (\w+)(?: there)?\.", sentence):
            assert self.holder.pop(found[2]) == found[1], sentence
            self.room.pop(found[2], None)
            if found[1] in self.room:
                self.room[found[2]] = self.room[found[1]]
        else:
            room, way, other = re.fullmatch(r"The (\w+) is (\w+) of the (\w+)\.", sentence).groups()
            opposite = {"north": "south", "south": "north", "east": "west", "west": "east"}
            self.lies |= {(room, way, other), (other, opposite[way], room)}

    def answer(self, question: str) -> str:
        if found := re.fullmatch(r"Where is (?:the )?(\w+)\?", question):
            return self.room[self.holder.get(found[1], found[1])]
        if found := re.fullmatch(r"Where was (?:the )?(\w+) before the (\w+)\?", question):
            return [before for before, room in pairwise(self.been[found[1]]) if room == found[2]][-1]
        if found := re.fullmatch(r"Who got the (\w+)\?", question):
            return self.holder[found[1]]
        if found := re.fullmatch(r"What is (\w+) of the (\w+)\?", question):
            return self.only(room for room, way, other in self.lies if (way, other) == found.groups())
        if found := re.fullmatch(r"What is the (\w+) (\w+) of\?", question):
            return self.only(other for room, way, other in self.lies if (room, way) == found.groups())
        if found := re.fullmatch(r"What did (\w+) give to (\w+)\?", question):
            return [thing for giver, thing, receiver in self.gifts if (giver, receiver) == found.groups()][-1]
        if found := re.fullmatch(r"Who gave the (\w+)(?: to (\w+))?\?", question):
            return [
                giver for giver, thing, receiver in self.gifts if thing == found[1] and found[2] in (None, receiver)
            ][-1]
        if found := re.fullmatch(r"Who received the (\w+)\?", question):
            return [receiver for _, thing, receiver in self.gifts if thing == found[1]][-1]
        giver, thing = re.fullmatch(r"Who did (\w+) give the (\w+) to\?", question).groups()
        return [receiver for given, what, receiver in self.gifts if (given, what) == (giver, thing)][-1]

    @staticmethod
    def only(found) -> str:
        (answer,) = found
        return answer


def wrong(rows) -> int:
    """How many targets are not what the solver answers."""
    count = 0
    for row in rows:
        solver = Solver()
        for sentence in row["context"]:
            solver.tell(sentence.strip())
        pairs = zip(row["queries"], row["targets"], strict=True)
        count += sum(target != f" {solver.answer(query)}" for query, target in pairs)
    return count


@cache
def form(text: str) -> str:
    """A text with people, rooms and things for their names."""
    for letter, names in (("P", {*PEOPLE[1], *PEOPLE[5]}), ("R", ROOMS), ("T", THINGS)):
        text = re.sub(rf"\b({'|'.join(names)})\b", letter, text)
    return text.strip()


def forms(rows, column: str) -> Counter:
    return Counter(form(text) for row in rows for text in row[column])


def lengths(rows) -> tuple[float, int, int]:
    counts = sorted(len(row["context"]) for row in rows)
    return sum(counts) / len(counts), counts[len(counts) // 2], counts[len(counts) * 9 // 10]


def shares(rows) -> list[float]:
    told = forms(rows, "context")
    gets, drops = ({text.format(there) for text in of for there in ("", " there")} for of in (GETS, DROPS))
    return [sum(told[text] for text in kind) / told.total() for kind in (MOVES, gets, drops, GIFTS)]


@cache
def drawn(qa: int, count: int = 1500):
    return [BabiStories(qa=qa).row(index) for index in range(count)]


@cache
def published(qa: int):
    (path,) = FILES.glob(f"qa{qa}_*_train.txt")
    rows = load_task("babi", "test", path=path).to_dict()
    return [dict(zip(rows, values, strict=True)) for values in zip(*rows.values(), strict=True)]


@needs_files
@pytest.mark.parametrize("qa", QA)
def test_the_solver_and_the_facts_are_right_of_the_published_files(qa):
    rows = published(qa)
    # Twenty questions of QA5, "What did X give to Y?", name an earlier one of two gifts.
    assert wrong(rows) == (20 if qa == 5 else 0)
    assert set(forms(rows, "context")) == SENTENCES[qa]
    assert set(forms(rows, "queries")) == QUESTIONS[qa]
    assert lengths(rows) == pytest.approx(LENGTHS[qa], abs=0.06)
    if qa in KINDS:
        assert shares(rows) == pytest.approx(KINDS[qa], abs=0.006)
    if qa == 5:
        found = Counter(target.strip() for row in rows for target in row["targets"])
        assert {name: count / len(rows) for name, count in found.items()} == pytest.approx(ANSWERS, abs=0.0006)


@needs_files
def test_the_vocabulary_is_that_of_the_published_files():
    words = {"<pad>", "<bos>", "<eos>", "<unk>"}
    for path in FILES.glob("qa*_train.txt"):
        words |= set(re.findall(r"[A-Za-z]+|[.?]", path.read_text(encoding="utf-8")))
    assert TASKS["babi_stories"].build_tokenizer().get_vocab().keys() == words


@pytest.mark.parametrize("qa", QA)
def test_every_answer_follows_from_its_story(qa):
    assert wrong(drawn(qa)) == 0
    assert wrong(BabiStories(qa=qa, queries_per_context=4).row(index) for index in range(100)) == 0


@pytest.mark.parametrize("qa", QA)
def test_stories_are_told_and_asked_of_as_in_the_published_files(qa):
    assert set(forms(drawn(qa), "context")) == SENTENCES[qa]
    assert set(forms(drawn(qa), "queries")) == QUESTIONS[qa]
    for ours, theirs in zip(lengths(drawn(qa)), LENGTHS[qa], strict=True):
        assert ours == pytest.approx(theirs, rel=0.08, abs=2.01 if qa in (2, 3, 5) else 0.3)
    if qa in KINDS:
        assert shares(drawn(qa)) == pytest.approx(KINDS[qa], abs=0.015)


@pytest.mark.parametrize("qa", QA)
def test_answers_are_as_frequent_as_in_the_published_files(qa):
    expected = ANSWERS if qa == 5 else dict.fromkeys(ROOMS, 1 / 6)
    found = Counter(target.strip() for row in drawn(qa) for target in row["targets"])
    assert {name: count / len(drawn(qa)) for name, count in found.items()} == pytest.approx(expected, abs=0.035)


def test_each_word_is_a_token_of_its_own():
    tokenizer = TASKS["babi_stories"].build_tokenizer()
    for qa in QA:
        for row in drawn(qa)[:200]:
            texts = [*row["context"], *row["queries"], *row["targets"]]
            assert tokenizer.unk_token_id not in tokenizer("".join(texts), add_special_tokens=False).input_ids
    assert len(tokenizer("Where was the milk before the hallway?", add_special_tokens=False).input_ids) == 8


def test_rows_are_a_function_of_seed_split_and_index():
    rows = load_task("babi_stories", num_contexts=6, qa=[1, 2, 5], seed=3)
    assert rows[5] == BabiStories(qa=[1, 2, 5], seed=3).row(5)
    streamed = load_task("babi_stories", streaming=True, num_contexts=6, num_shards=2, qa=[1, 2, 5], seed=3)
    assert sorted(map(str, streamed)) == sorted(map(str, rows))
    assert (
        list(load_task("babi_stories", streaming=True, num_contexts=2, first=4, qa=[1, 2, 5], seed=3)) == list(rows)[4:]
    )
    assert rows[0] != load_task("babi_stories", num_contexts=1, qa=[1, 2, 5], seed=4)[0]
    assert rows[0] != load_task("babi_stories", "test", num_contexts=1, qa=[1, 2, 5], seed=3)[0]


def test_a_list_of_tasks_has_stories_of_each():
    asked = [form(query) for row in (BabiStories(qa=QA).row(index) for index in range(300)) for query in row["queries"]]
    found = Counter(qa for query in asked for qa in QA if query in QUESTIONS[qa])
    assert all(40 < found[qa] < 80 for qa in QA)


@pytest.mark.parametrize(("qa", "span"), [(1, [3, 6]), (2, [2, 8]), (3, [4, 16]), (5, 12)])
def test_a_curriculum_can_go_by_length(qa, span):
    rows = [BabiStories(qa=qa, num_statements=span).row(index) for index in range(100)]
    lowest, highest = span if isinstance(span, list) else (span, span)
    found = {len(row["context"]) for row in rows}
    assert found == set(range(lowest + lowest % 2, highest + 1, 2))
    assert wrong(rows) == 0


def test_which_question_of_a_story_is_asked_can_be_said():
    assert {len(BabiStories(qa=1, question=3).row(index)["context"]) for index in range(20)} == {6}
    assert {len(BabiStories(qa=1, question=[4, 5]).row(index)["context"]) for index in range(40)} == {8, 10}


def test_the_way_from_one_room_to_another_can_be_asked_for():
    rows = load_task("babi_stories", "train", qa=4, ways_asked=0.5, queries_per_context=6, num_contexts=50)
    asked = [(row["context"], *each) for row in rows for each in zip(row["queries"], row["targets"], strict=True)]
    ways = [each for each in asked if each[1].startswith("Where")]
    assert 0 < len(ways) < len(asked)
    for context, query, target in ways:
        room, other = re.fullmatch(r"Where is the (\w+) of the (\w+)\?", query).groups()
        assert f"The {room} is{target} of the {other}.\n" in context


@pytest.mark.parametrize(
    ("qa", "hops"),
    [
        (2, {"Where is P?", "Who got the T?"}),
        (3, {"Where is P?", "Who got the T?", "Where is the T?", "Where was P before the R?"}),
    ],
)
def test_the_parts_of_a_question_can_be_asked_for(qa, hops):
    """Beside the row's own question; the stories and those are what they are without."""
    arguments = {"qa": qa, "queries_per_context": 6, "num_contexts": 60, "num_statements": [2, 40]}
    rows = load_task("babi_stories", "train", hops_asked=0.7, **arguments)
    asked = forms(rows, "queries")
    assert set(asked) == hops | QUESTIONS[qa]
    assert min(asked.values()) > 5
    assert wrong(rows) == 0
    for row, plain in zip(rows, load_task("babi_stories", "train", **arguments), strict=True):
        assert (row["context"], row["queries"][0]) == (plain["context"], plain["queries"][0])


def test_more_questions_on_a_context_are_different_ones():
    rows = [BabiStories(qa=5, queries_per_context=5).row(index) for index in range(50)]
    assert all(len(set(row["queries"])) == len(row["queries"]) for row in rows)
    assert sum(len(row["queries"]) for row in rows) > 200


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"qa": 6}, "qa must be a task of bAbI from 1 to 5"),
        ({"qa": []}, "qa must be"),
        (
            {"num_statements": [3, 3]},
            r"num_statements=\[3, 3\] fits no story of QA1.*even number of sentences, 2 to 10",
        ),
        ({"num_statements": [12, 20]}, "fits no story of QA1"),
        ({"qa": 3, "num_statements": 2}, "fits no story of QA3.*4 or more"),
        ({"qa": [2, 4], "num_statements": [4, 20]}, "fits no story of QA4.*2 to 2"),
        ({"num_statements": [6, 4]}, "num_statements must be"),
        ({"question": 0}, "question must be"),
        ({"queries_per_context": 0}, "queries_per_context must be"),
        ({"seed": -1}, "seed must be"),
        ({"qa": 4, "ways_asked": 1.5}, "ways_asked is a share .* 1.5"),
        ({"qa": 2, "hops_asked": -0.1}, "hops_asked is a share .* -0.1"),
        ({"num_contexts": 0}, "num_contexts"),
        ({"colour": 1}, "colour"),
    ],
)
def test_what_makes_no_sense_is_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        load_task("babi_stories", **arguments)


def test_a_length_that_does_not_turn_up_is_said(monkeypatch):
    monkeypatch.setattr("hf_gradmem.tasks.babi_stories.TRIES", 3)
    with pytest.raises(ValueError, match=r"None of 3 stories of QA2 has num_statements=\[150, 160\]"):
        load_task("babi_stories", qa=2, num_statements=[150, 160], num_contexts=1)
