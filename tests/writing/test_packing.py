"""Segments of one context in one row: what is written is what rows of their own write."""

import pytest
import torch
from torch import distributed

from hf_gradmem import GradMemConfig, GradMemForCausalLM, get_gradmem_model
from hf_gradmem.writing.contexts import Contexts
from hf_gradmem.writing.packing import pack_segments
from hf_gradmem.writing.rows import ContextRows, split_context
from tests.support.tiny_models import tiny_causal_lm, tiny_tokens

IDS = tiny_tokens(3, 14)
SEGMENT_IDS = torch.tensor([[0] * 3 + [1] * 4 + [2] * 5 + [3] * 2, [0] * 7 + [1] * 7, [0] * 2 + [1] + [2] * 11])
MASK = torch.ones_like(IDS)
MASK[0, :3], MASK[1, 10:] = 0, 0
CONTEXT = {"input_ids": IDS, "attention_mask": MASK, "segment_ids": SEGMENT_IDS}


def with_repeated_memory(model: GradMemForCausalLM) -> GradMemForCausalLM:
    model.decoder.keeps_segments_apart = lambda *lengths: False
    return model


def run(model: GradMemForCausalLM) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """The memory that is written, and the meta-gradient of everything."""
    model.requires_grad_(True).zero_grad()
    memory = model.write(**CONTEXT).embeddings
    inputs = {f"context_{name}": value for name, value in CONTEXT.items()}
    model(input_ids=IDS[:, :4], labels=IDS[:, :4], **inputs).loss.backward()
    return memory, {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def packed(model: GradMemForCausalLM) -> ContextRows:
    """The rows that WRITE runs on."""
    return model.writer.objective(model.writer.rows(Contexts(IDS, MASK.bool(), SEGMENT_IDS))).rows


def settings(**changes) -> GradMemConfig:
    defaults = {"num_memory_tokens": 3, "write_steps": 2, "write_learning_rate": 0.3, "write_prefix_segments": 0}
    return GradMemConfig(**defaults | changes)


@pytest.mark.parametrize("meta_gradient", ["exact", "finite_difference"])
@pytest.mark.parametrize(
    ("model_type", "attn_implementation"),  # those whose attention keeps float64
    [("gpt2", "eager"), ("gpt2", "sdpa"), ("gpt_neox", "sdpa"), ("opt", "sdpa"), ("falcon", "eager")],
)
def test_memories_and_gradients_are_those_of_rows_of_their_own(model_type, meta_gradient, attn_implementation):
    results = []
    for repeated in (False, True):
        torch.manual_seed(0)
        base = tiny_causal_lm(model_type)
        base.set_attn_implementation(attn_implementation)
        changes = {"num_control_tokens": 1, "write_head": True} if model_type == "gpt2" else {}
        model = get_gradmem_model(base, settings(meta_gradient=meta_gradient, **changes))
        results.append(run(with_repeated_memory(model) if repeated else model))
        if not repeated:
            assert packed(model).segment_starts is not None
    (memory, gradients), (expected_memory, expected_gradients) = results
    torch.testing.assert_close(memory, expected_memory, rtol=1e-9, atol=1e-12)
    assert gradients.keys() == expected_gradients.keys()
    for name, expected in expected_gradients.items():
        torch.testing.assert_close(gradients[name], expected, rtol=1e-6, atol=1e-9, msg=name)


@pytest.mark.parametrize(
    "model_type",
    ["mamba", "bloom", "mistral"],
    ids=["mixes neighbours", "places by distance in the row", "window shorter than a row"],
)
def test_bases_that_do_not_keep_segments_apart_get_rows_of_their_own(model_type):
    model = get_gradmem_model(tiny_causal_lm(model_type), settings())
    rows = packed(model)
    assert rows.segment_starts is None
    assert len(rows.input_ids) == 8


def test_each_row_holds_one_context_and_no_more_than_its_length():
    rows = split_context(IDS, MASK, SEGMENT_IDS, prefix_segments=0)
    row = pack_segments(rows, prefix_length=3, longest=11)
    assert row.sample_index.tolist() == [0, 1, 2, 2]  # 11 tokens; 7 and 3; 3, and 11 that do not fit beside them
    assert row.attention_mask.sum(1).tolist() == [11, 10, 3, 11]
    assert torch.equal(row.targets, rows.targets)
    assert row.segment_starts[0].tolist() == [0] * 4 + [4] * 5 + [9] * 2
    assert row.segment_starts[1].tolist() == [0] * 7 + [7] * 3 + [10]  # padding by itself


@pytest.mark.parametrize("segment_ids", [None, torch.arange(3)[:, None].expand(3, 14)], ids=["whole", "one each"])
def test_what_packing_does_not_shorten_is_left_alone(segment_ids):
    rows = split_context(IDS, MASK, segment_ids, prefix_segments=0)
    assert pack_segments(rows, prefix_length=3, longest=256) is rows


def test_segments_longer_than_a_row_are_left_alone():
    rows = split_context(IDS, MASK, SEGMENT_IDS, prefix_segments=0)
    assert pack_segments(rows, prefix_length=3, longest=10) is rows


def test_the_probe_needs_no_logits_and_keeps_no_verdict_of_a_full_memory(monkeypatch):
    model = get_gradmem_model(tiny_causal_lm("gpt2"), settings())
    decoder = model.base_model.get_decoder()
    monkeypatch.setattr(model.get_output_embeddings(), "forward", None)
    plain = decoder.forward

    def fail(*arguments, **options):
        raise torch.OutOfMemoryError("CUDA out of memory.")

    monkeypatch.setattr(decoder, "forward", fail)
    with pytest.raises(torch.OutOfMemoryError):
        model.decoder.keeps_segments_apart(3, 16)
    monkeypatch.setattr(decoder, "forward", plain)
    assert model.decoder.keeps_segments_apart(3, 16)


def test_several_processes_probe_whatever_their_rows(monkeypatch):
    """On a sharded base a run of one process alone waits for the others for ever."""
    model = get_gradmem_model(tiny_causal_lm("gpt2"), settings())
    asked = []
    monkeypatch.setattr(model.decoder, "keeps_segments_apart", lambda *lengths: asked.append(lengths) or True)
    whole = model.writer.rows(Contexts(IDS, MASK.bool(), None))
    assert model.writer.objective(whole).rows is whole
    assert asked == []
    monkeypatch.setattr(distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(distributed, "get_world_size", lambda: 2)
    assert model.writer.objective(whole).rows is whole
    assert len(asked) == 1


def test_a_prefix_before_the_memory_forbids_packing():
    model = get_gradmem_model(tiny_causal_lm("gpt2"), settings(write_prefix_segments=1))
    assert packed(model).segment_starts is None
