"""The adapters that are published: each still loads, writes the memory it wrote and gives the answers it gave.

`published.json` was recorded before the package was laid out in folders (commit 90e6442), on one CPU thread: for each
adapter two contexts of its task that it was not trained on, the memories' norms and greedy answers, one token longer
than the targets. Adapters that came later, or were trained on, were recorded then. Those that bring their base
are here; the one on SmolLM2 is asked in tests/cli/test_demo.py.
"""

import json
from pathlib import Path

import pytest
import torch

from hf_gradmem import GradMemConfig, GradMemForCausalLM
from hf_gradmem.evaluation import answer_queries

ROOT = Path(__file__).parents[2]
RECORDED = json.loads(Path(__file__).with_name("published.json").read_text(encoding="utf-8"))


def folders_with_a_base() -> list[str]:
    found = [*ROOT.glob("hf_gradmem/pretrained/*/"), *ROOT.glob("model_cards/*/")]
    found = [path for path in found if (path / "model.safetensors").exists()]
    return sorted(
        path.relative_to(ROOT).as_posix() for path in found if GradMemConfig.from_pretrained(path).includes_base
    )


def test_every_published_adapter_was_recorded():
    assert sorted(RECORDED) == folders_with_a_base()


@pytest.mark.parametrize("name", RECORDED)
def test_published_adapter_answers_as_it_did(name):
    model, rows = GradMemForCausalLM.from_pretrained(ROOT / name), RECORDED[name]
    memory = model.write([row["context"] for row in rows])
    norms = torch.linalg.vector_norm(memory.embeddings.double(), dim=(1, 2)).tolist()
    assert norms == pytest.approx([row["memory_norm"] for row in rows], rel=1e-4)
    for index, row in enumerate(rows):
        about = [index] * len(row["queries"])
        assert answer_queries(model, memory, row["queries"], about, row["max_new_tokens"]) == row["answers"]
