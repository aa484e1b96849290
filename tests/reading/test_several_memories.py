"""Several memories for one query: against what is put together by hand, in either form."""

import pytest
import torch
from transformers import DynamicCache

from hf_gradmem import GradMemConfig, GradMemMemory, get_gradmem_model
from tests.support.small_models import EVERY_OPTION, small_tokenizer, with_memory
from tests.support.tiny_models import tiny_causal_lm, tiny_tokens

VALUES = {"name": "key_values", "write": "values"}
FORMS = ["input_vectors", "key_values", VALUES]
ALL_FORMS = pytest.mark.parametrize("form", FORMS, ids=["vectors", "both", "values"])
CLOSE = {"rtol": 1e-5, "atol": 1e-5}  # rotations are float32


def model_of(form, **options):
    settings = {"num_memory_tokens": 3, "write_steps": 2, "write_learning_rate": 3.0, "memory_form": form}
    return with_memory(tiny_causal_lm("llama"), **settings | options)


def written(model) -> tuple[GradMemMemory, GradMemMemory]:
    """Two memories of two contexts each, of other lengths."""
    return tuple(model.write(input_ids=tiny_tokens(2, size), measure_final_loss=True) for size in (5, 9))


@torch.no_grad()
def test_input_vectors_stand_in_their_order_between_the_control_vectors():
    model = with_memory(tiny_causal_lm("llama"), **EVERY_OPTION)
    query, (one, other) = tiny_tokens(2, 4), written(model)
    embed, control = model.base_model.get_input_embeddings(), (model.read_start, model.read_end)
    start, end = (vectors.expand(2, -1, -1) for vectors in control)
    parts = [start, *(model.memory_projection(memory.embeddings) for memory in (one, other)), end, embed(query)]
    with model.read_phase.active():
        expected = model.base_model(inputs_embeds=torch.cat(parts, dim=1)).logits[:, -4:]
    torch.testing.assert_close(model(input_ids=query, memory=[one, other]).logits, expected, **CLOSE)


@pytest.mark.parametrize("form", FORMS[1:], ids=["both", "values"])
@torch.no_grad()
def test_keys_and_values_stand_in_the_cache_one_behind_the_other(form):
    model = model_of(form)
    query, (one, other) = tiny_tokens(2, 4), written(model)
    pasts = [model.form.prefix(memory.embeddings, None, None).past for memory in (one, other)]
    past = tuple(
        tuple(torch.cat(tensors, dim=2) for tensors in zip(*pairs, strict=True)) for pairs in zip(*pasts, strict=True)
    )
    behind = model.memory_init[-1:].expand(2, -1, -1)
    embeddings = torch.cat([behind, model.base_model.get_input_embeddings()(query)], dim=1)
    output = model.base_model(inputs_embeds=embeddings, past_key_values=DynamicCache(past))
    given = model(input_ids=query, memory=[one, other]).logits
    torch.testing.assert_close(given, output.logits[:, -4:], **CLOSE)


@ALL_FORMS
def test_what_is_generated_is_what_the_forward_pass_finds_most_likely(form):
    model = model_of(form)
    model.tokenizer = small_tokenizer()
    one, other = (memory[0] for memory in written(model))
    tokens = query = tiny_tokens(1, 4)
    for _ in range(5):
        with torch.no_grad():
            tokens = torch.cat([tokens, model(input_ids=tokens, memory=[one, other]).logits[:, -1:].argmax(-1)], dim=1)
    generated = model.generate(query, memory=[one, other], max_new_tokens=5, do_sample=False, eos_token_id=None)
    assert torch.equal(generated, tokens)
    together = GradMemMemory.side_by_side([one, other])
    assert model.answer("who", memory=[one, other]) == model.answer("who", memory=together)
    alone = model.answer("who", memory=one)[0].log_prob
    assert model.answer("who", memory=(one, other))[0].log_prob != pytest.approx(alone, abs=1e-6)


