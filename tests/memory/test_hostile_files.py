"""Memory files that say what no memory can: each is refused in one line, and none is believed."""

import random

import pytest
import torch
from safetensors.torch import load_file, save_file

from hf_gradmem import GradMemMemory
from tests.support.stores import corrupted, memory_of

FILE = "memory.safetensors"
HEADER = {"format": "gradmem-memory", "format_version": "2", "fingerprint": '"abc-123"', "base_name": '"me/base"'}
FLOATS = "float64 or float32 or float16 or bfloat16"
SHAPE_OF = {
    "embeddings": r"\(batch, num_memory_tokens, hidden_size\)",
    "write_losses": r"\(batch, steps\)",
    "segment_lengths": r"\(batch, segments\)",
    "final_write_loss": r"\(batch,\)",
}


def with_value(name: str, place: tuple[int, ...], value: float) -> torch.Tensor:
    tensor = getattr(memory_of(), name).clone()
    tensor[place] = value
    return tensor


HOSTILE = [
    # name, tensor, what the message says of the value and of what belongs there
    ("segment_lengths", with_value("segment_lengths", (1, 0), 2**40), rf"holds {2**40}.*0 to 2,147,483,647"),
    ("segment_lengths", with_value("segment_lengths", (1, 0), -3), r"holds -3.*0 to 2,147,483,647"),
    ("segment_lengths", torch.full((3, 2), 2**31 - 1), r"of memory 0 come to 4294967294.*1 to 2,147,483,647"),
    ("segment_lengths", torch.full((3, 4), 2**62), rf"holds {2**62}.*0 to"),
    ("segment_lengths", torch.tensor([[1, 2], [0, 0], [3, 4]]), r"of memory 1 come to 0.*1 to"),
    ("segment_lengths", torch.ones(3, 2), r"is of float32, where int64 belongs"),
    ("segment_lengths", torch.ones(3, 2, dtype=torch.bool), r"is of bool, where int64 belongs"),
    ("segment_lengths", torch.ones(3, dtype=torch.long), r"\(3,\), where " + SHAPE_OF["segment_lengths"]),
    ("segment_lengths", torch.ones((3, 0), dtype=torch.long), r"\(3, 0\), where " + SHAPE_OF["segment_lengths"]),
    ("segment_lengths", torch.ones((2, 1), dtype=torch.long), r"has 2 rows, where one for each of the 3"),
    ("embeddings", with_value("embeddings", (1, 0, 2), torch.nan), r"is nan at \[1, 0, 2\].*a finite number"),
    ("embeddings", with_value("embeddings", (2, 1, 3), torch.inf), r"is inf at \[2, 1, 3\].*a finite number"),
    ("embeddings", torch.zeros(3, 2, 4, dtype=torch.int32), rf"is of int32, where {FLOATS}"),
    ("embeddings", torch.zeros(3, 2, 4, dtype=torch.complex64), rf"is of complex64, where {FLOATS}"),
    ("embeddings", torch.zeros(3, 8), r"\(3, 8\), where " + SHAPE_OF["embeddings"]),
    ("embeddings", torch.zeros(()), r"\(\), where " + SHAPE_OF["embeddings"]),
    ("embeddings", torch.zeros(3, 0, 4), r"\(3, 0, 4\), where " + SHAPE_OF["embeddings"]),
    ("embeddings", torch.zeros(3, 2, 0), r"\(3, 2, 0\), where " + SHAPE_OF["embeddings"]),
    ("write_losses", with_value("write_losses", (0, 0), -torch.inf), r"is -inf at \[0, 0\].*a finite number"),
    ("write_losses", torch.zeros(4, 2), r"has 4 rows, where one for each of the 3"),
    ("write_losses", torch.zeros(3), r"\(3,\), where " + SHAPE_OF["write_losses"]),
    ("write_losses", torch.zeros(3, 2, dtype=torch.uint8), rf"is of uint8, where {FLOATS}"),
    ("final_write_loss", with_value("final_write_loss", (2,), torch.nan), r"is nan at \[2\].*a finite number"),
    ("final_write_loss", torch.zeros(3, 1), r"\(3, 1\), where " + SHAPE_OF["final_write_loss"]),
    ("final_write_loss", torch.zeros(1), r"has 1 rows, where one for each of the 3"),
]


@pytest.mark.parametrize(("name", "tensor", "said"), HOSTILE, ids=[f"{row[0]}-{n}" for n, row in enumerate(HOSTILE)])
def test_a_tensor_that_write_cannot_have_left_is_refused_by_name(tmp_path, name, tensor, said):
    memory_of().save_pretrained(tmp_path)
    path = tmp_path / FILE
    save_file(load_file(path) | {name: tensor}, path, metadata=HEADER)
    with pytest.raises(ValueError, match=rf"^{path} is broken: .*{name}.* {said}.*(Copy it again|write the)") as caught:
        GradMemMemory.from_pretrained(path)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", ["fingerprint", "base_name"])
@pytest.mark.parametrize("value", ["7", '["a"]', "{}", "not JSON", "", "[" * 100_000], ids=lambda value: value[:9])
def test_a_fact_of_the_header_that_is_no_text_is_refused(tmp_path, name, value):
    memory_of().save_pretrained(tmp_path)
    path = tmp_path / FILE
    save_file(load_file(path), path, metadata=HEADER | {name: value})
    with pytest.raises(ValueError, match=rf'{path} is broken: {name} in its header is .*, where a "text" or null'):
        GradMemMemory.from_pretrained(path)


@pytest.mark.parametrize(("name", "tensor", "said"), [HOSTILE[0], HOSTILE[10], HOSTILE[24]], ids=str)
def test_what_could_not_be_read_again_is_not_saved(tmp_path, name, tensor, said):
    memory = memory_of()
    setattr(memory, name, tensor)
    with pytest.raises(ValueError, match=said):
        memory.save_pretrained(tmp_path / "new")
    assert not (tmp_path / "new").exists()


# ------------------------------------------------------------------------------------------------ by chance

CORRUPTIONS = 400


def test_a_file_with_chance_damage_reads_as_a_memory_or_is_refused(tmp_path):
    memory_of().save_pretrained(tmp_path)
    path, chance, read, refusals = tmp_path / FILE, random.Random(0), 0, []
    whole = path.read_bytes()
    for _ in range(CORRUPTIONS):
        path.write_bytes(corrupted(whole, chance))
        try:
            memory = GradMemMemory.from_pretrained(path)
        except (ValueError, OSError) as error:
            refusals.append(str(error))
            continue
        read += 1
        memory.save_pretrained(tmp_path / "again")
        again = GradMemMemory.from_pretrained(tmp_path / "again")
        for name, tensor in memory.tensors.items():
            torch.testing.assert_close(again.tensors[name], tensor, rtol=0, atol=0, equal_nan=True)
        assert (again.fingerprint, again.base_name) == (memory.fingerprint, memory.base_name)
    assert all(str(path) in refusal for refusal in refusals)
    assert 0 < read < CORRUPTIONS // 2  # numbers that are other numbers are nobody's to see
