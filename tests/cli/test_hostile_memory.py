"""Memory files that say what no memory can, given to the commands."""

from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from tests.support.command_line import mistake, run

FILE = "memory.safetensors"


def edited(directory: str, target: Path, **tensors: torch.Tensor) -> Path:
    source = Path(directory) / FILE
    with safe_open(source, framework="pt") as file:
        header = file.metadata()
    target.mkdir()
    save_file(load_file(source) | tensors, target / FILE, metadata=header)
    return target


def test_the_commands_refuse_a_hostile_memory_in_one_line(base, memory, tmp_path):
    held = load_file(Path(memory) / FILE)
    long = edited(memory, tmp_path / "long", segment_lengths=torch.tensor([[2**40]]))
    broken = edited(memory, tmp_path / "nan", embeddings=torch.full_like(held["embeddings"], torch.nan))
    for directory, said in ((long, f"holds {2**40}"), (broken, "embeddings is nan at [0, 0, 0]")):
        for arguments in (["inspect", directory], ["ask", "?", "--memory", directory, "--model", base]):
            assert said in mistake(run(*arguments))


def test_a_memory_longer_than_the_base_is_not_decoded(base, memory, tmp_path):
    beyond = edited(memory, tmp_path / "beyond", segment_lengths=torch.tensor([[1000]]))
    said = mistake(run("inspect", beyond, "--model", base))
    assert "decode 1,000 tokens" in said
    assert "the window of LlamaForCausalLM is 256" in said
    # Where a base has no window, or a wide one, decoding so much is not begun.
    endless = edited(memory, tmp_path / "endless", segment_lengths=torch.tensor([[2**31 - 1]]))
    shown = run("inspect", endless, "--model", base)
    assert shown.exit_code == 0
    assert "not shown: it was written from more than 4,096 tokens" in shown.stdout
