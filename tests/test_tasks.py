"""Tasks: their rows against hand-written expectations, and what they refuse."""

import json
import re

import pytest
from datasets import Dataset, IterableDataset

from hf_gradmem.tasks import TASKS, check_row, load_task
from hf_gradmem.tasks.babi import parse as parse_babi
from hf_gradmem.tasks.kv_retrieval import SYMBOLS, KVRetrieval, build_tokenizer
from hf_gradmem.tasks.sentences import split_sentences
from hf_gradmem.tasks.text import sentences, strip_gutenberg

# ------------------------------------------------------------------------------------------------ key-value retrieval


def pairs_of(row):
    text = "".join(row["context"])
    return dict(re.findall(r"!([^!:|]+):([^!:|]+)!", text))


@pytest.mark.parametrize("lengths", [(1, 1), (2, 2), (3, 1)])
def test_kv_text_is_the_papers_and_each_query_is_answered_by_its_pair(lengths):
    key_length, value_length = lengths
    row = KVRetrieval(num_pairs=5, key_length=key_length, value_length=value_length).row(3)
    symbols = f"[{SYMBOLS}]"
    pair = rf"!{symbols}{{{key_length}}}:{symbols}{{{value_length}}}!"
    assert re.fullmatch(rf"({pair}){{5}}\|", "".join(row["context"]))
    assert all(re.fullmatch(rf"{pair}\|?", segment) for segment in row["context"])
    pairs = pairs_of(row)
    assert len(pairs) == 5
    assert dict(zip(row["queries"], row["targets"], strict=True)) == {
        f"?!{key}:": f"{value}!|" for key, value in pairs.items()
    }


def test_kv_rows_depend_on_seed_split_and_index_alone():
    rows = load_task("kv_retrieval", num_contexts=6, seed=1)
    assert rows[:] == load_task("kv_retrieval", num_contexts=9, seed=1)[:6]
    assert rows["context"][:] != load_task("kv_retrieval", num_contexts=6, seed=2)["context"][:]
    assert rows["context"][:] != load_task("kv_retrieval", "validation", num_contexts=6, seed=1)["context"][:]
    assert isinstance(rows, Dataset)


def test_kv_stream_gives_the_same_rows_and_shards_share_them():
    rows = list(load_task("kv_retrieval", num_contexts=7))
    stream = load_task("kv_retrieval", streaming=True, num_contexts=7)
    assert isinstance(stream, IterableDataset)
    assert list(stream) == rows
    sharded = load_task("kv_retrieval", streaming=True, num_contexts=7, num_shards=3)
    parts = [list(sharded.shard(num_shards=3, index=index)) for index in range(3)]
    assert [len(part) for part in parts] == [3, 2, 2]
    assert sorted(map(str, (row for part in parts for row in part))) == sorted(map(str, rows))
    endless = load_task("kv_retrieval", streaming=True)
    assert list(endless.take(7)) == rows


def test_kv_number_of_pairs_can_be_a_range_and_queries_fewer():
    task = KVRetrieval(num_pairs=[2, 5], queries_per_context=2)
    rows = [task.row(index) for index in range(60)]
    assert {len(pairs_of(row)) for row in rows} == {2, 3, 4, 5}
    assert all(len(row["queries"]) == 2 for row in rows)


def test_kv_noise_stands_between_pairs_and_answers_stay_right():
    row = KVRetrieval(num_pairs=3, noise_length=4, end_mark=False).row(0)
    assert all(re.fullmatch(r"!\w\w:\w\w!\w{4}", segment) for segment in row["context"])
    pairs = pairs_of(row)
    assert all(pairs[query[2:-1]] == target[:-2] for query, target in zip(row["queries"], row["targets"], strict=True))


