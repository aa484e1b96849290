"""Answers to many questions at once."""

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from hf_gradmem import GradMemConfig, get_gradmem_model
from hf_gradmem.evaluation import answer_queries
from hf_gradmem.reading.generation import runs_of_prompts
from tests.support.command_line import save_base

QUESTIONS = ["one?", "a longer question?", "two?", "of another length?", "six?"]


@pytest.fixture
def model(tmp_path):
    save_base(tmp_path, 0)
    config = GradMemConfig(num_memory_tokens=2, write_steps=1, memory_form="key_values")
    return get_gradmem_model(
        AutoModelForCausalLM.from_pretrained(tmp_path), config, tokenizer=AutoTokenizer.from_pretrained(tmp_path)
    )


def test_behind_keys_and_values_questions_of_one_length_run_together_and_are_answered_in_their_order(model):
    memory = model.write(["Gate 7 opens.", "The ferry leaves."])
    about = [0, 1, 1, 0, 1]
    together = answer_queries(model, memory, QUESTIONS, about, max_new_tokens=6)
    alone = [
        answer_queries(model, memory, [question], [index], max_new_tokens=6)[0]
        for question, index in zip(QUESTIONS, about, strict=True)
    ]
    assert together == alone
    answers = model.answer(QUESTIONS, memory=memory, context_index=about, max_new_tokens=6)
    assert [answer.text for answer in answers] == [text.strip() for text in alone]


def test_only_a_memory_in_the_cache_parts_prompts(model):
    mask = torch.tensor([[0, 1, 1], [1, 1, 1], [0, 1, 1]])
    assert runs_of_prompts(model.read_phase, mask) == [([0, 2], 1), ([1], 0)]
    vectors = get_gradmem_model(model.base_model, GradMemConfig(num_memory_tokens=2))
    assert runs_of_prompts(vectors.read_phase, mask) == [([0, 1, 2], 0)]


def test_no_questions_have_no_answers(model):
    assert answer_queries(model, model.write("Gate 7 opens."), [], [], max_new_tokens=6) == []


@pytest.mark.parametrize("context_index", [[0], [0, 0, 0], [0, 1], [0, 0.5]])
def test_each_question_has_the_number_of_a_memory(model, context_index):
    memory = model.write(["Gate 7 opens."])
    with pytest.raises((TypeError, ValueError), match=r"context_index|integer"):
        answer_queries(model, memory, QUESTIONS[:2], context_index, max_new_tokens=2)
