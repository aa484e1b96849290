"""A memory inside the turn, behind words of the template: read as words, memory and question in a row are."""

from functools import partial

import pytest
import torch
from transformers import pipeline

from hf_gradmem import DataCollatorForGradMem, GradMemConfig, GradMemForCausalLM, get_gradmem_model
from hf_gradmem.base.decoder import Decoder
from hf_gradmem.evaluation import answer_queries, evaluate_rows
from hf_gradmem.reading.queries import tokenize_queries
from tests.support.small_models import ids_of, small_tokenizer, with_memory
from tests.support.tiny_models import tiny_causal_lm

CHAT = "{% for message in messages %}uvw{{ message['content'] }}x{% endfor %}yz"
OWN = {"context": "{context}", "query": "uvw{memory}{query}xyz"}
CLOSE = partial(torch.testing.assert_close, rtol=0, atol=1e-9)
QUESTIONS = ["abc", "d", "efghij"]


def build(model_type: str = "llama", template="chat_inside", **options) -> GradMemForCausalLM:
    defaults = {"num_memory_tokens": 3, "write_steps": 1, "num_control_tokens": 1, "memory_projection": True}
    model = with_memory(tiny_causal_lm(model_type), template=template, **defaults | options)
    model.tokenizer = small_tokenizer()
    model.tokenizer.chat_template = CHAT
    return model


def by_hand(model: GradMemForCausalLM, memory, text: str, header: str = "uvw") -> torch.Tensor:
    """Logits `(1, length of text, vocab)` of the base on header, control vectors, memory and text in a row."""
    embed = model.base_model.get_input_embeddings()
    vectors = model.memory_projection(memory.embeddings)
    parts = [embed(ids_of(model, header)), model.read_start[None], vectors, model.read_end[None]]
    inputs = torch.cat([*parts, embed(ids_of(model, text))], dim=1)
    return model.base_model(inputs_embeds=inputs).logits[:, -len(text) :]


@pytest.mark.parametrize("template", ["chat_inside", OWN], ids=["chat", "own words"])
def test_words_stand_before_the_memory_and_the_question_behind_it(template):
    model = build(template=template)
    memory = model.write("klm")
    input_ids, mask = tokenize_queries(["abc"], model.tokenizer, template)
    assert model.tokenizer.decode(input_ids[0]).replace(" ", "") == "abcxyz"
    with torch.no_grad():
        CLOSE(model(input_ids=input_ids, attention_mask=mask, memory=memory).logits, by_hand(model, memory, "abcxyz"))
        before = build(template="chat")(input_ids=input_ids, attention_mask=mask, memory=memory).logits
    assert not torch.allclose(before, by_hand(model, memory, "abcxyz"), atol=1e-3)


def test_write_does_not_change():
    inside, plain = build(), build(template="plain")
    assert inside.fingerprint() == plain.fingerprint()
    assert inside.write(["klm", "n"]) == plain.write(["klm", "n"])


@pytest.mark.parametrize("model_type", ["llama", "gpt2", "mamba", "gemma3n_text"])
@pytest.mark.parametrize("side", ["left", "right"])
def test_a_row_does_not_depend_on_its_batch_or_its_padding(model_type, side):
    model = build(model_type)
    memory = model.write(["klm", "n", "opq"])
    input_ids, mask = tokenize_queries(QUESTIONS, model.tokenizer, "chat_inside")
    if side == "right":
        order = mask.argsort(dim=1, descending=True, stable=True)
        input_ids, mask = input_ids.gather(1, order), mask.gather(1, order)
    with torch.no_grad():
        together = model(input_ids=input_ids, attention_mask=mask, memory=memory).logits
        for row in range(3):
            real = mask[row].bool()
            alone = model(input_ids=input_ids[row, real][None], memory=memory[row]).logits
            CLOSE(together[row, real], alone[0], atol=1e-7)


