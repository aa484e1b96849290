"""What holds for every task: unknown names, missing sources, rows that cannot be trained on."""

import pytest
from datasets import Dataset

from hf_gradmem.tasks import check_row, columns_of, load_task


def test_unknown_task_is_named():
    with pytest.raises(ValueError, match=r"no task 'kv'.*kv_retrieval, babi, babi_stories, squad, facts, text"):
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
        ({"context": None}, "context of row 3 is empty: None"),
        ({"context": ["", ""]}, "context of row 3 is empty"),
        ({"queries": ["q", "r"]}, "2 queries and 1 targets"),
        ({"queries": [], "targets": []}, "0 queries"),
        ({"queries": "q"}, "lists of texts"),
        ({"queries": [None]}, "The queries of row 3 must be texts, got None among them"),
        ({"queries": [5]}, "The queries of row 3 must be texts, got 5"),
        ({"targets": [["t"]]}, r"The targets of row 3 must be texts, got \['t'\]"),
        ({"context": ["c", None]}, "The context of row 3 must be texts, got None"),
        ({"answers": ["t"]}, "a list of accepted texts for each query, got 't'"),
        ({"answers": [["t", None]]}, "a list of accepted texts for each query"),
        ({"answers": [["t"], ["u"]]}, "1 queries and 2 answers"),
    ],
)
def test_row_that_cannot_be_trained_on_is_refused(change, message):
    row = {"context": ["c"], "queries": ["q"], "targets": ["t"]}
    with pytest.raises(ValueError, match=message):
        check_row(row | change, "row 3")
    del row["targets"]
    with pytest.raises(ValueError, match="no column 'targets'"):
        check_row(row, "row 3")


@pytest.mark.parametrize(
    ("task", "name"),
    [("kv_retrieval", "segmented"), ("facts", "other_words"), ("squad", "short"), ("babi", "segmented")],
)
def test_a_text_is_neither_true_nor_false(task, name):
    with pytest.raises(ValueError, match=rf"{name} must be true or false, without quotes, got 'false'"):
        load_task(task, **{name: "false"})


def test_rows_of_several_tables_keep_what_some_say_of_their_ends_and_quotes_that_all_have():
    plain = Dataset.from_dict({"context": [["c"]], "queries": [["q"]], "targets": [["t"]]})
    quoted, open_ended = plain.add_column("quotes", [["c"]]), plain.add_column("add_end_token", [False])
    assert set(columns_of(plain, open_ended)) == {"context", "queries", "targets", "add_end_token"}
    assert set(columns_of(plain, quoted)) == {"context", "queries", "targets"}
    assert set(columns_of(quoted, quoted)) == {"context", "queries", "targets", "quotes"}
