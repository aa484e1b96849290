"""Folders of text files: what is taken from them, what is skipped or refused, and stores that are written from them."""

import os
from pathlib import Path

import pytest
import torch

from hf_gradmem import GradMemConfig, GradMemForCausalLM, MemoryStore, get_gradmem_model
from hf_gradmem.commands.dataset_rows import load_source
from hf_gradmem.commands.text_folder import TextFolder
from hf_gradmem.commands.write_dataset import write_dataset
from hf_gradmem.writing.fitting import fit_contexts
from hf_gradmem.writing.writers.gradient import GradientWriter
from tests.support.small_models import nameless_base, small_tokenizer

TEXTS = {"b.txt": "lazydog", "a/z.md": "fox", "a/b/y.TXT": "abc", "c.txt": "quick"}


@pytest.fixture
def folder(tmp_path) -> Path:
    for name, text in TEXTS.items():
        path = tmp_path / "notes" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")
    return tmp_path / "notes"


@pytest.fixture(scope="module")
def model() -> GradMemForCausalLM:
    torch.manual_seed(0)
    config = GradMemConfig(num_memory_tokens=3, write_steps=1)
    return get_gradmem_model(nameless_base(), config, tokenizer=small_tokenizer())


def contents(folder: TextFolder) -> dict[str, object]:
    ids, texts = folder.read(range(len(folder)))
    return dict(zip(ids, texts, strict=True))


# ------------------------------------------------------------------------------------------------ what is taken


def test_ids_are_paths_with_slashes_in_order(folder):
    assert list(contents(TextFolder(folder))) == ["a/b/y.TXT", "a/z.md", "b.txt", "c.txt"]
    assert contents(TextFolder(folder)) == TEXTS
    assert TextFolder(folder).read(range(1, 3)) == (["a/z.md", "b.txt"], ["fox", "lazydog"])


