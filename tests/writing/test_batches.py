"""Contexts of unequal length: batched by length, given back in their order, each as if written alone."""

import pytest
import torch
from torch._dynamo.utils import counters
from torch.nn import functional

from hf_gradmem.writing import rows as context_rows
from tests.support.tiny_models import tiny_tokens
from tests.support.writing import LENGTHS, MASK, build, rows_of


@pytest.mark.parametrize("settings", [{}, {"write_segment_length": 4}], ids=["whole", "segments"])
@pytest.mark.parametrize("batch_size", [1, 2, None])
def test_contexts_of_any_length_come_back_in_their_order(batch_size, settings, monkeypatch):
    model, ids = build(**settings), tiny_tokens(5, 9)
    apart = [model.write(input_ids=ids[row : row + 1, : LENGTHS[row]]) for row in range(5)]
    if batch_size is None:
        monkeypatch.setattr(context_rows, "_PADDING_WORTH_A_RUN", 2)
    together = model.write(input_ids=ids, attention_mask=MASK, batch_size=batch_size)
    assert together.num_context_tokens.tolist() == LENGTHS.tolist()
    for row, alone in enumerate(apart):
        torch.testing.assert_close(together.embeddings[row], alone.embeddings[0], rtol=1e-6, atol=1e-8)
        torch.testing.assert_close(together.write_losses[row], alone.write_losses[0], rtol=1e-6, atol=1e-8)
    further = model.write(input_ids=ids, attention_mask=MASK, batch_size=batch_size, memory=together)
    first = model.write(input_ids=ids[:1, :3], memory=together[0])
    torch.testing.assert_close(further.embeddings[0], first.embeddings[0], rtol=1e-6, atol=1e-8)


def test_like_lengths_share_a_run():
    """Rows are cut into groups where it spares padding, and every row is in one of them."""
    model = build()
    rows = rows_of(model)
    assert rows.grouped_by_length() == [rows]
    groups = rows.take(torch.arange(5)), *(rows.take(torch.tensor([row])) for row in range(5))
    assert [part.input_ids.shape[1] for part in groups] == [9, *LENGTHS.tolist()]


def test_a_context_that_diverges_is_named_by_its_place():
    model = build(write_learning_rate=1e300, write_steps=3)
    with pytest.raises(FloatingPointError, match="context 0"):
        model.write(input_ids=tiny_tokens(5, 9), attention_mask=MASK)


def test_half_precision_base_with_memory_and_step_in_float32():
    ids = tiny_tokens(5, 9)
    model = build(dtype=torch.bfloat16, write_steps=1, write_learning_rate=1e-4)
    memory = model.write(input_ids=ids, attention_mask=MASK).embeddings
    assert memory.dtype == torch.float32
    moved = memory - model.memory_init
    assert moved.any(dim=2).all()  # a step this small would vanish in bfloat16's eight bits
    exact = build(dtype=torch.float32, write_steps=1, write_learning_rate=1e-4)
    exact.load_state_dict(model.state_dict())
    expected = exact.write(input_ids=ids, attention_mask=MASK).embeddings - exact.memory_init
    assert functional.cosine_similarity(moved.flatten(1), expected.flatten(1)).min() > 0.99


@pytest.mark.slow
def test_a_compiled_decoder_writes_any_length_with_one_graph():
    model = build(dtype=torch.float32)
    contexts = [tiny_tokens(2, length) for length in (9, 5, 7)]
    expected = [model.write(input_ids=ids).embeddings for ids in contexts]
    torch._dynamo.reset()
    counters.clear()
    model.get_decoder().compile(dynamic=True, backend="aot_eager")
    for ids, wanted in zip(contexts, expected, strict=True):
        torch.testing.assert_close(model.write(input_ids=ids).embeddings, wanted)
    assert counters["stats"]["unique_graphs"] == 1
