"""Stores whose facts, files or rows are not whole: each is refused in one line, as it is opened or the row is read."""

import json
import random
import shutil
from collections.abc import Callable
from pathlib import Path

import datasets
import numpy as np
import pyarrow
import pytest
import torch
from datasets import Array2D, Features
from pyarrow import parquet

from hf_gradmem import MemoryStore
from hf_gradmem.memory.shards import shard_name
from tests.support.stores import IDS, SHAPE, corrupted, facts_of, memory_of, save_store

FIRST, SECOND = (shard_name(index, 2) for index in range(2))
NOTHING = object()


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    datasets.disable_progress_bars()


@pytest.fixture
def store(tmp_path: Path) -> Path:
    return save_store(tmp_path / "store")


def set_facts(store: Path, **facts: object) -> None:
    whole = facts_of() | facts
    text = json.dumps({name: value for name, value in whole.items() if value is not NOTHING})
    (store / "memories.json").write_text(text, encoding="utf-8")


def set_column(path: Path, name: str, values: list, kind: pyarrow.DataType | None = None) -> None:
    """Another column in place of one, in Arrow's own types."""
    table = parquet.read_table(path)
    place = table.column_names.index(name)
    kind = kind or table.schema.field(name).type
    kind = kind.storage_type if isinstance(kind, pyarrow.BaseExtensionType) else kind
    parquet.write_table(table.set_column(place, name, pyarrow.array(values, type=kind)), path)


def refusal(act: Callable[[], object]) -> str:
    with pytest.raises(ValueError, match=r".") as caught:
        act()
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_a_whole_store_is_read_bit_for_bit(store):
    opened, memory = MemoryStore.from_pretrained(store), memory_of()
    assert opened.ids == IDS
    read = opened[["c", "a", "b"]]
    for name, tensor in memory.tensors.items():
        torch.testing.assert_close(read.tensors[name], tensor[[2, 0, 1]], rtol=0, atol=0, equal_nan=True)


# ------------------------------------------------------------------------------------------------ facts

FACTS = [
    *[(name, value) for name in ("num_memory_tokens", "hidden_size", "num_rows", "num_shards", "shard_size")
      for value in (NOTHING, None, "2", 2.0, True, 0, -1, 2**40)],
    ("num_shards", 3),
    ("num_rows", 9),
    ("shard_size", 1),
    *[("dtype", value) for value in (NOTHING, None, "int8", "__class__", ["float32"])],
    *[("fingerprint", value) for value in (NOTHING, None, 7, ["a"])],
    *[("base_name", value) for value in (7, {"a": "b"})],
    *[("parts", value) for value in (7, "ab", [3], [{"source": "x"}])],
]  # fmt: skip


@pytest.mark.parametrize(("name", "value"), FACTS, ids=[f"{name}-{n}" for n, (name, _) in enumerate(FACTS)])
def test_a_fact_that_is_missing_or_out_of_range_is_named_with_its_value(store, name, value):
    set_facts(store, **{name: value})
    said = refusal(lambda: MemoryStore.from_pretrained(store))
    assert said.startswith(f"{store / 'memories.json'} is broken: ")
    counted = name in ("num_rows", "shard_size") and type(value) is int and 0 < value < 2**31
    found = "num_shards is 2" if counted else f"it has no {name}" if value is NOTHING else None
    assert (found or f"{name} is {json.dumps(value)}") in said
    assert "belongs. Fetch the store's memories.json again" in said


@pytest.mark.parametrize("text", ["", "[" * 100_000, "[1, 2]", "null", '{"format": "gradmem-memories"}', "\x00"])
def test_facts_that_are_no_json_object_of_ours_are_refused(store, text):
    (store / "memories.json").write_text(text, encoding="utf-8")
    assert refusal(lambda: MemoryStore.from_pretrained(store)).startswith(f"{store / 'memories.json'} is not ")


# ------------------------------------------------------------------------------------------------ files


