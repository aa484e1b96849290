"""Queries: what is refused, and what the message says."""

import pytest
import torch

from tests.support.messages import says
from tests.support.small_models import PLAIN, nameless_base, small_tokenizer, with_memory
from tests.support.tiny_models import VOCAB_SIZE, tiny_tokens

CONTEXT, QUERY = tiny_tokens(2, 8, seed=1), tiny_tokens(2, 4, seed=2)


@pytest.fixture(scope="module")
def model():
    model = with_memory(nameless_base(), **PLAIN)
    model.tokenizer = small_tokenizer()
    return model


@pytest.fixture(scope="module")
def memory(model):
    return model.write(input_ids=CONTEXT)


def test_neither_memory_nor_context_or_both(model, memory):
    for read in (model, model.generate):
        with pytest.raises(ValueError, match="nothing to read from: give") as caught:
            read(input_ids=QUERY)
        assert all(name in str(caught.value) for name in ("context_input_ids", "a memory"))
        with pytest.raises(ValueError, match="either a memory or context_input_ids, and not both"):
            read(input_ids=QUERY, memory=memory, context_input_ids=CONTEXT)
        for name in ("context_attention_mask", "context_segment_ids"):
            with pytest.raises(ValueError, match=rf"not both; .*{name}"):
                read(input_ids=QUERY, memory=memory, **{name: torch.ones_like(CONTEXT)})
        with pytest.raises(ValueError, match=r"not both; .*write_steps"):
            read(input_ids=QUERY, memory=memory, write_steps=5)


def test_prompts_in_lists(model, memory):
    given = {"memory": memory, "max_new_tokens": 2}
    assert torch.equal(model.generate(QUERY.tolist(), **given), model.generate(QUERY, **given))
    with pytest.raises(ValueError, match=r"flat prompts .* got shape \(3,\)"):
        model.generate([20, 21, 22], **given)


def test_no_query(model, memory):
    for read in (model, model.generate):
        with pytest.raises(ValueError, match=says("nothing to read with", "input_ids")):
            read(memory=memory)
        with pytest.raises(ValueError, match="input_ids has no row"):
            read(input_ids=QUERY[:0], memory=memory[[]])


def test_something_other_than_a_memory(model, memory):
    with pytest.raises(TypeError, match="memory must be a GradMemMemory, got Tensor"):
        model(input_ids=QUERY, memory=memory.embeddings)


@pytest.mark.parametrize(("index", "found"), [([0, 2], "0..2"), ([-1, 0], "-1..0")])
def test_context_index_out_of_range(model, memory, index, found):
    for read in (model, model.generate):
        with pytest.raises(ValueError, match=says(f"context_index must lie in 0..1, got {found}")):
            read(input_ids=QUERY, memory=memory, context_index=torch.tensor(index))


def test_context_index_of_another_length_than_the_queries(model, memory):
    with pytest.raises(ValueError, match=says("one entry for each", "(3,)", "(2,)")):
        model(input_ids=QUERY, memory=memory, context_index=torch.tensor([0, 1, 0]))


def test_as_many_queries_as_nothing_else(model, memory):
    with pytest.raises(ValueError, match=says("2 memories for 3 rows", "context_index")):
        model(input_ids=tiny_tokens(3, 4), memory=memory)


@pytest.mark.parametrize("name", ["labels", "attention_mask"])
@pytest.mark.parametrize("shape", [(2, 3), (2, 1, 4), (1, 4)])
def test_labels_or_mask_of_another_shape_than_the_query(model, memory, name, shape):
    expected = says(f"{name} must have the shape of its input_ids, (2, 4), got {shape}")
    with pytest.raises(ValueError, match=expected):
        model(input_ids=QUERY, memory=memory, **{name: torch.ones(shape, dtype=torch.long)})


def test_several_queries_on_each_memory_in_generate(model, memory):
    with pytest.raises(ValueError, match=says("flat prompts", "(2, 2, 4)", "context_index")):
        model.generate(input_ids=tiny_tokens(4, 4).view(2, 2, 4), memory=memory)


@pytest.mark.parametrize("max_length", [3, 4])
def test_max_length_that_leaves_no_room(model, memory, max_length):
    expected = says(f"max_length={max_length} leaves no room after a prompt of 4 tokens", "max_new_tokens")
    with pytest.raises(ValueError, match=expected):
        model.generate(input_ids=QUERY, memory=memory, max_length=max_length)


@pytest.mark.parametrize("index", [torch.tensor([0.0, 1.0]), torch.tensor([False, True])], ids=["floating", "booleans"])
def test_context_index_that_is_no_index(model, memory, index):
    for read in (model, model.generate):
        with pytest.raises(ValueError, match=says("context_index must be whole numbers", f"got {index.dtype}")):
            read(input_ids=QUERY, memory=memory, context_index=index)


@pytest.mark.parametrize("dtype", [torch.int16, torch.uint8, torch.int32])
def test_ids_labels_and_indices_of_any_whole_numbers_are_taken(model, memory, dtype):
    index = torch.tensor([1, 0])
    expected = model(input_ids=QUERY, labels=QUERY, memory=memory, context_index=index)
    output = model(input_ids=QUERY.to(dtype), labels=QUERY.to(dtype), memory=memory, context_index=index.to(dtype))
    assert torch.equal(output.logits, expected.logits)
    assert output.loss == expected.loss


def test_labels_of_floating_point(model, memory):
    with pytest.raises(ValueError, match=says("labels must be whole numbers, got torch.float32")):
        model(input_ids=QUERY, labels=QUERY.float(), memory=memory)


def test_mask_that_is_added_to_scores(model, memory):
    with pytest.raises(ValueError, match=says("attention_mask must be 1 at tokens and 0", "got torch.float32")):
        model(input_ids=QUERY, attention_mask=torch.zeros(QUERY.shape), memory=memory)


@pytest.mark.parametrize("token", [VOCAB_SIZE, -1])
def test_token_that_the_base_does_not_have(model, memory, token):
    query = QUERY.clone()
    query[0, 1] = token
    for read in (model, model.generate):
        with pytest.raises(ValueError, match=says(f"input_ids must lie in 0..{VOCAB_SIZE - 1}", f"{token}")):
            read(input_ids=query, memory=memory)


@pytest.mark.parametrize("token", [VOCAB_SIZE, -1])
def test_label_that_the_base_does_not_have(model, memory, token):
    labels = QUERY.clone()
    labels[0, :2] = torch.tensor([-100, token])
    with pytest.raises(ValueError, match=says(f"labels must lie in 0..{VOCAB_SIZE - 1}", f"{token}")):
        model(input_ids=QUERY, labels=labels, memory=memory)
