"""Memories and stores made by hand, whole ones that tests then break."""

import json
import random
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset

from hf_gradmem import GradMemMemory
from hf_gradmem.memory.shards import as_columns, features, shard_name

SHAPE = (2, 4)
IDS = ["a", "b", "c"]


def memory_of(batch: int = 3) -> GradMemMemory:
    """Memories of two segments and two steps, of which the first did not take its second."""
    generator = torch.Generator().manual_seed(0)
    losses = torch.rand((batch, 2), generator=generator)
    losses[0, 1] = torch.nan
    return GradMemMemory(
        embeddings=torch.randn((batch, *SHAPE), generator=generator),
        write_losses=losses,
        segment_lengths=torch.randint(1, 9, (batch, 2), generator=generator),
        final_write_loss=torch.rand((batch,), generator=generator),
        fingerprint="abc-123",
        base_name="me/base",
    )


def facts_of(ids: list[str] = IDS, shard_size: int = 2) -> dict[str, Any]:
    return {
        "format": "gradmem-memories",
        "format_version": 2,
        "fingerprint": "abc-123",
        "base_name": "me/base",
        "num_memory_tokens": SHAPE[0],
        "hidden_size": SHAPE[1],
        "dtype": "float32",
        "num_rows": len(ids),
        "num_shards": -(-len(ids) // shard_size),
        "shard_size": shard_size,
    }


def save_store(directory: Path, memory: GradMemMemory | None = None, ids: list[str] = IDS) -> Path:
    """A store of two shards, as `write_dataset` leaves it but for the card."""
    memory = memory_of(len(ids)) if memory is None else memory
    facts = facts_of(ids)
    (directory / "data").mkdir(parents=True)
    (directory / "memories.json").write_text(json.dumps(facts), encoding="utf-8")
    for index in range(facts["num_shards"]):
        rows = slice(index * facts["shard_size"], (index + 1) * facts["shard_size"])
        columns = features(*SHAPE, "float32")
        shard = Dataset.from_dict(as_columns(ids[rows], memory[rows]), features=columns)
        shard.to_parquet(directory / shard_name(index, facts["num_shards"]))
    return directory


def corrupted(whole: bytes, chance: random.Random) -> bytes:
    """A file with bytes changed, removed, added or repeated, at its ends more often than in between, or its digits."""
    data = bytearray(whole)
    digits = [place for place, byte in enumerate(whole) if chr(byte).isdigit()]
    for _ in range(chance.choice([1, 1, 1, 2, 8])):
        if not data:
            break
        span = min(len(data), chance.choice([8, 256, len(data)]))
        place = chance.randrange(span)
        if chance.random() < 0.3:
            place = len(data) - 1 - place
        what = chance.randrange(5)
        if what == 0:
            data[place] = chance.randrange(256)
        elif what == 1:
            del data[place : place + chance.choice([1, 4, 40])]
        elif what == 2:
            data[place:place] = bytes(chance.choices(range(256), k=chance.choice([1, 8])))
        elif what == 3:  # shapes, offsets, counts
            data[min(chance.choice(digits or [0]), len(data) - 1)] = ord(str(chance.randrange(10)))
        else:
            data[place : place + 16] = chance.choice([2 * data[place : place + 16], b"\xff" * 16, bytes(16)])
    return bytes(data)
