"""Memories recited as text, and answers that have that text before their question."""

import pytest
import torch
from transformers import pipeline

from hf_gradmem import DataCollatorForGradMem, GradMemConfig, get_gradmem_model
from hf_gradmem.commands.chat import Chat
from hf_gradmem.evaluation import evaluate_rows, measure
from hf_gradmem.evaluation.answers import answer_queries
from hf_gradmem.evaluation.tokens import answer_tokens
from hf_gradmem.memory.phase import Phase
from hf_gradmem.memory.written import GradMemMemory
from hf_gradmem.reading.answering import answer_log_probs
from hf_gradmem.reading.reciting import recite
from hf_gradmem.tasks import kv_retrieval
from tests.support.small_models import small_llama, small_tokenizer, templated
from tests.support.writing import build

RECITING = {"context": "{context}|", "query": "{context}?{query}:"}
DIRECT = {"context": "{context}|", "query": "?{query}:"}
ROWS = [
    {"context": ["abc"], "queries": ["k", "l"], "targets": [" v", " w"]},
    {"context": ["d", "e"], "queries": ["m"], "targets": [" x"]},
]


@pytest.fixture
def model():
    torch.manual_seed(0)
    return templated(kv_retrieval.build_tokenizer(), RECITING)


@pytest.fixture
def learned(model):
    """Memories that decode to what was written: one whole, one in segments."""
    return model.write([["abc"], ["de", "fgh", "i"]], write_steps=300, write_learning_rate=0.3)


@pytest.fixture
def asked(model, monkeypatch):
    """Every prompt that the model is asked to go on from."""
    prompts, generate = [], model.generate

    def record(input_ids, *arguments, attention_mask, **options):
        rows = zip(input_ids, attention_mask, strict=True)
        prompts.extend(model.tokenizer.decode(row[mask == 1]) for row, mask in rows)
        return generate(input_ids, *arguments, attention_mask=attention_mask, **options)

    monkeypatch.setattr(model, "generate", record)
    return prompts


@pytest.mark.parametrize("memory_form", ["input_vectors", "key_values"])
@pytest.mark.parametrize("prefix", [None, torch.tensor([[5, 6], [7, 8], [9, 5]])])
def test_the_bases_own_generation_decodes_what_forward_passes_do(memory_form, prefix, monkeypatch):
    model = build(memory_form={"name": memory_form}, num_control_tokens=2 if memory_form == "input_vectors" else 0)
    memory = model.write(input_ids=torch.randint(5, 30, (3, 7)))
    decoded = model.reconstruct(memory, prefix)
    monkeypatch.setattr(Phase, "generates", False)
    assert torch.equal(decoded, model.reconstruct(memory, prefix))
    assert len(set(decoded.flatten().tolist())) > 3


def test_a_memory_decodes_to_its_end_past_tokens_that_end_an_answer(model):
    end = model.tokenizer.eos_token_id
    tokens = torch.tensor([[5, end, 6, end, 7]])
    memory = model.write(input_ids=tokens, write_steps=300, write_learning_rate=0.3)
    assert torch.equal(model.reconstruct(memory), tokens)


def test_a_text_is_recited_whole_and_in_segments(model, learned):
    assert recite(model, learned) == ["abc", "defghi"]
    assert recite(model, learned[1]) == ["defghi"]


def test_a_memory_that_was_written_on_beside_one_of_more_segments_is_recited_as_alone(model):
    first = model.write([["ab", "cd"], ["ef"]])
    written = model.write([["gh"], ["ij", "k"]], memory=first)[1]
    alone = model.write([["ij", "k"]], memory=model.write("ef"))
    assert written.segment_lengths.tolist() == [[2, 0, 2, 1]]
    torch.testing.assert_close(written.embeddings, alone.embeddings)
    assert recite(model, written) == recite(model, alone)
    assert len(model.tokenizer(recite(model, written)[0]).input_ids) == 5


def test_segments_of_which_none_follows_another_cannot_be_recited(model):
    model.config.write_prefix_segments = 0
    with pytest.raises(ValueError, match="none follows another"):
        model.answer("k", model.write([["ab", "cd"]]))


def test_memories_side_by_side_are_not_recited(model, learned):
    with pytest.raises(ValueError, match="side by side are not recited"):
        model.answer("k", [learned[0], learned[0]])
    assert model.answer("k", [learned[0], learned[0]], template=DIRECT)


def test_a_question_has_what_its_memory_recites_before_it(model, learned, asked):
    model.answer(["k", "l", "m"], learned, context_index=[1, 0, 1], max_new_tokens=2)
    assert sorted(asked) == ["abc|?l:", "defghi|?k:", "defghi|?m:"]


def test_every_way_to_ask_recites(model, learned, asked):
    memory, chat = learned[0], Chat(model, tell=lambda _: None)
    chat.keep("a", memory)
    pipe = pipeline("gradmem-text-generation", model=model)
    ways = {
        "answer_queries": lambda: answer_queries(model, memory, ["k"], [0], 2),
        "pipeline": lambda: pipe(memory=memory, question="k", max_new_tokens=2),
        "chat": lambda: chat.take("k"),
    }
    for name, ask in ways.items():
        asked.clear()
        ask()
        assert asked == ["abc|?k:"], name