def test_kv_backward_queries_have_one_answer():
    task = KVRetrieval(num_pairs=20, key_length=1, value_length=1, backward=0.5)
    asked = {"forward": 0, "backward": 0}
    for index in range(20):
        row = task.row(index)
        pairs = pairs_of(row)
        keys = {value: key for key, value in pairs.items()}
        assert len(keys) == 20
        for query, target in zip(row["queries"], row["targets"], strict=True):
            if query.startswith("?!"):
                asked["forward"] += 1
                assert target == f"{pairs[query[2:-1]]}!|"
            else:
                asked["backward"] += 1
                assert query == f"?:{query[2]}!"
                assert target == f"{keys[query[2]]}:|"
    assert min(asked.values()) > 150


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"num_pairs": 63, "key_length": 1}, "num_pairs=63 .* only 62"),
        ({"num_pairs": 5, "value_length": 1, "num_symbols": 4, "backward": 0.1}, "num_pairs=5"),
        ({"num_pairs": 0}, "num_pairs"),
        ({"num_pairs": [5, 4]}, "num_pairs"),
        ({"num_pairs": [5]}, "num_pairs"),
        ({"num_symbols": 63}, "num_symbols .* 63"),
        ({"key_length": 0}, "key_length .* 0"),
        ({"backward": 1.5}, "backward .* 1.5"),
        ({"num_contexts": 0}, "num_contexts .* 0"),
        ({"queries_per_context": 0}, "queries_per_context .* 0"),
        ({"pairs": 4}, "kv_retrieval.*pairs"),
        ({"split": "dev"}, "split .* 'dev'"),
    ],
)
def test_kv_refuses_what_it_cannot_generate(arguments, message):
    with pytest.raises(ValueError, match=message):
        load_task("kv_retrieval", **arguments)


def test_kv_tokenizer_has_a_token_for_each_character_and_ends_answers_at_the_bar():
    tokenizer = build_tokenizer()
    ids = tokenizer("!aZ:09!|", add_special_tokens=False).input_ids
    assert len(ids) == 8
    assert ids[-1] == tokenizer.eos_token_id
    assert tokenizer.decode(ids) == "!aZ:09!|"
    assert tokenizer.decode(ids, skip_special_tokens=True) == "!aZ:09!"
    assert tokenizer.unk_token_id not in tokenizer(SYMBOLS + "!:?|", add_special_tokens=False).input_ids


# ------------------------------------------------------------------------------------------------ bAbI

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


def test_babi_train_and_validation_share_no_story(tmp_path):
    stories = "".join(f"1 Story {index} begins.\n2 Which? \t{index}\t1\n3 Again? \t{index}\t1\n" for index in range(20))
    (tmp_path / "qa.txt").write_text(stories, encoding="utf-8")
    train, validation = (load_task("babi", split, path=tmp_path / "qa.txt") for split in ("train", "validation"))
    told = [{context[0] for context in rows["context"]} for rows in (train, validation)]
    assert (len(told[0]), len(told[1]), told[0] & told[1]) == (18, 2, set())


def test_babi_tokenizer_knows_every_word_of_the_training_part(tmp_path):
    (tmp_path / "qa.txt").write_text(BABI * 5, encoding="utf-8")
    tokenizer = TASKS["babi"].build_tokenizer(path=tmp_path / "qa.txt")
    ids = tokenizer("Where is Mary? bathroom", add_special_tokens=False).input_ids
    assert len(ids) == 5
    assert tokenizer.unk_token_id not in ids
    assert tokenizer("Where is nowhere?", add_special_tokens=False).input_ids[2] == tokenizer.unk_token_id


@pytest.mark.parametrize(
    ("text", "message"),
    [("Mary moved.\n", "Line 1 of .* 'Mary moved.'"), ("1 A b.\n2 Where? \t\t1\n", "line 2 .* no answer")],
)
def test_babi_refuses_another_format(text, message):
    with pytest.raises(ValueError, match=message):
        list(parse_babi(text))


# ------------------------------------------------------------------------------------------------ SQuAD

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
        }
    ]


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ("{", "not JSON"),
        ('[{"text": "a"}]', "not SQuAD's format: KeyError.*context"),
        ('[{"context": "a b.", "qas": [{"question": "q", "answer": "c"}]}]', "'c' to 'q'"),
        ('[{"context": "a b.", "qas": [{"question": "q", "answer": ""}]}]', "'q' .* no answer"),
        ("[]", "no question"),
    ],
)
def test_squad_refuses_another_format(data, message, tmp_path):
    (tmp_path / "data.json").write_text(data, encoding="utf-8")
    with pytest.raises(ValueError, match=message):
        load_task("squad", "test", path=tmp_path / "data.json")


# ------------------------------------------------------------------------------------------------ running text