def repeated(store: Path) -> None:
    set_facts(store, num_rows=4)
    shutil.copyfile(store / FIRST, store / SECOND)


def other_columns(store: Path) -> None:
    parquet.write_table(parquet.read_table(store / FIRST).drop_columns(["write_losses"]), store / FIRST)


def of_another_size(store: Path) -> None:
    shutil.copyfile(store / FIRST, store / shard_name(0, 1))


def renumbered(store: Path) -> None:
    (store / SECOND).rename(store / "data" / "train-1-of-00002.parquet")


FILES = [
    (repeated, f"row 0 in {FIRST} and row 2 in {SECOND} have the same id 'a'"),
    (lambda store: set_column(store / FIRST, "id", ["a", "a"]), f"row 0 in {FIRST} and row 1 in {FIRST} have the same"),
    (lambda store: set_column(store / FIRST, "id", ["a", None]), f"row 1 in {FIRST} has no id"),
    (lambda store: set_column(store / FIRST, "id", [1, 2], pyarrow.int64()), "column id is of int64, where string"),
    (of_another_size, "data/ also holds train-00000-of-00001.parquet, where one file for each of the 2"),
    (renumbered, "is not finished: 1 of 2 files are missing, the first train-00001-of-00002.parquet"),
    (lambda store: (store / SECOND).unlink(), "is not finished: 1 of 2 files are missing, the first train-00001"),
    (lambda store: shutil.copyfile(store / FIRST, store / SECOND), f"{SECOND} is broken: it has 2 rows, where 1 by"),
    (lambda store: shutil.copyfile(store / SECOND, store / FIRST), f"{FIRST} is broken: it has 1 rows, where 2 by"),
    (lambda store: (store / FIRST).write_bytes(b""), f"{FIRST} is not a readable Parquet file"),
    (lambda store: (store / FIRST).write_bytes(b"PAR1" * 9), f"{FIRST} is not a readable Parquet file"),
    (other_columns, "its columns are id, embeddings, final_write_loss, segment_lengths, num_context_tokens, where"),
    (lambda store: set_column(store / FIRST, "embeddings", [1, 2], pyarrow.int64()), "embeddings is of int64, where l"),
    (lambda store: set_column(store / FIRST, "final_write_loss", [1, 2], pyarrow.float64()), "is of double, where flo"),
    (lambda store: set_facts(store, dtype="float64"), "embeddings is of list<item: list<item: float>>, where list<"),
]


@pytest.mark.parametrize(("breaks", "said"), FILES, ids=[str(number) for number in range(len(FILES))])
def test_files_that_are_not_those_of_the_facts_are_refused_at_the_opening(store, breaks, said):
    breaks(store)
    message = refusal(lambda: MemoryStore.from_pretrained(store))
    assert said in message
    assert str(store) in message
    assert message.rpartition(". ")[2].startswith(("Copy", "Give", "Remove"))


def test_facts_of_a_billion_shards_take_no_time(store):
    set_facts(store, num_rows=2**31 - 1, num_shards=2**31 - 1, shard_size=1)
    assert "is not finished: 2147483647 of 2147483647" in refusal(lambda: MemoryStore.from_pretrained(store))


# ------------------------------------------------------------------------------------------------ rows

