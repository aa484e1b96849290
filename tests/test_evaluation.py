"""Metrics, and answers read from memory."""

import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig

from hf_gradmem import GradMemConfig, get_gradmem_model
from hf_gradmem.evaluation import ExactMatch, SquadMetric, answer_queries, evaluate_rows
from hf_gradmem.tasks import kv_retrieval


@pytest.fixture
def model():
    tokenizer = kv_retrieval.build_tokenizer()
    base = AutoModelForCausalLM.from_config(
        LlamaConfig(
            vocab_size=len(tokenizer),
            hidden_size=32,
            intermediate_size=64,
            num_hidden_layers=2,
            num_attention_heads=4,
            initializer_range=0.3,
            pad_token_id=tokenizer.pad_token_id,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
        )
    )
    return get_gradmem_model(base, GradMemConfig(num_memory_tokens=4, write_learning_rate=0.2), tokenizer=tokenizer)


def test_exact_match_takes_any_reference_answer():
    scores = ExactMatch().compute(predictions=[" hall ", "Hall", "x"], references=[["hall"], ["hall", "Hall"], ["y"]])
    assert scores == {"exact_match": pytest.approx(2 / 3)}


def test_squad_ignores_case_punctuation_and_articles_and_takes_the_best_answer():
    scores = SquadMetric().compute(
        predictions=["The Eiffel Tower!", "in the big house"], references=[["eiffel tower"], ["dog", "a house in Bath"]]
    )
    # The second shares "in" and "house" with "house in bath": 2 · 2 / (3 + 3).
    assert scores == {"exact_match": 0.5, "f1": pytest.approx((1 + 2 / 3) / 2)}


def test_a_metric_on_nothing_is_an_error():
    with pytest.raises(ValueError, match="nothing to"):
        SquadMetric().compute(predictions=[], references=[])


def greedy_answer(model, memory, query: str) -> str:
    """By the plain forward pass, one token at a time, up to and with the end token."""
    tokens = model.tokenizer(query, return_tensors="pt").input_ids
    length = tokens.shape[1]
    while tokens[0, -1] != model.tokenizer.eos_token_id:
        assert tokens.shape[1] < 50, "the model does not end its answer"
        with torch.no_grad():
            next_token = model(input_ids=tokens, memory=memory).logits[:, -1:].argmax(-1)
        tokens = torch.cat([tokens, next_token], dim=1)
    return model.tokenizer.decode(tokens[0, length:])


def test_generated_and_teacher_forced_answers_agree_with_forward(model):
    """The model's own greedy answers are made the targets of half the rows: those, and only those, are right."""
    with torch.no_grad():
        model.base_model.lm_head.weight[model.tokenizer.eos_token_id] *= 3  # answers end soon
    rows = kv_retrieval.load("test", num_contexts=6, num_pairs=3, key_length=1, value_length=2).to_list()
    memory = model.write([row["context"] for row in rows], measure_final_loss=True)
    for number, row in enumerate(rows[:3]):
        row["targets"] = [greedy_answer(model, memory[number], query) for query in row["queries"]]
    results = evaluate_rows(model, rows, [2], batch_size=4)[2]
    assert results["num_answers"] == 18
    assert results["exact_match"] == results["teacher_forced_exact_match"] == pytest.approx(0.5)
    assert results["write_loss"] == pytest.approx(memory.final_write_loss.mean().item(), rel=1e-4)


def test_more_steps_are_measured_in_their_own_row(model):
    rows = kv_retrieval.load("test", num_contexts=4, num_pairs=2, key_length=1, value_length=1)
    results = evaluate_rows(model, rows, [0, 1, 6])
    assert list(results) == [0, 1, 6]
    assert results[6]["write_loss"] < results[1]["write_loss"] < results[0]["write_loss"]


def test_answers_are_about_their_own_context(model):
    rows = kv_retrieval.load("test", num_contexts=3, num_pairs=2, key_length=1, value_length=1).to_list()
    memory = model.write([row["context"] for row in rows])
    query = rows[0]["queries"][0]
    together = answer_queries(model, memory, [query] * 3, [2, 0, 1], max_new_tokens=4)
    alone = [answer_queries(model, memory[index], [query], [0], max_new_tokens=4)[0] for index in (2, 0, 1)]
    assert together == alone


@pytest.mark.parametrize("rows", [[], iter(())])
def test_nothing_to_evaluate_is_an_error(model, rows):
    with pytest.raises(ValueError, match="no row"):
        evaluate_rows(model, rows, [1])


def test_an_unknown_metric_is_named(model):
    with pytest.raises(ValueError, match="'bleu'"):
        evaluate_rows(model, [{}], [1], metric="bleu")
    assert torch.is_grad_enabled()
