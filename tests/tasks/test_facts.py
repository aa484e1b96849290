"""Facts in English: reproducible, answerable from their context alone, and in words that training does not use."""

import pytest

from hf_gradmem.tasks import load_task
from hf_gradmem.tasks.facts import NOT_TOLD, Facts


def test_rows_are_a_function_of_seed_split_and_index():
    rows = load_task("facts", num_contexts=5, seed=3)
    assert rows[4] == Facts(seed=3).row(4)
    assert list(load_task("facts", streaming=True, num_contexts=5, seed=3)) == list(rows)
    assert list(load_task("facts", streaming=True, num_contexts=2, first=3, seed=3)) == list(rows)[3:]
    assert rows[0] != load_task("facts", num_contexts=1, seed=4)[0]
    assert rows[0] != load_task("facts", "test", num_contexts=1, seed=3)[0]


def test_there_are_names_for_so_many_people():
    with pytest.raises(ValueError, match="num_people=70 are more than the 69"):
        Facts(num_people=(1, 70))
    assert Facts(num_people=69, num_facts=69, not_told=0.5).row(0)["queries"]


def test_every_answer_stands_in_its_context_or_is_said_not_to():
    for index in range(200):
        row = Facts().row(index)
        context = "".join(row["context"])
        assert 4 <= len(row["context"]) <= 8
        assert context.count(".") == len(row["context"])
        for target in row["targets"]:
            assert target[1:] == NOT_TOLD or target[1:] in context, row


def test_a_quote_is_the_sentence_that_tells_the_answer():
    for index in range(100):
        row = Facts().row(index)
        for target, quote in zip(row["targets"], row["quotes"], strict=True):
            assert (quote == "") == (target[1:] == NOT_TOLD)
            assert not quote or (target[1:] in quote and quote in map(str.strip, row["context"]))


def test_a_question_that_has_no_answer_names_what_the_context_does_not_tell():
    """Told of nobody, or of somebody else: the same question is never answered both ways."""
    told = untold = 0
    for index in range(300):
        row = Facts(not_told=0.5).row(index)
        answers: dict[str, set[str]] = {}
        for query, target in zip(row["queries"], row["targets"], strict=True):
            answers.setdefault(query, set()).add(target)
            told, untold = told + (target[1:] != NOT_TOLD), untold + (target[1:] == NOT_TOLD)
        assert all(len(found) == 1 for found in answers.values())
    assert 0.45 < untold / (told + untold) < 0.55


def test_other_words_are_never_those_of_training():
    trained, other = set(), set()
    for index in range(300):
        for words, asked in ((trained, Facts(num_people=1)), (other, Facts(num_people=1, other_words=True))):
            row = asked.row(index)
            name = " ".join(row["context"][0].split()[:2])
            words.update(query.replace(name, "") for query in row["queries"] if name in query)
    assert trained
    assert other
    assert not trained & other


def test_segments_are_sentences_and_together_the_whole():
    assert "".join(Facts().row(0)["context"]) == Facts(segmented=False).row(0)["context"][0]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"num_facts": 0}, "num_facts must be at least 1"),
        ({"num_facts": [3, 2]}, "num_facts"),
        ({"num_facts": [1, 2, 3]}, "num_facts must be a number or"),
        ({"num_people": 0}, "num_people"),
        ({"num_facts": 11, "num_people": 1}, "more than the 10"),
        ({"not_told": 1.0}, "not_told"),
        ({"queries_per_context": 0}, "queries_per_context"),
        ({"num_contexts": 0}, "num_contexts"),
        ({"seed": -1}, "seed"),
        ({"colour": 1}, "colour"),
    ],
)
def test_what_makes_no_sense_is_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        load_task("facts", **arguments)