WHOLE = np.zeros(SHAPE, "float32").tolist()
ROWS = [
    ("embeddings", WHOLE[:1], "embeddings are 1 vectors of width 4, where 2 of width 4"),
    ("embeddings", [*WHOLE, *WHOLE], "embeddings are 4 vectors of width 4, where 2 of width 4"),
    ("embeddings", [WHOLE[0], WHOLE[1][:3]], "embeddings are 2 vectors of width 4 and 3, where 2 of width 4"),
    ("embeddings", [WHOLE[0], None], "embeddings are 2 vectors of width 4 and None, where 2 of width 4"),
    ("embeddings", [], "embeddings are 0 vectors of width 0, where 2 of width 4"),
    ("embeddings", None, "embeddings are 0 vectors of width 0, where 2 of width 4"),
    ("embeddings", [[0, 0, None, 0], WHOLE[1]], "embeddings holds null, where a number"),
    ("embeddings", [[0, 0, float("nan"), 0], WHOLE[1]], "embeddings is nan at [0, 0, 2], where a finite number"),
    ("embeddings", [WHOLE[0], [0, float("inf"), 0, 0]], "embeddings is inf at [0, 1, 1], where a finite number"),
    ("write_losses", None, "write_losses is null, where a list"),
    ("write_losses", [1.0, None], "write_losses holds null, where a number"),
    ("write_losses", [float("inf")], "write_losses is inf at [0, 0], where a finite number"),
    ("final_write_loss", None, "final_write_loss holds null, where a number"),
    ("final_write_loss", float("nan"), "final_write_loss is nan at [0], where a finite number"),
    ("segment_lengths", None, "segment_lengths is null, where a list"),
    ("segment_lengths", [], "segment_lengths has the shape (1, 0), where (batch, segments)"),
    ("segment_lengths", [2**40], f"segment_lengths holds {2**40}, where a number of tokens"),
    ("segment_lengths", [-1, 4], "segment_lengths holds -1, where a number of tokens"),
    ("segment_lengths", [0], "the segment_lengths of memory 0 come to 0, where"),
    ("num_context_tokens", None, "num_context_tokens is None, where"),
    ("num_context_tokens", 2**40, f"num_context_tokens is {2**40}, where"),
]


@pytest.mark.parametrize(("name", "value", "said"), ROWS, ids=[f"{row[0]}-{n}" for n, row in enumerate(ROWS)])
def test_a_row_that_write_cannot_have_left_is_refused_when_it_is_read(store, name, value, said):
    values = parquet.read_table(store / FIRST)[name].to_pylist()
    set_column(store / FIRST, name, [values[0], value])
    opened = MemoryStore.from_pretrained(store)
    message = refusal(lambda: opened[["a", "b"]])
    assert message.startswith(f"The memory 'b' of {store} is broken: {said}")
    assert message.endswith("belongs. Copy it again from where it was written, or write the context again.")
    for each in ("a", "c"):  # the others are what they were
        torch.testing.assert_close(opened[each].embeddings[0], memory_of().embeddings[IDS.index(each)])


def test_a_store_that_another_tool_wrote_again_is_read(store):
    for name in (FIRST, SECOND):
        table = parquet.read_table(store / name)
        columns = {column: table[column].to_pylist() for column in table.column_names}
        kinds = Features(embeddings=Array2D(SHAPE, "float32")).arrow_schema.field("embeddings").type.storage_type
        fields = [field if field.name != "embeddings" else pyarrow.field("embeddings", kinds) for field in table.schema]
        parquet.write_table(pyarrow.table(columns, schema=pyarrow.schema(fields)), store / name, store_schema=False)
    read = MemoryStore.from_pretrained(store)["b"]
    torch.testing.assert_close(read.embeddings[0], memory_of().embeddings[1], rtol=0, atol=0)


# ------------------------------------------------------------------------------------------------ by chance

CORRUPTIONS = 200


def test_a_store_with_chance_damage_reads_or_is_refused(store, tmp_path):
    chance, outcomes = random.Random(0), []
    for number in range(CORRUPTIONS):
        damaged = shutil.copytree(store, tmp_path / f"damaged-{number}")
        path = damaged / chance.choice(["memories.json", "memories.json", FIRST, SECOND])
        path.write_bytes(corrupted(path.read_bytes(), chance))
        try:
            opened = MemoryStore.from_pretrained(damaged)
            assert len(opened.ids) == 3
            for name in opened.ids:
                memory = opened[name]
                assert memory.embeddings.isfinite().all()
                memory.save_pretrained(tmp_path / "again")
        except (ValueError, OSError):
            outcomes.append("refused")
        else:
            outcomes.append("read")
        shutil.rmtree(damaged)
    assert set(outcomes) == {"refused", "read"}
