"""Answers and what they are worth, on a trained adapter."""

import math

import pytest
import torch

from hf_gradmem import Answer, GradMemForCausalLM
from hf_gradmem.commands.packaged import RETRIEVAL_ADAPTER
from hf_gradmem.pipeline import GradMemTextGenerationPipeline
from hf_gradmem.reading.answering import answer_log_probs, generate_answers
from tests.reading.test_confidence import WHOLE
from tests.support.small_models import PLAIN, nameless_base, small_tokenizer, with_memory
from tests.support.tiny_models import tiny_causal_lm

CONTEXTS = [["!a:1!", "!b:2!", "!c:3!", "!d:4!"], ["!e:5!", "!f:6!", "!g:7!", "!h:8!"]]


@pytest.fixture
def model() -> GradMemForCausalLM:
    return GradMemForCausalLM.from_pretrained(RETRIEVAL_ADAPTER)


@pytest.fixture
def memory(model):
    return model.write(CONTEXTS, measure_final_loss=True)


def log_prob(model, question, answer, **source):
    """By the loss of a plain forward pass."""
    tokens = [model.tokenizer(text, add_special_tokens=False).input_ids for text in (question, answer)]
    ids, labels = torch.tensor([tokens[0] + tokens[1]]), torch.tensor([[-100] * len(tokens[0]) + tokens[1]])
    return -float(model(input_ids=ids, labels=labels, **source).read_loss)


def test_each_question_is_answered_from_its_memory_and_named(model, memory):
    given = model.answer(["?!a:", "?!f:", "?!d:"], memory, context_index=[0, 1, 0], memory_ids=["one", "two"])
    assert [answer.text for answer in given] == ["1!", "6!", "4!"]
    assert [answer.memory_id for answer in given] == ["one", "two", "one"]
    assert [answer.confidence for answer in given] == [None] * 3  # no number is made up
    (alone,) = model.answer("?!f:", memory[1])
    assert alone.log_prob == pytest.approx(given[1].log_prob, abs=1e-5)
    assert model.answer(["?!a:", "?!f:"], memory, batch_size=1)[1].text == "6!"


def test_answers_are_greedy_whatever_the_base_would_do(model, memory):
    questions, about = ["?!a:", "?!f:"], [0, 1]
    plain = model.answer(questions, memory, context_index=about)
    model.generation_config.update(repetition_penalty=5.0, num_return_sequences=2, do_sample=True, min_new_tokens=6)
    assert model.answer(questions, memory, context_index=about) == plain


def test_answers_in_training_are_those_in_evaluation():
    """As between the steps of a training, with a dropout that is on there."""
    lora = {"r": 4, "target_modules": ["q_proj", "v_proj"], "init_lora_weights": False, "lora_dropout": 0.5}
    model = with_memory(nameless_base(), **PLAIN, read_lora=lora)
    model.tokenizer = small_tokenizer()
    memory = model.write("abcdef")
    expected = model.answer(["ab", "cd"], memory, max_new_tokens=6)
    model.train()
    assert model.answer(["ab", "cd"], memory, max_new_tokens=6) == expected
    assert model.training


def test_a_template_that_has_the_memory_elsewhere_is_refused(model, memory):
    words = {"context": "{context}", "query": "!a:{memory}{query}"}
    for ask in (model.answer, lambda *given, **how: answer_log_probs(model, given[0], ["1!"], given[1], **how)):
        with pytest.raises(ValueError, match="has the memory at another place"):
            ask(["?!a:"], memory[0], template=words)


def test_the_features_are_log_probability_gain_and_write_loss(model, memory):
    generated = generate_answers(model, ["?!a:", "?!b:"], memory, [0, 1], max_new_tokens=8)
    for number, question in enumerate(["?!a:", "?!b:"]):
        answer = generated.texts[number] + "|"  # which ends an answer, and is its end token
        own = log_prob(model, question, answer, memory=memory[number])
        unwritten = log_prob(model, question, answer, memory=model.write([CONTEXTS[0]], write_steps=0))
        loss = float(memory.final_write_loss[number])
        assert generated.features[number].tolist() == pytest.approx([own, own - unwritten, loss], abs=1e-4)
    unmeasured = generate_answers(model, ["?!a:"], model.write([CONTEXTS[0]]), [0], max_new_tokens=8)
    assert math.isnan(unmeasured.features[0, 2])


def test_a_given_answer_is_scored_with_the_end_token(model, memory):
    scores = answer_log_probs(model, ["?!a:", "?!f:"], ["1!", "1!"], memory)
    expected = [log_prob(model, q, " 1!|", memory=memory[row]) for row, q in enumerate(["?!a:", "?!f:"])]
    assert scores.tolist() == pytest.approx(expected, abs=1e-4)


def test_a_calibrated_model_says_how_sure_it_is_here_and_in_the_pipeline(model, memory):
    model.config.confidence = WHOLE
    answers = model.answer(["?!a:", "?!e:"], memory[0])
    for answer in answers:
        assert answer.confidence == pytest.approx(1 / (1 + math.exp(-answer.log_prob)), abs=1e-9)
    assert answers[0].confidence > answers[1].confidence
    pipe = GradMemTextGenerationPipeline(model)
    given = pipe(memory=memory[0], questions=["?!a:", "?!e:"], max_new_tokens=8, return_confidence=True, batch_size=2)
    for (record,), answer in zip(given, answers, strict=True):
        assert record["generated_text"] == answer.text
        assert record["confidence"] == pytest.approx(answer.confidence, abs=1e-5)
        assert record["log_prob"] == pytest.approx(answer.log_prob, abs=1e-5)
    assert pipe(memory=memory[0], question="?!a:", max_new_tokens=8) == [{"generated_text": "1!"}]
    assert Answer("x", -1.0).confidence is None


@pytest.mark.parametrize(
    ("questions", "options", "message"),
    [
        (["?!a:", ""], {}, "Question 1 is empty"),
        (["?!a:", " \n"], {}, "Question 1 is empty"),
        (["?!a:"] * 3, {}, "2 memories for 3 questions"),
        (["?!a:"], {"context_index": [2]}, "which of 2 memories"),
        (["?!a:"] * 2, {"memory_ids": ["one"]}, "1 memory_ids for 2 memories"),
        (["?!a:"] * 2, {"max_new_tokens": 0}, "max_new_tokens must be at least 1, got 0"),
    ],
    ids=str,
)
def test_what_cannot_be_answered_is_refused(model, memory, questions, options, message):
    with pytest.raises(ValueError, match=message):
        model.answer(questions, memory, **options)


def test_a_question_that_is_no_text_is_said(model, memory):
    with pytest.raises(TypeError, match="a question is a text, got None"):
        model.answer(["?!a:", None], memory)


@pytest.mark.parametrize("model_type", ["gpt2", "llama"])
def test_an_answer_ends_where_the_window_does_and_leaves_its_neighbours_whole(model_type):
    model = with_memory(tiny_causal_lm(model_type, torch.float32), **PLAIN)
    model.tokenizer = small_tokenizer()
    model.tokenizer.eos_token = None
    model.generation_config.eos_token_id = None
    memory = model.write("abcdef")
    questions = ["ab", "q" * 120]
    long = model.answer(questions, memory, max_new_tokens=40)
    assert long == [model.answer(question, memory, max_new_tokens=40)[0] for question in questions]
    generated = generate_answers(model, questions, memory, [0, 0], max_new_tokens=40)
    assert list(map(len, generated.tokens)) == [40, 5]
    with pytest.raises(ValueError, match="longest prompt has 125 tokens"):
        model.answer("q" * 125, memory)
