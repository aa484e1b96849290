"""SQuAD: rows against hand-written expectations, and what it refuses."""

import json

import pytest

from hf_gradmem.tasks import load_task
from hf_gradmem.texts.sentences import split_sentences

PARAGRAPH = (
    'Dr. Smith came in 1973. He met J. R. Jones, who said "Go!" loudly. It cost $3.50 in the U.S. market. The end.'
)


def squad_question(text, answers):
    return {
        "id": text,
        "question": text,
        "answers": [{"text": answer, "answer_start": PARAGRAPH.index(answer)} for answer in answers],
    }


SQUAD = {
    "version": "1.1",
    "data": [
        {
            "title": "A",
            "paragraphs": [
                {
                    "context": PARAGRAPH,
                    "qas": [
                        squad_question("When?", ["1973", "in 1973", "1973"]),
                        squad_question("Who came?", ["Dr. Smith"]),
                        squad_question("What did it cost?", ["$3.50"]),
                        squad_question("Across?", ["loudly. It cost"]),
                    ],
                }
            ],
        }
    ],
}


def test_sentences_cover_the_text_and_stop_at_no_abbreviation():
    spans = split_sentences(PARAGRAPH)
    assert [PARAGRAPH[start:end] for start, end in spans] == [
        "Dr. Smith came in 1973.",
        ' He met J. R. Jones, who said "Go!" loudly.',
        " It cost $3.50 in the U.S. market.",
        " The end.",
    ]
    assert split_sentences("No mark at all") == [(0, 14)]
    assert split_sentences("One. Two. ") == [(0, 4), (4, 10)]


@pytest.mark.parametrize(
    "parts",
    [
        ["Она живёт в г. Туле.", " Она работает у А. С. Орлова.", " Ей сорок лет."],
        ["Er kam spät.", " Älter war er nie.", " „So. etwa?“", " «Über» ihm war es dunkel."],
        ["She left at 7 p.m. and came back.", " 12 followed: a. b. c.", " It was over."],
    ],
)
def test_sentences_begin_with_a_capital_of_any_script(parts):
    text = "".join(parts)
    assert [text[start:end] for start, end in split_sentences(text)] == parts


def test_a_paragraph_that_is_there_several_times_is_in_one_split_with_all_its_questions(tmp_path):
    given = [{"context": f"It was {n % 3}.", "qas": [{"question": f"Q{n}", "answer": str(n % 3)}]} for n in range(9)]
    (tmp_path / "dev.json").write_text(json.dumps(given), encoding="utf-8")
    train, held_out = (
        load_task("squad", split, path=tmp_path / "dev.json", validation_share=0.4) for split in ("train", "validation")
    )
    assert [(row["context"], row["queries"]) for row in train] == [
        (["It was 0."], ["Q0", "Q3", "Q6"]),
        (["It was 1."], ["Q1", "Q4", "Q7"]),
    ]
    assert [row["queries"] for row in held_out] == [["Q2", "Q5", "Q8"]]


def test_squad_keeps_the_questions_of_a_paragraph_and_all_references_together(tmp_path):
    (tmp_path / "dev.json").write_text(json.dumps(SQUAD), encoding="utf-8")
    rows = load_task("squad", "test", path=tmp_path / "dev.json")
    assert len(rows) == 1
    assert "".join(rows[0]["context"]) == PARAGRAPH
    assert rows[0]["queries"] == ["When?", "Who came?", "What did it cost?", "Across?"]
    assert rows[0]["targets"] == [" 1973", " Dr. Smith", " $3.50", " loudly. It cost"]
    assert rows[0]["answers"][0] == ["1973", "in 1973"]


def test_short_squad_keeps_the_sentences_that_hold_the_answer(tmp_path):
    (tmp_path / "dev.json").write_text(json.dumps(SQUAD), encoding="utf-8")
    rows = load_task("squad", "test", path=tmp_path / "dev.json", short=True)
    assert [(row["context"], row["queries"]) for row in rows] == [
        (["Dr. Smith came in 1973."], ["When?", "Who came?"]),
        (["It cost $3.50 in the U.S. market."], ["What did it cost?"]),
        (['He met J. R. Jones, who said "Go!" loudly.', " It cost $3.50 in the U.S. market."], ["Across?"]),
    ]


def test_squad_reads_the_list_of_paragraphs(tmp_path):
    data = [{"context": PARAGRAPH, "qas": [{"question": "When?", "answer": "1973"}]}]
    (tmp_path / "train.json").write_text(json.dumps(data), encoding="utf-8")
    rows = load_task("squad", "test", path=tmp_path / "train.json", short=True)
    assert list(rows) == [
        {
            "context": ["Dr. Smith came in 1973."],
            "queries": ["When?"],
            "targets": [" 1973"],
            "answers": [["1973"]],
            "quotes": ["Dr. Smith came in 1973."],
        }
    ]


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ("{", "not JSON"),
        ('[{"text": "a"}]', "not SQuAD's format: KeyError.*context"),
        ('[{"context": "a b.", "qas": [{"question": "q", "answer": "c"}]}]', "'c' to 'q'"),
        ('[{"context": "a b.", "qas": [{"question": "q", "answer": ""}]}]', "'q' .* no answer"),
        ('[{"context": null, "qas": [{"question": "q", "answer": "a"}]}]', "not SQuAD's format: AttributeError"),
        ('[{"context": "a b.", "qas": [{"question": null, "answer": "a"}]}]', "not SQuAD's format: AttributeError"),
        (
            '[{"context": "a", "qas": [{"question": "q", "answers": [{"text": "a", "answer_start": "no"}]}]}]',
            "not SQuAD's format: TypeError",
        ),
        ("[]", "no question"),
    ],
)
def test_squad_refuses_another_format(data, message, tmp_path):
    (tmp_path / "data.json").write_text(data, encoding="utf-8")
    with pytest.raises(ValueError, match=message):
        load_task("squad", "test", path=tmp_path / "data.json")