@pytest.mark.parametrize("path", ["the base's own", "forward"])
def test_both_ways_of_generation_go_on_as_the_words_in_a_row_do(path, monkeypatch):
    model = build()
    if path == "forward":
        monkeypatch.setattr(Decoder, "generates_from_embeddings", False)
    memory = model.write(["klm", "n", "opq"])
    input_ids, mask = tokenize_queries(QUESTIONS, model.tokenizer, "chat_inside")
    options = {"max_new_tokens": 5, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    generated = model.generate(input_ids=input_ids, attention_mask=mask, memory=memory, **options)
    assert torch.equal(generated[:, : input_ids.shape[1]], input_ids)
    for row, question in enumerate(QUESTIONS):
        tokens = ids_of(model, f"{question}xyz")
        with torch.no_grad():
            for _ in range(5):
                last = model(input_ids=tokens, memory=memory[row]).logits[:, -1:].argmax(-1)
                tokens = torch.cat([tokens, last], dim=1)
        assert torch.equal(generated[row, -5:], tokens[0, -5:])
    longer = model.generate(
        input_ids=input_ids[:1], attention_mask=mask[:1], memory=memory[0], **options | {"max_new_tokens": None},
        max_length=input_ids.shape[1] + 2,
    )  # fmt: skip
    assert longer.shape[1] == input_ids.shape[1] + 2  # neither the memory nor the words before it are counted


def test_training_scores_the_answer_behind_the_words():
    model = build(meta_gradient="first_order")
    rows = [{"context": ["klm"], "queries": ["abc", "d"], "targets": ["e", "fg"]}]
    collator = DataCollatorForGradMem(model.tokenizer, template="chat_inside", add_end_token=False)
    output = model(**collator(rows))
    losses = []
    for question, answer in (("abcxyz", "e"), ("dxyz", "fg")):
        logits = by_hand(model, output.memory, question + answer)
        predicted = logits[0, len(question) - 1 : -1].log_softmax(-1)
        losses += [-predicted[place, token] for place, token in enumerate(ids_of(model, answer)[0])]
    CLOSE(output.read_loss, torch.stack(losses).mean())
    output.loss.backward()
    assert model.memory_init.grad.abs().sum() > 0


def test_evaluation_and_the_pipeline_read_it_alike():
    model = build()
    rows = [{"context": ["klm"], "queries": ["abc", "d"], "targets": ["e", "fg"]}]
    own = evaluate_rows(model, rows, [1], baselines=["prompt", "none"])
    chat = evaluate_rows(build(template="chat"), rows, [], baselines=["prompt", "none"])
    assert [record["answer_loss"] for record in own[1:]] == pytest.approx([record["answer_loss"] for record in chat])
    memory = model.write("klm")
    ask = pipeline("gradmem-text-generation", model=model, tokenizer=model.tokenizer)
    told = ask(memory=memory, questions=["abc", "d"], max_new_tokens=4)
    expected = answer_queries(model, memory, ["abc", "d"], [0, 0], 4)
    assert [each["generated_text"] for answers in told for each in answers] == expected


def test_the_words_count_among_the_positions_of_read_alone():
    model = build()
    memory = model.write("klm")
    assert model.read_phase.prefix(memory.embeddings).length == model.read_phase.prefix_length == 3 + 2 + 3
    assert model.write_phase.prefix(memory.embeddings).length == model.write_phase.prefix_length == 2 + 3


def test_the_token_that_begins_every_text_begins_it_here_too(monkeypatch):
    model = build()
    with_begin = small_tokenizer()
    with_begin.chat_template = "<s>" + CHAT
    monkeypatch.setattr("hf_gradmem.memory.phase.leading_tokens", lambda tokenizer: [1])
    monkeypatch.setattr("hf_gradmem.template.leading_tokens", lambda tokenizer: [1])
    model.tokenizer = with_begin
    assert model.read_phase.header_ids == [1, *ids_of(model, "uvw")[0].tolist()]


def test_a_saved_adapter_reads_as_before(tmp_path):
    model = build()
    model.base_model.save_pretrained(tmp_path / "base")
    memory = model.write("klm")
    model.save_pretrained(tmp_path / "adapter")
    loaded = GradMemForCausalLM.from_pretrained(tmp_path / "adapter", dtype=torch.float64)
    assert loaded.config.template == "chat_inside"
    ids = ids_of(model, "abcxyz")
    with torch.no_grad():
        CLOSE(loaded(input_ids=ids, memory=memory).logits, model(input_ids=ids, memory=memory).logits)


# ------------------------------------------------------------------------------------------------ refusals


@pytest.mark.parametrize("template", ["chat_inside", OWN], ids=["chat", "own words"])
@pytest.mark.parametrize("form", ["key_values", {"name": "key_values", "write": "values"}], ids=str)
def test_keys_and_values_stand_before_everything(template, form):
    with pytest.raises(ValueError, match=r"puts words before the memory, and keys and values .* template='chat'"):
        GradMemConfig(memory_form=form, template=template)
    model = get_gradmem_model(tiny_causal_lm("llama"), GradMemConfig(num_memory_tokens=2, memory_form=form))
    model.tokenizer = small_tokenizer()
    model.tokenizer.chat_template = CHAT
    memory = model.write("klm")
    model.config.template = template
    with pytest.raises(ValueError, match="stands before everything else"):
        model(input_ids=ids_of(model, "abc"), memory=memory)


def test_a_call_does_not_move_the_memory():
    model, memory = build(), None
    memory = model.write("klm")
    for asked in (
        lambda: answer_queries(model, memory, ["abc"], [0], 3, template="chat"),
        lambda: evaluate_rows(model, [{"context": ["k"], "queries": ["a"], "targets": ["b"]}], [1], template="plain"),
        lambda: pipeline("gradmem-text-generation", model=model, tokenizer=model.tokenizer)(
            memory=memory, question="abc", template="question"
        ),
    ):
        with pytest.raises(ValueError, match="has the memory at another place than the model's own, 'chat_inside'"):
            asked()
    with pytest.raises(ValueError, match="another place"):
        answer_queries(build(template="plain"), memory, ["abc"], [0], 3, template="chat_inside")
    assert answer_queries(model, memory, ["abc"], [0], 3, template=OWN) == answer_queries(
        model, memory, ["abc"], [0], 3
    )