def test_a_name_below_the_folder_may_begin_as_a_home_does(folder, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    for place in ("home/x.txt", "notes/~/x.txt", "notes/~nobody-here.txt"):
        (tmp_path / place).parent.mkdir(exist_ok=True)
        (tmp_path / place).write_text(place, encoding="utf-8")
    monkeypatch.chdir(folder)
    assert contents(TextFolder(".")) == TEXTS | {
        "~/x.txt": "notes/~/x.txt",
        "~nobody-here.txt": "notes/~nobody-here.txt",
    }


def test_a_byte_order_mark_and_the_newlines_at_the_end_are_no_part_of_a_text(folder):
    (folder / "b.txt").write_bytes(b"\xef\xbb\xbf lazy\r\ndog\r\n\r\n")
    assert contents(TextFolder(folder))["b.txt"] == " lazy\ndog"


def test_other_and_hidden_files_are_left_out(folder):
    for name in ("page.html", ".hidden.txt", ".git/message.txt", "txt"):
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text("abc", encoding="utf-8")
    assert contents(TextFolder(folder)) == TEXTS
    assert TextFolder(folder).skipped == {}


def test_files_that_cannot_be_read_are_skipped_by_name(folder):
    (folder / "latin.txt").write_bytes("caf\xe9".encode("latin-1"))
    (folder / "picture.md").write_bytes(b"GIF89a\0\0")
    (folder / "gone.txt").symlink_to(folder / "nowhere")
    (folder / "a" / "linked").symlink_to(folder, target_is_directory=True)
    expected = {
        "a/linked": "a link to a folder",
        "gone.txt": "No such file or directory",
        "latin.txt": "not text in UTF-8",
        "picture.md": "not text in UTF-8",
    }
    if os.name != "nt":
        os.mkfifo(folder / "pipe.txt")  # reading it would wait for ever
        (folder / os.fsdecode(b"\xff.txt")).write_text("abc", encoding="utf-8")
        expected |= {"pipe.txt": "not a file", "\ufffd.txt": "its name is not UTF-8"}
    found = TextFolder(folder)
    assert found.skipped == expected
    assert contents(found) == TEXTS
    with pytest.warns(UserWarning, match=rf"Skipped {len(expected)} of {len(expected) + 4} files: .*gone\.txt"):
        found.warn_of_skipped()


def test_blank_files_are_refused_by_name(folder):
    (folder / "a" / "blank.md").write_bytes(b"\xef\xbb\xbf \n\t\n")
    with pytest.raises(ValueError, match=r"a/blank\.md is blank: .* Fill or remove"):
        TextFolder(folder)
    for name in "pqrs":
        (folder / f"{name}.txt").touch()
    with pytest.raises(ValueError, match=r"a/blank\.md, p\.txt, q\.txt and 2 more are blank"):
        TextFolder(folder)


def test_a_folder_without_texts_is_refused(tmp_path):
    (tmp_path / "notes.rst").write_text("abc", encoding="utf-8")
    with pytest.raises(ValueError, match=r"holds no \.txt or \.md file"):
        load_source(str(tmp_path))
    (tmp_path / "notes.txt").write_bytes(b"\xff")
    with pytest.raises(ValueError, match=r"that can be read\. notes\.txt: not text in UTF-8"):
        load_source(str(tmp_path))
    with pytest.raises(NotADirectoryError, match="nowhere"):
        TextFolder(tmp_path / "nowhere")


def test_texts_are_read_when_they_are_asked_for(folder):
    found = TextFolder(folder)
    (folder / "b.txt").write_text("new", encoding="utf-8")
    assert contents(found)["b.txt"] == "new"
    (folder / "b.txt").write_text(" ", encoding="utf-8")
    with pytest.raises(ValueError, match=r"b\.txt is blank"):
        contents(found)


# ------------------------------------------------------------------------------------------------ stores


def test_a_store_holds_each_text_under_its_path(model, folder, tmp_path):
    facts = write_dataset(model, load_source(str(folder)), tmp_path / "store", shard_size=3)
    store = MemoryStore.from_pretrained(tmp_path / "store")
    assert store.ids == sorted(TEXTS)
    for name, text in TEXTS.items():
        expected = model.write(text, measure_final_loss=True)
        torch.testing.assert_close(store[name].embeddings, expected.embeddings, rtol=1e-5, atol=1e-5)
    assert facts["segments"] == {"total": 4, "most": 1, "contexts": 0}
    assert facts["source"]["context_column"] is None


def test_an_interrupted_run_goes_on_and_a_changed_text_is_another_source(model, folder, tmp_path, monkeypatch):
    write, calls = GradientWriter.write, []

    def fails_in_the_second_shard(self, rows, memory, descent):
        calls.append(len(memory))
        if len(calls) == 2:
            raise KeyboardInterrupt
        return write(self, rows, memory, descent)

    monkeypatch.setattr(GradientWriter, "write", fails_in_the_second_shard)
    options = {"shard_size": 2, "batch_size": 2}
    with pytest.raises(KeyboardInterrupt):
        write_dataset(model, TextFolder(folder), tmp_path / "store", **options)
    assert write_dataset(model, TextFolder(folder), tmp_path / "store", **options)["written"] == 2
    (folder / "c.txt").write_text("quicker", encoding="utf-8")
    with pytest.raises(ValueError, match=r"begun by another run: source\.sha256"):
        write_dataset(model, TextFolder(folder), tmp_path / "store", **options)
    (folder / "c.txt").write_text("quick", encoding="utf-8")
    (folder / "c.txt").rename(folder / "d.txt")
    with pytest.raises(ValueError, match=r"begun by another run: source\.sha256"):
        write_dataset(model, TextFolder(folder), tmp_path / "store", **options)


def test_long_texts_are_cut_and_counted_and_the_length_belongs_to_the_store(model, folder, tmp_path):
    long = "abcdefghij" * 40
    (folder / "long.txt").write_text(long, encoding="utf-8")
    facts = write_dataset(model, TextFolder(folder), tmp_path / "store")
    (segments,) = fit_contexts(model.writer, model.tokenizer, [long])
    assert facts["segments"] == {"total": 4 + len(segments), "most": len(segments), "contexts": 1}
    store = MemoryStore.from_pretrained(tmp_path / "store")
    assert store["long.txt"].segment_lengths.tolist() == [[len(segment) for segment in segments]]
    shorter = write_dataset(model, TextFolder(folder), tmp_path / "shorter", segment_length=3)
    assert shorter["segments"] == {"total": 1 + 1 + 2 + 3 + 134, "most": 134, "contexts": 3}
    with pytest.raises(ValueError, match=r"write\.segment_length was None and is 3"):
        write_dataset(model, TextFolder(folder), tmp_path / "store", segment_length=3)


def test_what_makes_no_sense_for_a_folder_is_refused(model, folder):
    with pytest.raises(ValueError, match=r"lies in .*notes, the folder that is written"):
        write_dataset(model, TextFolder(folder), folder / "memories")
    with pytest.raises(ValueError, match="which has no columns"):
        write_dataset(model, TextFolder(folder), folder.parent / "store", id_column="id")
