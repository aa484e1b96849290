"""Key-value retrieval: rows against hand-written expectations, and what it refuses."""

import re

import pytest
from datasets import Dataset, IterableDataset

from hf_gradmem.tasks import load_task
from hf_gradmem.tasks.kv_retrieval import SYMBOLS, KVRetrieval, build_tokenizer


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
