"""bAbI: rows against hand-written expectations, and what it refuses."""

import pytest

from hf_gradmem.tasks import TASKS, load_task
from hf_gradmem.tasks.babi import parse as parse_babi

BABI = """1 Mary moved to the bathroom.
2 John went to the hallway.
3 Where is Mary? \tbathroom\t1
4 Mary went back to the hall.
5 Where is Mary? \thall\t4
1 Sandra got the milk.
2 What is Sandra carrying?\tmilk,apple\t1 2
"""


def test_babi_question_is_asked_of_the_sentences_before_it(tmp_path):
    (tmp_path / "qa1.txt").write_text(BABI, encoding="utf-8")
    rows = load_task("babi", "test", path=tmp_path / "qa1.txt")
    start = ["Mary moved to the bathroom.\n", "John went to the hallway.\n"]
    assert list(rows) == [
        {"context": start, "queries": ["Where is Mary?"], "targets": [" bathroom"]},
        {"context": [*start, "Mary went back to the hall.\n"], "queries": ["Where is Mary?"], "targets": [" hall"]},
        {"context": ["Sandra got the milk.\n"], "queries": ["What is Sandra carrying?"], "targets": [" milk,apple"]},
    ]


def test_a_story_of_babi_can_be_one_text(tmp_path):
    (tmp_path / "qa1.txt").write_text(BABI, encoding="utf-8")
    segmented, whole = (load_task("babi", "test", path=tmp_path / "qa1.txt", segmented=each) for each in (True, False))
    assert whole["context"] == [["".join(context)] for context in segmented["context"]]
    assert (whole["queries"], whole["targets"]) == (segmented["queries"], segmented["targets"])


def test_babi_train_and_validation_share_no_story(tmp_path):
    stories = "".join(f"1 Story {index} begins.\n2 Which? \t{index}\t1\n3 Again? \t{index}\t1\n" for index in range(20))
    (tmp_path / "qa.txt").write_text(stories, encoding="utf-8")
    train, validation = (load_task("babi", split, path=tmp_path / "qa.txt") for split in ("train", "validation"))
    told = [{context[0] for context in rows["context"]} for rows in (train, validation)]
    assert (len(told[0]), len(told[1]), told[0] & told[1]) == (18, 2, set())


def test_babi_tokenizer_knows_every_word_of_its_rows(tmp_path):
    (tmp_path / "qa.txt").write_text(BABI * 5, encoding="utf-8")
    tokenizer = TASKS["babi"].build_tokenizer(load_task("babi", path=tmp_path / "qa.txt"))
    ids = tokenizer("Where is Mary? bathroom", add_special_tokens=False).input_ids
    assert len(ids) == 5
    assert tokenizer.unk_token_id not in ids
    assert tokenizer("Where is nowhere?", add_special_tokens=False).input_ids[2] == tokenizer.unk_token_id


def test_babi_file_without_a_question_for_the_split(tmp_path):
    (tmp_path / "qa.txt").write_text("1 Mary got the milk.\n", encoding="utf-8")
    with pytest.raises(ValueError, match="holds no question for the test split"):
        load_task("babi", "test", path=tmp_path / "qa.txt")


@pytest.mark.parametrize(
    ("text", "message"),
    [("Mary moved.\n", "Line 1 of .* 'Mary moved.'"), ("1 A b.\n2 Where? \t\t1\n", "line 2 .* no answer")],
)
def test_babi_refuses_another_format(text, message):
    with pytest.raises(ValueError, match=message):
        list(parse_babi(text))
