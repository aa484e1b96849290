"""A written memory as a value: saved, taken apart, joined."""

import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import hf_gradmem.files
from hf_gradmem import GradMemMemory
from tests.support.small_models import EVERY_OPTION, PLAIN, named_base, nameless_base, with_memory
from tests.support.tiny_models import tiny_tokens

FILE = "memory.safetensors"


def memory_of(batch: int = 3, steps: int = 2, segments: int = 1, *, fingerprint="abc-123", measured=True, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return GradMemMemory(
        embeddings=torch.randn((batch, 2, 4), generator=generator),
        write_losses=torch.rand((batch, steps), generator=generator),
        segment_lengths=torch.randint(1, 9, (batch, segments), generator=generator),
        final_write_loss=torch.rand((batch,), generator=generator) if measured else None,
        fingerprint=fingerprint,
        base_name="me/base",
    )


def assert_same(memory: GradMemMemory, other: GradMemMemory) -> None:
    assert (memory.fingerprint, memory.base_name) == (other.fingerprint, other.base_name)
    for name in ("embeddings", "write_losses", "segment_lengths"):
        ours, theirs = getattr(memory, name), getattr(other, name)
        assert ours.dtype == theirs.dtype
        assert torch.equal(ours.nan_to_num(-1.0), theirs.nan_to_num(-1.0)), name
    assert (memory.final_write_loss is None) == (other.final_write_loss is None)
    if memory.final_write_loss is not None:
        assert torch.equal(memory.final_write_loss, other.final_write_loss)


# ------------------------------------------------------------------------------------------------ files


@pytest.mark.parametrize("measured", [True, False])
def test_saved_memory_is_loaded_bit_for_bit(tmp_path, measured):
    memory = memory_of(measured=measured, segments=2)
    memory.write_losses[1, 1] = torch.nan  # a sample that had stopped
    memory.save_pretrained(tmp_path / "new" / "directory")
    assert [path.name for path in (tmp_path / "new" / "directory").iterdir()] == [FILE]
    assert_same(GradMemMemory.from_pretrained(tmp_path / "new" / "directory"), memory)
    assert_same(GradMemMemory.from_pretrained(str(tmp_path / "new" / "directory" / FILE)), memory)


def test_double_precision_survives_the_file(tmp_path):
    model = with_memory(nameless_base(dtype=torch.float64), **PLAIN)
    memory = model.write(input_ids=tiny_tokens(2, 6))
    memory.save_pretrained(tmp_path)
    loaded = GradMemMemory.from_pretrained(tmp_path)
    assert loaded.embeddings.dtype == torch.float64
    assert_same(loaded, memory)


def test_facts_of_the_memory_stand_in_the_files_header(tmp_path):
    memory_of().save_pretrained(tmp_path)
    with safe_open(tmp_path / FILE, framework="pt") as file:
        header = file.metadata()
    assert header["format"] == "gradmem-memory"
    assert header["format_version"] == "2"
    assert json.loads(header["fingerprint"]) == "abc-123"
    assert json.loads(header["base_name"]) == "me/base"


def test_save_that_fails_half_way_leaves_the_old_file_and_no_other(tmp_path, monkeypatch):
    old = memory_of(seed=1)
    old.save_pretrained(tmp_path)

    def half(tensors, path, metadata):
        path.write_bytes(b"half")
        raise OSError("No space left on device")

    monkeypatch.setattr(hf_gradmem.files, "save_file", half)
    with pytest.raises(OSError, match="No space left"):
        memory_of(seed=2).save_pretrained(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == [FILE]
    assert_same(GradMemMemory.from_pretrained(tmp_path), old)


def test_saving_over_a_memory_replaces_it(tmp_path):
    memory_of(seed=1).save_pretrained(tmp_path)
    memory_of(seed=2, batch=5).save_pretrained(tmp_path)
    assert_same(GradMemMemory.from_pretrained(tmp_path), memory_of(seed=2, batch=5))


@pytest.mark.parametrize("keep", [0, 4, 100, -1])
def test_truncated_file_is_named(tmp_path, keep):
    memory_of().save_pretrained(tmp_path)
    path = tmp_path / FILE
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(ValueError, match=rf"{path} is not a readable safetensors file .* copied whole"):
        GradMemMemory.from_pretrained(tmp_path)


@pytest.mark.parametrize("header", [None, {"format": "pt"}, {"format": "gradmem-memory", "format_version": "9"}])
def test_foreign_file_is_refused_with_what_its_header_says(tmp_path, header):
    save_file({"embeddings": torch.zeros(1, 2, 4)}, tmp_path / FILE, metadata=header)
    with pytest.raises(ValueError, match="is not a memory of format gradmem-memory 2: its header says") as caught:
        GradMemMemory.from_pretrained(tmp_path)
    assert all(fact in str(caught.value) for fact in (header or {"nothing": ""}))


def test_file_that_lacks_a_tensor_or_has_another_is_refused(tmp_path):
    header = {"format": "gradmem-memory", "format_version": "2", "fingerprint": "null"}
    save_file({"embeddings": torch.zeros(1, 2, 4), "other": torch.zeros(1)}, tmp_path / FILE, metadata=header)
    with pytest.raises(ValueError, match="lacks write_losses, segment_lengths and has other too many"):
        GradMemMemory.from_pretrained(tmp_path)


def test_file_of_the_first_version_is_loaded_with_the_fingerprint_that_it_has(tmp_path):
    memory = memory_of(fingerprint="/home/me/base@main/4/abc")
    memory.save_pretrained(tmp_path)
    facts = {"format": "gradmem-memory", "format_version": "1", "fingerprint": json.dumps(memory.fingerprint)}
    save_file(load_file(tmp_path / FILE), tmp_path / FILE, metadata=facts)
    assert_same(GradMemMemory.from_pretrained(tmp_path), replace(memory, base_name=None))


def test_missing_memory_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=f"{tmp_path} holds no memory: {FILE} is missing"):
        GradMemMemory.from_pretrained(tmp_path)
    missing = tmp_path / "no" / "such"
    with pytest.raises(FileNotFoundError, match=f"no directory or file '{missing}'"):
        GradMemMemory.from_pretrained(missing)


# ------------------------------------------------------------------------------------------------ parts and sums


@pytest.mark.parametrize(
    ("index", "rows"),
    [
        (1, [1]),
        (-1, [2]),
        (torch.tensor(2), [2]),
        (slice(1, None), [1, 2]),
        (slice(None, None, 2), [0, 2]),
        ([2, 0, 2], [2, 0, 2]),
        ((0, 1), [0, 1]),
        (torch.tensor([1, 1]), [1, 1]),
        (torch.tensor([True, False, True]), [0, 2]),
        ([], []),
        (np.int64(1), [1]),
        (np.array([2, 0]), [2, 0]),
        ([torch.tensor(1)], [1]),
        ((torch.tensor(2), np.int64(0)), [2, 0]),
    ],
    ids=str,
)
def test_index_takes_whole_contexts_and_gives_a_memory(index, rows):
    memory = memory_of(3, segments=2)
    part = memory[index]
    assert len(part) == len(rows)
    assert part.fingerprint == memory.fingerprint
    for name in ("embeddings", "write_losses", "segment_lengths", "final_write_loss"):
        expected = [getattr(memory, name)[row] for row in rows]
        assert all(torch.equal(a, b) for a, b in zip(getattr(part, name), expected, strict=True))
    assert part.num_context_tokens.tolist() == [int(memory.segment_lengths[row].sum()) for row in rows]


@pytest.mark.parametrize("index", [3, -4, torch.tensor(3), [0, 3]])
def test_index_out_of_range_is_refused(index):
    with pytest.raises(IndexError, match=r"3|-4"):
        memory_of(3)[index]


@pytest.mark.parametrize("index", [None, True, torch.tensor(True), torch.tensor([[0, 1], [1, 2]]), [1.7], "a"], ids=str)
def test_what_numbers_no_context_is_refused(index):
    with pytest.raises(TypeError, match="indexed by the numbers of contexts: one, a slice, or a list"):
        memory_of(3)[index]


def test_a_memory_takes_no_precision_and_is_joined_with_memories_alone():
    with pytest.raises(TypeError, match=r"keeps the precision .* torch.float16"):
        memory_of().to(torch.float16)
    with pytest.raises(TypeError, match="joins memories, got 'x'"):
        GradMemMemory.cat([memory_of(), "x"])


def test_iterating_over_a_memory_ends():
    memory = memory_of(3)
    assert_same(GradMemMemory.cat([*memory]), memory)


def test_joined_memories_pad_what_is_ragged():
    one, two = memory_of(1, steps=3, segments=1), memory_of(2, steps=1, segments=2, seed=5)
    joined = GradMemMemory.cat([one, two])
    assert torch.equal(joined.embeddings, torch.cat([one.embeddings, two.embeddings]))
    assert torch.equal(joined.write_losses[:1], one.write_losses)
    assert torch.equal(joined.write_losses[1:, :1], two.write_losses)
    assert joined.write_losses[1:, 1:].isnan().all()
    assert joined.segment_lengths.tolist() == [[*one.segment_lengths[0].tolist(), 0], *two.segment_lengths.tolist()]
    assert joined.num_context_tokens.tolist() == [*one.num_context_tokens.tolist(), *two.num_context_tokens.tolist()]
    assert joined.is_segmented.tolist() == [False, True, True]
    assert torch.equal(joined.final_write_loss, torch.cat([one.final_write_loss, two.final_write_loss]))
    unmeasured = memory_of(measured=False)
    assert GradMemMemory.cat([one, unmeasured]).final_write_loss is None
    assert GradMemMemory.cat([unmeasured, unmeasured], keep_measured=True).final_write_loss is None


def test_a_loss_that_was_measured_is_kept_beside_one_that_was_not_where_that_is_asked_for(tmp_path):
    one = memory_of(1)
    kept = GradMemMemory.cat([one, memory_of(measured=False)], keep_measured=True)
    assert torch.equal(kept.final_write_loss[:1], one.final_write_loss)
    assert kept.final_write_loss[1:].isnan().all()
    with pytest.raises(ValueError, match="final_write_loss is nan"):
        kept.save_pretrained(tmp_path)


def test_joined_memories_answer_as_each_alone(tmp_path):
    model = with_memory(named_base(tmp_path / "base").double(), **EVERY_OPTION)
    one, two = model.write(input_ids=tiny_tokens(1, 9)), model.write(input_ids=tiny_tokens(1, 5, seed=1))
    query = tiny_tokens(1, 4, seed=2)
    joined = model(input_ids=query.expand(2, -1), memory=GradMemMemory.cat([one, two])).logits
    for row, memory in enumerate((one, two)):
        torch.testing.assert_close(joined[row], model(input_ids=query, memory=memory).logits[0], rtol=0, atol=1e-6)


def test_memories_that_do_not_belong_together_are_not_joined():
    with pytest.raises(ValueError, match="at least one memory, got none"):
        GradMemMemory.cat([])
    with pytest.raises(ValueError, match=r"different fingerprints .* \['one', 'two'\]"):
        GradMemMemory.cat([memory_of(fingerprint="one"), memory_of(fingerprint="two")])
    wide = GradMemMemory(torch.zeros(1, 2, 6), torch.zeros(1, 2), torch.ones(1, 1).long(), fingerprint="one")
    with pytest.raises(ValueError, match=r"different shapes .* \['\(2, 4\)', '\(2, 6\)'\]"):
        GradMemMemory.cat([memory_of(fingerprint="one"), wide])


def test_moving_a_memory_moves_every_tensor_and_casts_none():
    memory = memory_of()
    moved = memory.to("meta")
    for name in ("embeddings", "write_losses", "segment_lengths", "final_write_loss"):
        assert getattr(moved, name).device.type == "meta"
        assert getattr(memory, name).device.type == "cpu"
    with pytest.raises((TypeError, RuntimeError)):
        memory.to(torch.bfloat16)


# ------------------------------------------------------------------------------------------------ as a value


def test_a_memory_is_shown_in_one_line_with_what_it_is():
    memory = memory_of(segments=2)
    memory.segment_lengths = torch.tensor([[3, 4], [9, 0], [5, 5]])
    assert repr(memory) == (
        "GradMemMemory(3 contexts, from 7 to 10 tokens, each in 2 positions of width 4, float32 on cpu, written by "
        "abc-123 on me/base)"
    )
    alone = replace(memory[1], fingerprint=None, base_name=None)
    assert repr(alone).startswith("GradMemMemory(1 context, from 9 tokens, ")
    assert repr(alone).endswith("written by None)")
    assert "0 contexts, each" in repr(memory[[]])
    assert "on meta" in repr(memory.to("meta"))
    assert memory.shape == (3, 2, 4)


def test_memories_are_equal_if_tensors_and_writer_are():
    memory = memory_of()
    memory.write_losses[1, 1] = torch.nan  # a sample that had stopped
    again = memory_of()
    again.write_losses[1, 1] = torch.nan
    assert (memory == again) is True
    assert (memory != again) is False
    assert memory == replace(again, base_name="another name for it")
    assert (memory == again.embeddings) is False
    changes = {
        "embeddings": memory.embeddings.nextafter(torch.tensor(9.0)),
        "write_losses": memory.write_losses.nan_to_num(0.0),
        "segment_lengths": memory.segment_lengths + 1,
        "final_write_loss": None,
        "fingerprint": "abc-124",
    }
    for name, value in changes.items():
        assert (memory == replace(again, **{name: value})) is False, name
    assert memory != memory.to("meta")
    assert memory[:2] != memory
    assert replace(memory, embeddings=memory.embeddings.double()) != memory
    with pytest.raises(TypeError, match="unhashable"):
        hash(memory)


def test_a_memory_comes_to_the_cpu():
    memory = memory_of()
    assert memory.cpu() == memory
    assert memory.cpu().embeddings.device.type == "cpu"
