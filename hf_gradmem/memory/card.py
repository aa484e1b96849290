"""The cards of memories that are shared by themselves, beside no model: of one, and of a store of many."""

import json
from collections.abc import Mapping, Sequence
from typing import Any

from huggingface_hub import ModelCard, ModelCardData

from ..hub.cards import MARK, is_own_card

_MEMORY_TAG = "gradmem-memory"
_SHOWN_LENGTHS = 10
_STORE = """---
tags:
- gradmem
configs:
- config_name: default
  data_files: data/train-*.parquet
---

{mark}

# Memories

{num_rows} contexts, each written into {num_memory_tokens} vectors of width {hidden_size} ({dtype}) by {writers}.

With the `hf_gradmem` package installed (in a clone of its code: `pip install .`; it is not on PyPI):

```python
from hf_gradmem import MemoryStore

store = MemoryStore.from_pretrained("{repo_id}")
memory = store[{first_id}]
```

Models with the fingerprint of what wrote them read them, and no other: `{fingerprint}`.
The contexts can be decoded from their memories in part or in whole: treat these as you would treat the texts.
"""


def memory_card(
    shape: Sequence[int],
    num_bytes: int,
    num_context_tokens: Sequence[int],
    fingerprint: str | None,
    base_name: str | None,
    repo_id: str,
) -> ModelCard:
    """The card of shared memories: how many, how large, of which model.

    Args:
        shape: `(batch, num_memory_tokens, hidden_size)`, of all memories.
        num_bytes: of all of their vectors.
        num_context_tokens: tokens written into each.
        fingerprint: of what wrote them.
        base_name: its base, for people to read.
        repo_id: the repository, for the card's title and code.
    """
    count, vectors, width = shape
    tokens = ", ".join(f"{int(length):,}" for length in num_context_tokens[:_SHOWN_LENGTHS])
    lines = [
        MARK,
        f"# {repo_id.rsplit('/', 1)[-1]}",
        f"{count} context{'s' * (count != 1)}, written into {vectors} vectors of width {width} "
        f"{'each ' * (count != 1)}by WRITE ([GradMem](https://arxiv.org/abs/2603.13875)): "
        f"{num_bytes:,} bytes.",
        f"- tokens written: {tokens}{', ...' * (count > _SHOWN_LENGTHS)}",
        f"- written by: `{fingerprint}`{f' on {base_name}' if base_name else ''}. Models of that fingerprint read "
        "them, and no other.",
        "With the `hf_gradmem` package installed (in a clone of its code: `pip install .`; it is not on PyPI):",
        "```python\nfrom hf_gradmem import GradMemMemory\n\n"
        f'memory = GradMemMemory.from_pretrained("{repo_id}")\n```\n',
    ]
    data = ModelCardData(library_name="transformers", tags=["gradmem", _MEMORY_TAG, "arxiv:2603.13875"])
    return ModelCard(f"---\n{data.to_yaml()}\n---\n\n" + "\n\n".join(lines))


def is_memory_card(text: str) -> bool:
    """Whether a card is one that [`memory_card`] wrote: it does not replace the card of a model beside the memory."""
    return is_own_card(text) and _MEMORY_TAG in text


def store_card(facts: Mapping[str, Any], first_id: str, repo_id: str) -> str:
    """The card of a store, as a data set on the Hub has it.

    Args:
        facts: of the store: those of one that was put together name its writers in their `parts`.
        first_id: the id of a memory, for the code.
        repo_id: the repository, for the code.
    """
    names = dict.fromkeys(part.get("model") for part in facts.get("parts", [facts]))
    writers = " and ".join(f"`{name}`" for name in names if name is not None) or "a model without a name"
    return _STORE.format(
        **facts, mark=MARK, writers=writers, first_id=json.dumps(first_id, ensure_ascii=False), repo_id=repo_id
    )
