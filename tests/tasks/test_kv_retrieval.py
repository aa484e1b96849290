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
    assert list(load_task("kv_retrieval", streaming=True, num_contexts=4, first=3)) == rows[3:]


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


def mixed_pairs(row):
    """Key to value of the pairs that stand key first, and value to key of the others."""
    forward, backward = {}, {}
    for segment in row["context"]:
        if found := re.fullmatch(r"!(\w+):(\w+)!\|?", segment):
            forward[found[1]] = found[2]
        else:
            found = re.fullmatch(r":(\w+)!(\w+):\|?", segment)
            backward[found[1]] = found[2]
    return forward, backward


def test_kv_mixed_orders_give_each_pair_once_and_ask_it_by_what_stands_first():
    task = KVRetrieval(num_pairs=8, key_length=1, value_length=1, num_symbols=8, mixed_orders=True)
    shares = []
    for index in range(200):
        row = task.row(index)
        forward, backward = mixed_pairs(row)
        # Eight symbols for eight keys and eight values: each occurs once as either.
        assert len({*forward, *backward.values()}) == len({*backward, *forward.values()}) == len(row["context"]) == 8
        assert dict(zip(row["queries"], row["targets"], strict=True)) == (
            {f"?!{key}:": f"{value}!|" for key, value in forward.items()}
            | {f"?:{value}!": f"{key}:|" for value, key in backward.items()}
        )
        shares.append(len(backward) / 8)
    assert sum(shares) / 200 == pytest.approx(0.5, abs=0.04)
    assert len(set(shares)) > 4


@pytest.mark.parametrize("num_pairs", [2, [2, 5], 8])
def test_kv_asked_chooses_the_queries_of_one_direction_on_the_same_contexts(num_pairs):
    tasks = {
        asked: KVRetrieval(num_pairs=num_pairs, mixed_orders=True, asked=asked)
        for asked in ("both", "forward", "backward")
    }
    for index in range(60):
        rows = {asked: task.row(index) for asked, task in tasks.items()}
        assert rows["both"]["context"] == rows["forward"]["context"] == rows["backward"]["context"]
        for asked, sign in (("forward", "?!"), ("backward", "?:")):
            wanted = [pair for pair in zip(*queries_of(rows["both"]), strict=True) if pair[0].startswith(sign)]
            assert list(zip(*queries_of(rows[asked]), strict=True)) == wanted
            assert len(wanted) >= 1
    one = KVRetrieval(num_pairs=num_pairs, mixed_orders=True, asked="backward", queries_per_context=1)
    assert all(len(one.row(index)["queries"]) == 1 for index in range(60))


def queries_of(row):
    return row["queries"], row["targets"]


@pytest.mark.parametrize("mixed_orders", [False, True])
def test_kv_values_may_share_a_first_symbol_drawn_for_each_context(mixed_orders):
    task = KVRetrieval(
        num_pairs=8, key_length=1, value_length=2, num_symbols=8, mixed_orders=mixed_orders, shared_first_symbol=True
    )
    firsts = set()
    for index in range(60):
        forward, backward = mixed_pairs(task.row(index))
        values = [*forward.values(), *backward]
        assert len({value[0] for value in values}) == 1
        assert len(set(values)) == 8 or not mixed_orders
        assert len({*forward, *backward.values()}) == 8
        firsts.add(values[0][0])
    assert firsts == set(SYMBOLS[:8])


def test_kv_rows_of_a_stream_stay_what_they_were():
    """Results name a stream by its seed, so no change to the task may move its rows."""
    assert KVRetrieval(num_pairs=2, num_symbols=4, noise_length=1, seed=3).row(5) == {
        "context": ["!dc:bc!b", "!dd:aa!d|"],
        "queries": ["?!dc:", "?!dd:"],
        "targets": ["bc!|", "aa!|"],
    }
    backward = KVRetrieval(num_pairs=[2, 3], num_symbols=4, mirrored=True, backward=0.5, queries_per_context=2)
    assert backward.row(1) == {
        "context": ["!cb:ab!", "!aa:dd!", "!dd:ac!", ":ab!cb:", ":dd!aa:", ":ac!dd:|"],
        "queries": ["?:ac!", "?!cb:"],
        "targets": ["dd:|", "ab!|"],
    }


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"mixed_orders": True, "mirrored": True}, "mixed_orders .* mirrored=True"),
        ({"mixed_orders": True, "backward": 0.5}, "mixed_orders .* backward=0.5"),
        ({"mixed_orders": True, "num_pairs": [1, 4]}, r"at least 2 pairs.* num_pairs=\[1, 4\]"),
        ({"mixed_orders": True, "num_pairs": 5, "value_length": 1, "num_symbols": 4}, "num_pairs=5"),
        ({"mixed_orders": True, "asked": "backwards"}, "asked must be one of both, .* 'backwards'"),
        ({"asked": "forward"}, "asked='forward' .* mixed_orders"),
        ({"shared_first_symbol": True, "value_length": 1}, "value_length=1"),
        ({"mixed_orders": True, "shared_first_symbol": True, "num_pairs": 5, "num_symbols": 4}, "num_pairs=5"),
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


def test_words_may_be_longer_than_numpy_counts():
    row = load_task("kv_retrieval", num_contexts=1, num_pairs=3, key_length=12, value_length=11, noise_length=20)[0]
    assert len(set(row["queries"])) == 3
    assert all(len(target.strip("! |")) == 11 for target in row["targets"])
