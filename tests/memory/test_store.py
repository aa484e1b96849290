"""A store that is gone through, cut, put together and added to."""

import json
import shutil
import threading
from pathlib import Path

import datasets
import pytest
import torch

from hf_gradmem import GradMemMemory, MemoryStore
from hf_gradmem.memory import merging
from tests.support.stores import IDS, save_store


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    datasets.disable_progress_bars()


def opened(directory: Path, ids: list[str] = IDS, **options) -> MemoryStore:
    return MemoryStore.from_pretrained(save_store(directory, ids=ids, **options))


def assert_holds(store: MemoryStore, expected: dict[str, GradMemMemory]) -> None:
    assert store.ids == list(expected)
    for name, memory in store.items():
        for part, tensor in expected[name].tensors.items():
            torch.testing.assert_close(memory.tensors[part], tensor, rtol=0, atol=0, equal_nan=True)


def held(store: MemoryStore) -> dict[str, GradMemMemory]:
    return dict(store.items())


# ------------------------------------------------------------------------------------------------ going through


def test_iterating_gives_ids_and_memories_in_order_across_files(tmp_path):
    store = opened(tmp_path / "store")
    assert list(store) == IDS
    assert_holds(store, {name: store[name] for name in IDS})
    batches = list(store.batches(2))
    assert [ids for ids, _ in batches] == [["a", "b"], ["c"]]
    assert torch.equal(batches[0][1].embeddings, store[["a", "b"]].embeddings)
    with pytest.raises(ValueError, match="batch_size must be at least 1, got 0"):
        next(store.batches(0))


def test_a_part_by_ids_or_by_facts_reads_the_same_memories(tmp_path):
    store = opened(tmp_path / "store")
    part = store.filter(["c", "a"])
    assert_holds(part, {name: store[name] for name in ("a", "c")})
    assert "b" not in part
    assert (part.facts["num_rows"], part.facts["num_shards"]) == (2, 1)
    most = max(IDS, key=lambda name: int(store[name].num_context_tokens))
    tokens = int(store[most].num_context_tokens)
    assert store.filter(lambda row: row["num_context_tokens"] == tokens and row["id"] == most).ids == [most]
    assert store.filter(["a", "c"]).filter(["c"]).ids == ["c"]
    assert store.filter(name for name in ("c", "a")).ids == ["a", "c"]


@pytest.mark.parametrize("index", [0, slice(0, 1), [True, False, True]])
def test_a_store_is_asked_by_id(tmp_path, index):
    store = opened(tmp_path / "store")
    with pytest.raises(TypeError, match="asked by id"):
        store[index]
    assert ["a"] not in store
    with pytest.raises(TypeError, match="takes a list of stores, got 'a'"):
        MemoryStore.merge(store, tmp_path / "merged")


def test_a_part_that_cannot_be_made_is_refused(tmp_path):
    store = opened(tmp_path / "store")
    with pytest.raises(KeyError, match="no memory 'z' among these 3"):
        store.filter(["a", "z"])
    with pytest.raises(ValueError, match=r"No memory of .* is left: none of 3"):
        store.filter(lambda row: False)
    with pytest.raises(TypeError, match="in a list"):
        store.filter("a")
    with pytest.raises(ValueError, match="is a part of one"):
        store.filter(["a"]).push_to_hub("me/part")


# ------------------------------------------------------------------------------------------------ putting together


def test_a_merge_holds_the_memories_of_all(tmp_path):
    first, second = opened(tmp_path / "first"), opened(tmp_path / "second", ["d", "e"])
    merged = MemoryStore.merge(iter([first, second.filter(["e"])]), tmp_path / "both", shard_size=3)
    assert_holds(merged, held(first) | {"e": second["e"]})
    assert merged.facts["num_shards"] == 2
    assert merged.fingerprint == first.fingerprint
    assert [part["num_rows"] for part in merged.facts["parts"]] == [3, 1]
    assert sorted(path.name for path in tmp_path.iterdir() if path.name.startswith(".")) == []


def test_a_part_of_a_merged_store_says_how_much_is_of_each_of_its_parts(tmp_path):
    stores = [opened(tmp_path / name, [*name]) for name in ("abc", "de", "fg")]
    for store, source in zip(stores, ("one", "two", "three"), strict=True):
        store.facts["source"] = source
    merged = MemoryStore.merge(stores, tmp_path / "all")
    part = merged.filter(["a", "b", "f", "g"]).filter(["b", "f", "g"])
    again = MemoryStore.merge([part, opened(tmp_path / "h", ["h"])], tmp_path / "again")
    parts = [(each.get("source"), each["num_rows"]) for each in again.facts["parts"]]
    assert parts == [("one", 1), ("three", 2), (None, 1)]
    assert [each["num_rows"] for each in merged.facts["parts"]] == [3, 2, 2]


def test_stores_that_do_not_go_together_are_refused(tmp_path):
    first, second = opened(tmp_path / "first"), opened(tmp_path / "second", ["c"])
    with pytest.raises(ValueError, match=r"The id 'c' is in .*first and in .*second"):
        MemoryStore.merge([first, second], tmp_path / "both")
    second.facts["fingerprint"] = "def-456"
    for join in (lambda: MemoryStore.merge([first, second], tmp_path / "both"), lambda: first.append(second)):
        with pytest.raises(ValueError, match=r"second has fingerprint def-456 and .*first has abc-123"):
            join()
    assert not (tmp_path / "both").exists()
    with pytest.raises(ValueError, match="is not empty"):
        MemoryStore.merge([first], tmp_path / "second")
    with pytest.raises(ValueError, match="no store in a directory of its own"):
        first.filter(["a"]).append(opened(tmp_path / "third", ["z"]))