def test_a_text_is_recited_once_for_all_its_questions(model, learned, monkeypatch):
    decoded, reconstruct = [], model.reconstruct

    def counted(memory, **options):
        decoded.append(len(memory))
        return reconstruct(memory, **options)

    monkeypatch.setattr(model, "reconstruct", counted)
    for _ in range(2):
        model.answer(["k", "l"], learned[0], max_new_tokens=2)
        answer_tokens(model, "k", learned[0], max_new_tokens=2)
    recite(model, GradMemMemory.cat([learned[0], learned[0]]))
    assert decoded == [1]
    other = model.write("xyz", write_steps=1)
    recite(model, GradMemMemory.cat([learned[0], other, other]))
    assert decoded == [1, 1]


def test_segments_of_any_length_are_recited_within_the_window():
    base = small_llama(60, kv_retrieval.build_tokenizer(), max_position_embeddings=40)
    model = get_gradmem_model(base, GradMemConfig(num_memory_tokens=4), tokenizer=kv_retrieval.build_tokenizer())
    segments = ["abcdefghij" * 2, "k", "l"]
    assert len(recite(model, model.write([segments]))[0]) == 22


def test_a_model_that_changed_recites_anew(model, learned):
    memory = learned[0].relabelled(None)
    assert recite(model, memory) == ["abc"]
    with torch.no_grad():
        model.get_output_embeddings().weight.neg_()
    assert recite(model, memory) != ["abc"]


def test_another_tokenizer_tells_it_in_its_own_words(model, learned):
    assert recite(model, learned[0]) == ["abc"]
    other = small_tokenizer()
    model.tokenizer = other
    assert recite(model, learned[0]) == [other.decode(model.reconstruct(learned[0])[0])] != ["abc"]


def test_a_model_that_writes_behind_other_words_recites_anew(model, learned):
    assert recite(model, learned[0]) == ["abc"]
    model.config.write_prompt = "zzzz"
    assert recite(model, learned[0]) == [model.tokenizer.decode(model.reconstruct(learned[0])[0])] != ["abc"]


def test_scores_are_those_of_the_recited_text(model, learned):
    memory = learned[0]
    by_hand = {"context": "{context}", "query": "abc|?{query}:"}
    scores = [answer_log_probs(model, ["k"], ["v"], memory, template=words) for words in (RECITING, by_hand)]
    assert torch.allclose(*scores)
    (answer,) = model.answer("k", memory, max_new_tokens=2)
    tokens = answer_tokens(model, "k", memory, max_new_tokens=2)
    assert tokens.memory.mean().item() == pytest.approx(answer.log_prob, abs=1e-5)


def test_without_asking_for_it_nothing_is_recited(model, learned, asked, monkeypatch):
    monkeypatch.setattr(model, "reconstruct", None)
    model.answer("k", learned[0], max_new_tokens=2, template=DIRECT)
    assert asked == ["?k:"]


def test_training_has_the_text_itself_before_each_question(model):
    batch = DataCollatorForGradMem(model.tokenizer, template=RECITING, add_end_token=False)(ROWS)
    rows = zip(batch["input_ids"].flatten(0, 1), batch["labels"].flatten(0, 1), strict=True)
    decoded = [
        model.tokenizer.decode(row[(labels == -100) & (row != model.tokenizer.pad_token_id)]) for row, labels in rows
    ]
    assert decoded == ["abc|?k:", "abc|?l:", "de|?m:", ""]


def test_an_evaluation_reads_what_the_memory_says_and_not_the_text(model, asked):
    """Of a memory that was not written, the text is not known: nothing of it may stand before a question."""
    (record,) = evaluate_rows(model, ROWS, [0])
    memory = model.write([["abc"], ["d", "e"]], write_steps=0)
    said, index = recite(model, memory), [0, 0, 1]
    assert asked == [f"{said[0]}|?k:", f"{said[0]}|?l:", f"{said[1]}|?m:"]
    assert said != ["abc", "de"]
    assert record["recited_verbatim"] == 0
    scores = answer_log_probs(model, ["k", "l", "m"], ["v", "w", "x"], memory, context_index=index)
    assert record["answer_loss"] == pytest.approx(-scores.mean().item(), abs=1e-5)


def test_an_evaluation_counts_what_is_recited_to_the_letter(model, learned, monkeypatch):
    monkeypatch.setattr(measure, "write_at_steps", lambda *_, **options: {2: learned})
    rows = [row | {"context": context} for row, context in zip(ROWS, (["abc"], ["defghj"]), strict=True)]
    memory, other = evaluate_rows(model, rows, [2], baselines=["other"])
    assert memory["recited_verbatim"] == 0.5
    assert "recited_verbatim" not in other
