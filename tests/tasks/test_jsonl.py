"""Rows of one's own: what a line may hold, how they are split, and errors that name file, line and field."""

import json

import pytest
from datasets import disable_progress_bars

from hf_gradmem.tasks import load_task
from hf_gradmem.tasks.jsonl import TASK

disable_progress_bars()


@pytest.fixture
def saved(tmp_path):
    def save(rows, name="rows.jsonl"):
        lines = [row if isinstance(row, str) else json.dumps(row, ensure_ascii=False) for row in rows]
        (tmp_path / name).write_text("\n".join(lines) + "\n", encoding="utf-8")
        return tmp_path / name

    return save


def row(number: int, **more):
    return {"context": f"Gate {number}.", "question": "Which gate?", "answer": str(number)} | more


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        (
            {"context": "c", "question": "q", "answer": "a"},
            {"context": ["c"], "queries": ["q"], "targets": [" a"], "answers": [["a"]]},
        ),
        (
            {"context": ["c", " d"], "question": "q", "answers": ["a", "b"], "id": 7},
            {"context": ["c", " d"], "queries": ["q"], "targets": [" a"], "answers": [["a", "b"]]},
        ),
        (
            {"segments": ["c", "d"], "queries": ["q", "r"], "answers": [["a", "b"], "\ne"], "targets": None},
            {"context": ["c", "d"], "queries": ["q", "r"], "targets": [" a", "\ne"], "answers": [["a", "b"], ["\ne"]]},
        ),
        (
            {"context": "!a:7!", "queries": ["?!a:", ""], "targets": ["7!", " the rest"]},
            {
                "context": ["!a:7!"],
                "queries": ["?!a:", ""],
                "targets": ["7!", " the rest"],
                "answers": [["7!"], ["the rest"]],
            },
        ),
        (
            {"context": "c", "queries": ["q"], "targets": [" a."], "answers": [["a", "the a"]]},
            {"context": ["c"], "queries": ["q"], "targets": [" a."], "answers": [["a", "the a"]]},
        ),
        (
            {"context": "c", "question": "q", "answer": "a", "quote": " c "},
            {"context": ["c"], "queries": ["q"], "targets": [" a"], "answers": [["a"]], "quotes": ["c"]},
        ),
        (
            {"context": "c", "queries": ["q", "r"], "answers": ["a", "b"], "quotes": ["c", ""]},
            {
                "context": ["c"],
                "queries": ["q", "r"],
                "targets": [" a", " b"],
                "answers": [["a"], ["b"]],
                "quotes": ["c", ""],
            },
        ),
    ],
    ids=["one question", "several answers", "answers", "targets", "both", "a quote", "quotes"],
)
def test_a_line_may_be_written_in_several_ways(given, expected, saved):
    quoting_nothing = {"quotes": [""] * len(expected["queries"])}
    assert list(load_task("jsonl", "test", path=saved([given]))) == [quoting_nothing | expected]


def test_the_saved_rows_of_another_task_are_read_back(tmp_path):
    rows = load_task("kv_retrieval", "test", num_contexts=3, num_pairs=2)
    rows.to_json(tmp_path / "rows.jsonl")
    again = load_task("jsonl", "test", path=tmp_path / "rows.jsonl")
    assert again.remove_columns(["answers", "quotes"]).to_list() == rows.to_list()


def test_saved_running_text_still_goes_on_behind_its_targets(tmp_path, saved):
    book = tmp_path / "book.txt"
    book.write_text("One came. Two went. Three stayed. Four left. " * 3, encoding="utf-8")
    rows = load_task("text", "test", path=book, context_sentences=2, target_sentences=1)
    rows.to_json(tmp_path / "text.jsonl")
    read = load_task("jsonl", "test", path=tmp_path / "text.jsonl")
    assert {name: read[name] for name in rows.column_names} == {name: rows[name] for name in rows.column_names}
    assert set(read["add_end_token"]) == {False}
    mixed = load_task("jsonl", "test", path=saved([row(1), row(2, add_end_token=False)]))
    assert mixed["add_end_token"] == [True, False]


def test_files_are_joined_blank_lines_passed_over_and_lines_end_at_newlines_alone(saved):
    one = saved([row(1, context="a\u2028b\x0bc"), "", row(2)], "one.jsonl")
    two = saved([row(3)], "two.jsonl")
    rows = load_task("jsonl", "test", path=[one, str(two)])
    assert rows["context"][:] == [["a\u2028b\x0bc"], ["Gate 2."], ["Gate 3."]]
    assert len(load_task("jsonl", "test", path=[one, two], num_contexts=2)) == 2
    with pytest.raises(ValueError, match=r"num_contexts must lie in 1\.\.3"):
        load_task("jsonl", "test", path=[one, two], num_contexts=4)


# ------------------------------------------------------------------------------------------------ splits


def documents(rows) -> set[str]:
    return {"".join(context).partition(" ")[0] for context in rows["context"]}


def test_training_and_validation_share_the_rows(saved):
    path = saved([row(number) for number in range(20)])
    train, validation = (
        load_task("jsonl", split, path=path, validation_share=0.25) for split in ("train", "validation")
    )
    assert (len(train), len(validation)) == (15, 5)
    assert not {*map(str, train["context"])} & {*map(str, validation["context"])}
    assert len(load_task("jsonl", "test", path=path)) == 20