def test_a_merged_store_has_a_card_that_says_what_it_holds_now(tmp_path):
    first, second, third = (opened(tmp_path / name, [*name]) for name in ("abc", "de", "fg"))
    for store, model in ((first, "me/one"), (second, "me/two"), (third, "me/one")):
        store.facts["model"] = model
    place = tmp_path / "both"
    merged = MemoryStore.merge([first, second], place)
    card = (place / "README.md").read_text(encoding="utf-8")
    assert "5 contexts, each written into 2 vectors of width 4 (float32) by `me/one` and `me/two`." in card
    assert 'MemoryStore.from_pretrained("your-name/both")\nmemory = store["a"]' in card
    assert "`abc-123`" in card
    merged.append(third)
    appended = (place / "README.md").read_text(encoding="utf-8")
    assert appended == card.replace("5 contexts", "7 contexts")
    for number, own in enumerate((b"my own", "Mémoires".encode("latin-1"))):
        (place / "README.md").write_bytes(own)
        merged.append(opened(tmp_path / f"h{number}", [f"h{number}"]))
        assert (place / "README.md").read_bytes() == own


def test_a_merge_that_is_stopped_leaves_nothing_and_can_be_given_again(tmp_path, monkeypatch):
    first = opened(tmp_path / "first")
    with monkeypatch.context() as patch:
        patch.setattr(merging, "_write_facts", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            MemoryStore.merge([first], tmp_path / "copy")
    assert not (tmp_path / "copy").exists()
    assert_holds(MemoryStore.merge([first], tmp_path / "copy"), held(first))


@pytest.mark.parametrize("added", [["d"], ["d", "e"], ["d", "e", "f", "g"]], ids=len)
def test_an_append_holds_the_memories_of_both(tmp_path, added):
    """Three memories, two in a file: the last file is filled, and there are as many, or more."""
    store, more = opened(tmp_path / "store"), opened(tmp_path / "more", added)
    before = held(store)
    store.append(more)
    assert_holds(store, before | held(more))
    assert_holds(MemoryStore.from_pretrained(tmp_path / "store"), before | held(more))
    assert [path for path in (tmp_path / "store" / "data").iterdir() if path.name.startswith(".")] == []


class Killed(BaseException):
    """Stands for a process that ends where it is."""


@pytest.mark.parametrize("moves", range(6))
def test_an_append_that_is_killed_at_any_move_leaves_the_store_of_before_or_all(tmp_path, monkeypatch, moves):
    """The moves are those of facts and files into their places; what a killed process would clean up stays."""
    store, more = opened(tmp_path / "store"), opened(tmp_path / "more", ["d", "e"])
    before, after = held(store), held(store) | held(more)
    counted = iter(range(moves))
    replace, rename = Path.replace, Path.rename

    def counting(move):
        def moved(path, target):
            if "store" in Path(target).parts and next(counted, None) is None:
                raise Killed
            return move(path, target)

        return moved

    with monkeypatch.context() as patch:
        patch.setattr(Path, "replace", counting(replace))
        patch.setattr(Path, "rename", counting(rename))
        patch.setattr(shutil, "rmtree", lambda *_, **__: None)
        try:
            store.append(more)
            killed = False
        except Killed:
            killed = True
    committed = json.loads((tmp_path / "store" / "memories.json").read_text(encoding="utf-8"))["num_rows"] == 5
    assert committed or killed
    again = MemoryStore.from_pretrained(tmp_path / "store")
    assert_holds(again, after if committed else before)
    if not committed:
        again.append(more)
        assert_holds(again, after)


def test_an_append_to_a_store_that_has_changed_is_refused(tmp_path):
    store, more = opened(tmp_path / "store"), opened(tmp_path / "more", ["d"])
    MemoryStore.from_pretrained(tmp_path / "store").append(more)
    with pytest.raises(ValueError, match="has changed since it was opened"):
        store.append(opened(tmp_path / "further", ["e"]))


def test_a_store_that_is_opened_while_another_appends_leaves_it_to_finish(tmp_path, monkeypatch):
    """Opened in the middle of the moves, by a thread that goes on when they are done."""
    store, more = opened(tmp_path / "store"), opened(tmp_path / "more", ["d", "e"])
    expected = held(store) | held(more)
    replace, found = Path.replace, []
    reader = threading.Thread(target=lambda: found.append(MemoryStore.from_pretrained(tmp_path / "store")))

    def moved(path, target):
        if path.parent.name == ".append-5" != target.parent.name and not reader.ident:
            reader.start()
            reader.join(0.3)  # which would have moved all of them by then
        return replace(path, target)

    monkeypatch.setattr(Path, "replace", moved)
    store.append(more)
    reader.join()
    assert_holds(store, expected)
    assert_holds(found[0], expected)


def test_a_merge_fills_the_directory_that_it_is_called_in(tmp_path, monkeypatch):
    store, place = opened(tmp_path / "store"), tmp_path / "place"
    place.mkdir()
    monkeypatch.chdir(place)
    assert_holds(MemoryStore.merge([store], "."), held(store))
    assert_holds(MemoryStore.from_pretrained("."), held(store))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["cache", "place", "store"]