BOOK = """The Project Gutenberg EBook of Something

*** START OF THIS PROJECT GUTENBERG EBOOK SOMETHING ***

Chapter 1

It was a day
of rain. Nobody came.

"Who is there?" said she. Nobody spoke. All was
still.

End of the Project Gutenberg EBook of Something

*** END OF THIS PROJECT GUTENBERG EBOOK SOMETHING ***
Licence.
"""
BOOK_SENTENCES = [
    "Chapter 1",
    "\n\nIt was a day of rain.",
    " Nobody came.",
    '\n\n"Who is there?" said she.',
    " Nobody spoke.",
    " All was still.",
]


def test_book_is_cut_out_of_its_licence_and_into_sentences():
    assert sentences(strip_gutenberg(BOOK)) == BOOK_SENTENCES
    assert strip_gutenberg("No header. No footer.") == "No header. No footer."


def test_text_gives_as_many_windows_as_asked_for_from_all_of_the_text(tmp_path):
    (tmp_path / "book.txt").write_text(" ".join(f"Sentence {number}." for number in range(12)), encoding="utf-8")
    options = {"path": tmp_path / "book.txt", "context_sentences": 1, "target_sentences": 1}
    rows = load_task("text", "test", num_contexts=3, **options)
    assert [row["context"] for row in rows] == [["Sentence 0."], ["Sentence 4."], ["Sentence 8."]]


def test_text_windows_follow_each_other(tmp_path):
    (tmp_path / "book.txt").write_text(BOOK, encoding="utf-8", newline="\r\n")
    rows = load_task("text", "test", path=tmp_path / "book.txt", context_sentences=2, target_sentences=1)
    assert list(rows) == [
        {"context": BOOK_SENTENCES[:2], "queries": [""], "targets": [" Nobody came."]},
        {
            "context": ['"Who is there?" said she.', " Nobody spoke."],
            "queries": [""],
            "targets": [" All was still."],
        },
    ]
    back = load_task("text", "test", path=tmp_path / "book.txt", mode="reconstruction", context_sentences=3)
    assert [row["targets"] for row in back] == [["".join(row["context"])] for row in back]
    assert len(back) == 2


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"mode": "copy"}, "mode .* 'copy'"),
        ({"context_sentences": 100}, "fewer than the 104 sentences"),
        ({"context_sentences": 0}, "context_sentences .* 0"),
        ({"num_contexts": 2}, r"num_contexts .* 1\.\.1, .* got 2"),
        ({"validation_share": 1.0, "split": "train"}, "validation_share"),
        ({"hub_name": "a/b"}, "not both"),
    ],
)
def test_text_refuses_what_leaves_no_rows(arguments, message, tmp_path):
    (tmp_path / "book.txt").write_text(BOOK, encoding="utf-8")
    defaults = {"path": tmp_path / "book.txt", "split": "test", "context_sentences": 2, "target_sentences": 4}
    with pytest.raises(ValueError, match=message):
        load_task("text", **defaults | arguments)


# ------------------------------------------------------------------------------------------------ all of them


def test_unknown_task_is_named():
    with pytest.raises(ValueError, match=r"no task 'kv'.*kv_retrieval, babi, squad, text"):
        load_task("kv")


@pytest.mark.parametrize("name", ["babi", "squad", "text"])
def test_task_needs_a_source_that_exists(name, tmp_path):
    with pytest.raises(ValueError, match="either path or hub_name"):
        load_task(name)
    with pytest.raises(OSError, match=r"nothing\.txt"):
        load_task(name, path=tmp_path / "nothing.txt")
    with pytest.raises(ValueError, match="has no stream"):
        load_task(name, streaming=True, path=tmp_path / "nothing.txt")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"targets": [""]}, "target of query 'q'"),
        ({"context": []}, "context of row 3 is empty"),
        ({"context": ["", ""]}, "context of row 3 is empty"),
        ({"queries": ["q", "r"]}, "2 queries and 1 targets"),
        ({"queries": [], "targets": []}, "0 queries"),
        ({"queries": "q"}, "lists of texts"),
        ({"targets": None}, "no column 'targets'"),
    ],
)
def test_row_that_cannot_be_trained_on_is_refused(change, message):
    row = {"context": ["c"], "queries": ["q"], "targets": ["t"]} | change
    row = {name: value for name, value in row.items() if value is not None}
    with pytest.raises(ValueError, match=message):
        check_row(row, "row 3")
