"""Which questions of a base are kept for self-study, and what a text that was written several times gives."""

from benchmarks.readers import DrawnWrites
from benchmarks.self_study import prompt, questions_of, texts_of

ROW = {
    "context": "Selma Quill moved to Bergen in 1961. She paid 2,600 crowns.",
    "queries": ["Where does Selma live?"],
    "targets": [" Bergen"],
}


def kept(*texts):
    return questions_of(texts, ROW)


def test_an_answer_must_stand_in_the_text_in_whole_words():
    assert kept(" When did she move?\nAnswer: 1961\n\nText:") == [("When did she move?", "1961")]
    assert kept(" What was paid?\nAnswer: 2,600 crowns.\n") == [("What was paid?", "2,600 crowns")]
    for answer in ("1962", "Berg", "196", "Selma Quill moved to Bergen in 1961. She paid"):
        assert kept(f" When did she move?\nAnswer: {answer}\n") == []


def test_a_question_is_kept_once_and_only_whole():
    first, again = " Who moved?\nAnswer: Selma Quill\n", " Who moved?\nAnswer: Selma\n"
    assert kept(first, again) == [("Who moved?", "Selma Quill")]
    assert kept(" Where does Selma live?\nAnswer: Bergen\n") == []  # it was asked before
    assert kept(" She moved\nAnswer: Bergen\n", " Who moved?\nAnswer: Selma", " Who moved?") == []


def test_a_text_is_shown_behind_others_that_say_their_answers():
    others = [ROW | {"context": f"Text {number} names {number}.", "targets": [f" {number}"]} for number in range(5)]
    others.append(ROW | {"context": "It says nothing.", "targets": [" not in memory"]})
    rows = texts_of([row | {"context": [row["context"]]} for row in [*others, ROW]])

    class Drawn:
        def sample(self, told, count):
            assert count == 3
            assert [row["context"] for row, _ in told] == [row["context"] for row in others[:5]]
            return told[:count]

    shown = prompt(rows, 6, Drawn())
    assert shown.startswith("Text: Text 0 names 0.\nQuestion: Where does Selma live?\nAnswer: 0\n\nText: Text 1")
    assert shown.endswith(f"\n\nText: {ROW['context']}\nQuestion:")


def test_a_text_that_was_written_several_times_gives_each_of_its_memories():
    drawn = DrawnWrites([["a0", "a1"], ["b0", "b1"], ["c0", "c1"]])
    assert len(drawn) == 2
    assert {drawn[1] for _ in range(60)} == {"a1", "b1", "c1"}