@ALL_FORMS
@torch.no_grad()
def test_each_row_reads_its_own_memories(form):
    model = model_of(form)
    query, (one, other) = tiny_tokens(2, 4), written(model)
    together = model(input_ids=query, memory=[one, other]).logits
    for row in range(2):
        alone = model(input_ids=query[row : row + 1], memory=[one[row], other[row]]).logits
        torch.testing.assert_close(together[row : row + 1], alone, **CLOSE)
    torch.testing.assert_close(model(input_ids=query, memory=[one]).logits, model(input_ids=query, memory=one).logits)


def test_what_was_written_is_told_of_all_together():
    one, other = written(model_of("input_vectors"))
    both = GradMemMemory.side_by_side([one, other])
    assert both.num_context_tokens.tolist() == [14, 14]
    torch.testing.assert_close(both.final_write_loss, (one.final_write_loss + other.final_write_loss) / 2)
    torch.testing.assert_close(both.write_losses, (one.write_losses + other.write_losses) / 2)
    assert torch.equal(both.embeddings, torch.cat([one.embeddings, other.embeddings], dim=1))


def test_what_cannot_be_read_together_is_refused(monkeypatch):
    model = model_of("input_vectors")
    query, (one, other) = tiny_tokens(1, 4), written(model)
    foreign = other.relabelled("0" * 12 + "-" + "0" * 12)
    for memories, message in (
        ([one, other[0]], r"as many contexts each, got \[2, 1\]"),
        ([one, foreign], "different fingerprints cannot be joined"),
        ([foreign, foreign], "memory was written by"),
        ([], "at least one memory"),
    ):
        with pytest.raises(ValueError, match=message):
            model.generate(query, memory=memories)
    with pytest.raises(TypeError, match=r"a list of them, got a str in it"):
        model.generate(query, memory=[one, "other"])
    both = GradMemMemory.side_by_side([one, other])
    for memory, message in ((both, "memory is 2 memories side by side, 6 vectors"), (foreign, "was written by")):
        with pytest.raises(ValueError, match=message):  # WRITE goes on from one alone
            model.write(input_ids=tiny_tokens(2, 5), memory=memory)
    with pytest.raises(ValueError, match=r"memory has 6 vectors of width .* written by another model"):
        model.write(input_ids=tiny_tokens(2, 5), memory=GradMemMemory.side_by_side([foreign, foreign]))
    model.base_model.config.max_position_embeddings = 9
    with pytest.raises(ValueError, match=r"3 memories together take 9 positions of the 9"):
        model.generate(query, memory=[one[0]] * 3)
    monkeypatch.setattr(type(model.form), "reads_several", False)
    with pytest.raises(ValueError, match=r"form InputVectors are read one at a time, got 2"):
        model.generate(query, memory=[one[0], other[0]])


def test_keys_and_values_that_a_sliding_window_cuts_are_refused_together():
    model = with_memory(tiny_causal_lm("mistral"), num_memory_tokens=3, memory_form="key_values")
    query, one = tiny_tokens(1, 4), model.write(input_ids=tiny_tokens(1, 5))
    assert model(input_ids=query, memory=[one, one]).logits.shape[1] == 4
    for read in (lambda: model(input_ids=query, memory=[one] * 3), lambda: model.generate(query, memory=[one] * 3)):
        with pytest.raises(ValueError, match=r"3 memories together are 9 positions .* MistralForCausalLM.* Read fewer"):
            read()


def test_words_before_a_memory_stand_before_all_of_them():
    config = GradMemConfig(num_memory_tokens=3, template={"context": "{context}", "query": "ab{memory}{query}"})
    model = get_gradmem_model(tiny_causal_lm("llama"), config, small_tokenizer())
    one, other = (memory[0] for memory in written(model))
    query, embed = tiny_tokens(1, 4), model.base_model.get_input_embeddings()
    words = embed(model.tokenizer("ab", return_tensors="pt").input_ids)
    with torch.no_grad():
        parts = torch.cat([words, one.embeddings, other.embeddings, embed(query)], dim=1)
        expected = model.base_model(inputs_embeds=parts).logits[:, -4:]
        given = model(input_ids=query, memory=[one, other]).logits
    torch.testing.assert_close(given, expected, **CLOSE)
