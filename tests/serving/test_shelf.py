"""Where the server keeps what clients write, and what it leaves alone there."""

import pytest
from datasets import Dataset

from hf_gradmem import GradMemForCausalLM, GradMemMemory
from hf_gradmem.commands.packaged import RETRIEVAL_ADAPTER
from hf_gradmem.commands.write_dataset import write_dataset
from hf_gradmem.serving.shelf import Shelf


@pytest.fixture(scope="module")
def model() -> GradMemForCausalLM:
    return GradMemForCausalLM.from_pretrained(RETRIEVAL_ADAPTER)


@pytest.fixture(scope="module")
def memory(model) -> GradMemMemory:
    return model.write("!a:b!")


def opened(folder) -> Shelf:
    return Shelf(None, folder, max_memories=9)


def test_the_folder_of_a_store_or_of_a_model_is_refused_at_the_start(model, tmp_path):
    write_dataset(model, Dataset.from_dict({"context": ["!a:1!"]}), tmp_path / "store")
    (tmp_path / "adapter").mkdir()
    (tmp_path / "adapter" / "config.json").write_text("{}")
    (tmp_path / "link").symlink_to(tmp_path / "store")
    before = sorted(tmp_path.rglob("*"))
    for name, reason in (
        ("store", "store is the folder of a store, with a memories.json. Give a folder of its own."),
        ("store/data", "store is the folder of a store"),
        ("link/new", "store is the folder of a store"),
        ("adapter", "adapter is the folder of a model, with a config.json"),
    ):
        with pytest.raises(ValueError, match=reason):
            opened(tmp_path / name)
    assert sorted(tmp_path.rglob("*")) == before
    assert opened(tmp_path).ids() == []  # beside them


def test_two_folders_of_one_id_are_refused_at_the_start(memory, tmp_path):
    for name in ("a b", "a%20b"):
        memory.save_pretrained(tmp_path / name)
    with pytest.raises(ValueError, match=r"a b and \S+a%20b hold memories of one id\. Move one"):
        opened(tmp_path)


def test_a_memory_is_not_written_where_something_else_lies(memory, tmp_path):
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "shard.parquet").write_text("mine")
    (tmp_path / "notes").write_text("mine")
    (tmp_path / "link").symlink_to(tmp_path / "nowhere")
    shelf = opened(tmp_path)
    for name in ("data", "notes", "link"):
        for refuse in (shelf.check_new, lambda name: shelf.add(name, memory)):
            with pytest.raises(ValueError, match=f"Where a memory '{name}' would be kept lies something else"):
                refuse(name)
    assert shelf.ids() == []
    assert [path.name for path in (tmp_path / "data").iterdir()] == ["shard.parquet"]


def test_what_a_killed_write_left_does_not_take_its_id(memory, tmp_path):
    (tmp_path / "empty").mkdir()
    (tmp_path / "half").mkdir()
    (tmp_path / "half" / ".123.memory.safetensors").write_text("hal")
    shelf = opened(tmp_path)
    for name in ("empty", "half"):
        shelf.add(name, memory)
        assert opened(tmp_path)[name] == memory


def test_deleting_a_memory_leaves_what_else_lies_in_its_folder(memory, tmp_path):
    shelf = opened(tmp_path)
    shelf.add("a", memory)
    shelf.add("b", memory)
    (tmp_path / "a" / "notes.txt").write_text("mine")
    shelf.delete("a")
    shelf.delete("b")
    assert shelf.ids() == opened(tmp_path).ids() == []
    assert sorted(path.relative_to(tmp_path).as_posix() for path in tmp_path.rglob("*")) == ["a", "a/notes.txt"]


def test_deleting_a_folder_that_is_a_link_leaves_what_it_points_to(memory, tmp_path):
    memory.save_pretrained(tmp_path / "elsewhere")
    (tmp_path / "kept").mkdir()
    (tmp_path / "kept" / "a").symlink_to(tmp_path / "elsewhere")
    shelf = opened(tmp_path / "kept")
    assert shelf["a"] == memory
    shelf.delete("a")
    assert shelf.ids() == list((tmp_path / "kept").iterdir()) == []
    assert GradMemMemory.from_pretrained(tmp_path / "elsewhere") == memory


def test_a_memory_that_was_removed_by_hand_can_be_forgotten(memory, tmp_path):
    shelf = opened(tmp_path)
    shelf.add("a", memory)
    (tmp_path / "a" / "memory.safetensors").unlink()
    (tmp_path / "a").rmdir()
    shelf.delete("a")
    assert shelf.ids() == []


def test_a_file_that_is_no_memory_of_one_context_is_left_out_with_a_warning(model, memory, tmp_path):
    model.write(["!a:b!", "!c:d!"]).save_pretrained(tmp_path / "two")
    memory.save_pretrained(tmp_path / "one")
    (tmp_path / "torn").mkdir()
    (tmp_path / "torn" / "memory.safetensors").write_bytes(b"half")
    with pytest.warns(UserWarning, match="is left out") as told:
        shelf = opened(tmp_path)
    assert shelf.ids() == ["one"]
    torn, two = (str(each.message) for each in told)
    assert "torn/memory.safetensors is left out: it cannot be read as a memory" in torn
    assert "two/memory.safetensors is left out: it holds the memories of 2 contexts" in two
    with pytest.raises(ValueError, match="lies something else"):
        shelf.add("two", memory)
