"""The words around a context and a question: checked, filled, and the same wherever texts become tokens."""

import pytest
import torch

from hf_gradmem import DataCollatorForGradMem, GradMemConfig
from hf_gradmem.evaluation import answer_queries, evaluate_rows
from hf_gradmem.tasks import kv_retrieval
from hf_gradmem.template import TEMPLATE_NAMES, get_template
from hf_gradmem_cli.options import Template
from tests.support.small_models import templated

OWN = {"context": "!{context}!", "query": "?{query}:"}
CHAT = "{% for message in messages %}u{{ message['content'] }}{% endfor %}{% if add_generation_prompt %}a {% endif %}"


@pytest.fixture
def tokenizer():
    return kv_retrieval.build_tokenizer()


@pytest.fixture
def model(tokenizer):
    return templated(tokenizer, OWN)


def test_words_stand_around_a_question_and_around_a_context_in_a_prompt(tokenizer):
    question = get_template("question", tokenizer)
    assert question.question("Who?") == "Question: Who?\nAnswer:"
    assert question.in_prompt("A.", "Who?") == "A.\nQuestion: Who?\nAnswer:"
    assert get_template("plain", tokenizer).in_prompt("A.", " B") == "A. B"
    own = get_template(OWN, tokenizer)
    assert (own.question("q"), own.in_prompt("c", "q")) == ("?q:", "!c!?q:")


def test_what_looks_like_a_field_in_a_text_stays_text(tokenizer):
    assert get_template(OWN, tokenizer).in_prompt("{query}", "{context}") == "!{query}!?{context}:"


def test_the_chat_template_is_the_tokenizers_without_the_token_that_begins_a_text(tokenizer):
    tokenizer.chat_template = CHAT
    chat = get_template("chat", tokenizer)
    assert chat.question("q") == "uqa "
    assert chat.in_prompt("c", "q") == "uc\n\nqa "
    assert chat.target(" yes") == "yes"  # the words end in white space
    assert get_template("question", tokenizer).target(" yes") == " yes"
    assert chat.target("  ") == "  "


def test_a_template_may_say_where_the_memory_stands(tokenizer):
    tokenizer.chat_template = CHAT
    inside, chat = get_template("chat_inside", tokenizer), get_template("chat", tokenizer)
    assert (inside.header, inside.question("q")) == ("u", "qa ")
    assert inside.without_memory("q") == chat.question("q") == "uqa "
    assert inside.in_prompt("c", "q") == chat.in_prompt("c", "q")
    assert inside.target(" yes") == "yes"
    own = get_template({"context": "({context})", "query": "Notes: {memory} ?{query}:"}, tokenizer)
    assert (own.header, own.question("q"), own.in_prompt("c", "q")) == ("Notes: ", " ?q:", "Notes: (c) ?q:")


def test_words_that_hold_a_context_have_what_the_memory_recites_before_a_question(tokenizer):
    words = get_template("recite", tokenizer)
    assert words.question("Who?", "A.") == words.in_prompt("A.", "Who?") == "A.\nQuestion: Who?\nAnswer:"
    assert words.question("Who?") == words.without_memory("Who?") == "Question: Who?\nAnswer:"
    own = get_template({"context": "({context})", "query": "Notes: {memory} {context}?{query}:"}, tokenizer)
    assert (own.recites, own.question("q", "c"), own.in_prompt("c", "q")) == (True, " (c)?q:", "Notes:  (c)?q:")
    assert not get_template("question", tokenizer).recites
    assert get_template("question", tokenizer).question("Who?", "A.") == "Question: Who?\nAnswer:"


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ("poem", "plain, question, quote, recite, chat"),
        ({"query": "{query}"}, "context and query"),
        ({"context": "{context}", "query": "{query}", "answer": ""}, "context and query"),
        ({"context": "words", "query": "{query}"}, "words for context.*'words'"),
        ({"context": "{context}", "query": "{query}{memory}"}, "words for query.*may stand before it"),
        ({"context": "{memory}{context}", "query": "{query}"}, "words for context"),
        ({"context": "{context}", "query": "{query} {query}"}, "words for query"),
        ({"context": "{context}", "query": "{query}{context}"}, "words for query.*may stand before it"),
        ({"context": "{context}", "query": "{context}{memory}{query}"}, "words for query.*may stand before it"),
        ({"context": "{context}{query}", "query": "{query}"}, "words for context"),
        ({"context": "{context}", "query": 3}, "words for query.*3"),
        ({"context": "{context}", "query": "{query}", "answer_after": ""}, "answer_after.*begin an answer"),
    ],
)
def test_a_template_without_its_fields_is_refused_before_anything_runs(value, message):
    with pytest.raises(ValueError, match=message):
        GradMemConfig(template=value)


def test_the_help_of_the_commands_names_every_template():
    """By hand: a command's help is shown without the libraries underneath."""
    (option,) = Template.__metadata__
    assert option.help == f"Words around a question: {', '.join(TEMPLATE_NAMES)}; the adapter's own when absent."


def test_a_tokenizer_without_a_chat_template_is_named(tokenizer):
    with pytest.raises(ValueError, match="no chat template"):
        DataCollatorForGradMem(tokenizer, template="chat")


def test_the_collator_trains_on_the_words_and_scores_the_answer_alone(tokenizer):
    row = {"context": ["ab"], "queries": ["k"], "targets": ["v"]}
    batch = DataCollatorForGradMem(tokenizer, template=OWN, add_end_token=False)([row])
    assert tokenizer.decode(batch["input_ids"][0, 0]) == "?k:v"
    assert batch["labels"][0, 0].tolist() == [-100, -100, -100, *tokenizer("v", add_special_tokens=False).input_ids]
    assert tokenizer.decode(batch["context_input_ids"][0]) == "ab"  # WRITE takes it as it is


def test_an_adapter_keeps_its_template(model, tmp_path):
    model.save_pretrained(tmp_path)
    assert type(model).from_pretrained(tmp_path).config.template == OWN


def test_answers_and_losses_are_those_of_the_words_written_out(model):
    """From memory, from the prompt and from nothing: a template is the same as its words in every row."""
    rows = [{"context": ["ab"], "queries": ["k", "lm"], "targets": ["v", "wx"]}]
    plain = [{"context": ["ab"], "queries": ["?k:", "?lm:"], "targets": ["v", "wx"]}]
    in_prompt = [{"context": ["!ab!"], "queries": ["?k:", "?lm:"], "targets": ["v", "wx"]}]
    templated = evaluate_rows(model, rows, [1], baselines=["prompt", "none"])
    by_hand = evaluate_rows(model, plain, [1], baselines=["none"], template="plain")
    by_hand += evaluate_rows(model, in_prompt, [], baselines=["prompt"], template="plain")
    compared = {record["context"]: record for record in by_hand}
    for record in templated:
        torch.testing.assert_close(record["answer_loss"], compared[record["context"]]["answer_loss"])
        assert record["exact_match"] == compared[record["context"]]["exact_match"]
    memory = model.write("ab")
    assert answer_queries(model, memory, ["k"], [0], 3) == answer_queries(model, memory, ["?k:"], [0], 3, "plain")