@pytest.mark.parametrize("field", ["document", "article"])
def test_no_document_is_on_both_sides(field, saved):
    rows = [row(n, context=f"doc{n % 5} text {n}") | {field: {"name": n % 5}} for n in range(40)]
    options = {"path": saved(rows), "validation_share": 0.2} | ({} if field == "document" else {"document": field})
    train, validation = (load_task("jsonl", split, **options) for split in ("train", "validation"))
    assert (len(train), len(validation)) == (32, 8)
    assert not documents(train) & documents(validation)


def test_no_context_is_on_both_sides_where_no_document_is_named(saved):
    rows = [row(n, context=f"doc{n % 5} text") for n in range(40)]  # one question on each line
    rows[5] = {**rows[5], "context": ["doc0", " text"]}  # the same text, in segments
    train, validation = (
        load_task("jsonl", split, path=saved(rows), validation_share=0.2) for split in ("train", "validation")
    )
    assert (len(train), len(validation)) == (32, 8)
    assert not documents(train) & documents(validation)


def test_a_split_may_have_files_of_its_own(saved):
    files = {
        "train": [saved([row(1)], "a.jsonl"), saved([row(2)], "b.jsonl")],
        "validation": str(saved([row(3)], "c.jsonl")),
    }
    assert load_task("jsonl", "train", path=files)["answers"][:] == [[["1"]], [["2"]]]
    assert load_task("jsonl", "validation", path=files)["answers"][:] == [[["3"]]]
    with pytest.raises(ValueError, match="path names files for train, validation, and none for 'test'"):
        load_task("jsonl", "test", path=files)
    with pytest.raises(ValueError, match=r"path names dev, which is no split\. The splits are train, validation, test"):
        load_task("jsonl", "train", path={**files, "dev": "d.jsonl"})


def test_a_part_without_a_document_is_refused(saved):
    with pytest.raises(ValueError, match="leave none for 'validation'"):
        load_task("jsonl", "validation", path=saved([row(1), row(2)]))


# ------------------------------------------------------------------------------------------------ refusals


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{", "is not JSON: .* Each line holds one row"),
        ("[1]", r"must be an object with context and queries, got \[1\]"),
        ({"question": "q", "answer": "a"}, "has no field 'context' or 'segments', only question, answer"),
        (row(1, segments=["c"]), "has both fields 'context' and 'segments'"),
        (row(1, add_end_token="no"), 'field .add_end_token. must be true or false, got "no"'),
        (row(1, context=3), "field 'context' must be a text or a list of texts, got 3"),
        (row(1, context=""), "field 'context' is empty"),
        (row(1, context=" \n"), "field 'context' is empty"),
        (r'{"context": "a \ud800 b", "question": "q", "answer": "a"}', "field 'context' is not Unicode text"),
        (row(1, answer=" "), "field 'answers' at 0 has no answer or an empty one"),
        ({"segments": "c", "question": "q", "answer": "a"}, "field 'segments' must be a list of texts"),
        ({"context": "c", "answer": "a"}, "has no field 'queries' or 'question', only context, answer"),
        ({"context": "c", "question": ["q"], "answer": "a"}, r"field 'question' must be a text, got \[\"q\"\]"),
        ({"context": "c", "question": "q"}, "has no field 'answer' or 'answers'"),
        (row(1, answer=["a"]), "field 'answer' must be a text, .* A list is 'answers'"),
        (row(1, answer=""), "field 'answers' at 0 has no answer or an empty one"),
        (row(1, targets=["a"]), "field 'targets' goes with 'queries'"),
        ({"context": "c", "queries": "q", "targets": ["a"]}, "field 'queries' must be a list of texts, got \"q\""),
        ({"context": "c", "queries": [], "targets": []}, "field 'queries' is empty"),
        ({"context": "c", "queries": ["q"]}, "has no field 'answers' or 'targets', only context, queries"),
        ({"context": "c", "queries": ["q"], "answers": "a"}, "field 'answers' must be a list with"),
        ({"context": "c", "queries": ["q"], "answers": ["a", "b"]}, "field 'answers' has 2 entries for 1 queries"),
        ({"context": "c", "queries": ["q"], "answers": [[]]}, "field 'answers' at 0 has no answer"),
        ({"context": "c", "queries": ["q"], "answers": [[1]]}, "field 'answers' at 0 must be a text or a list"),
        ({"context": "c", "queries": ["q"], "targets": ["a", "b"]}, "field 'targets' has 2 entries for 1 queries"),
        ({"context": "c", "queries": ["q"], "targets": [""]}, "field 'targets' is empty at 0"),
        ({"context": "c", "queries": ["q"], "targets": "a"}, "field 'targets' must be a list of texts"),
    ],
)
def test_a_line_that_is_no_row_is_named_with_its_file_and_field(line, message, saved):
    path = saved([row(0), "", line])
    with pytest.raises(ValueError, match=rf"rows\.jsonl, line 3.*{message}"):
        load_task("jsonl", path=path)


@pytest.mark.parametrize("path", [None, [], 3, [3], {"train": []}])
def test_what_is_no_file_is_refused(path):
    with pytest.raises(ValueError, match="path must be a file, a list of files, or such for each split"):
        load_task("jsonl", path=path)


def test_a_file_without_rows_and_a_missing_one_are_named(saved, tmp_path):
    with pytest.raises(ValueError, match=r"rows\.jsonl holds no row"):
        load_task("jsonl", path=saved([""]))
    with pytest.raises(OSError, match=r"nothing\.jsonl"):
        load_task("jsonl", path=tmp_path / "nothing.jsonl")


def test_the_task_is_scored_as_squad_is():
    assert TASK.metric == "squad"
