"""Answers that quote first: what is trained on, and how quote and answer are told apart again wherever one is given."""

import pytest
import torch
import yaml
from transformers import pipeline

from hf_gradmem import DataCollatorForGradMem
from hf_gradmem.commands.asking import Asked, ask_memory
from hf_gradmem.commands.chat import Chat
from hf_gradmem.evaluation import evaluate_rows
from hf_gradmem.reading.answering import Answer
from hf_gradmem.serving.engine import Engine, Piece, Read, Sampling
from hf_gradmem.tasks import kv_retrieval, load_task
from hf_gradmem.template import get_template
from hf_gradmem.training.recipe import load_recipe
from hf_gradmem.training.run import training_stream
from tests.support.small_models import templated

QUOTING = {"context": "{context}", "query": "?{query}:", "answer_after": "!"}
ROW = {"context": ["ab"], "queries": ["k", "l"], "targets": ["v", "w"], "quotes": ["kv", ""]}


@pytest.fixture
def tokenizer():
    return kv_retrieval.build_tokenizer()


@pytest.fixture
def model(tokenizer):
    return templated(tokenizer, QUOTING)


@pytest.fixture
def says(model, monkeypatch):
    """Has the model say a text, whatever it is asked, and end there."""

    def script(text: str) -> None:
        said = [*model.tokenizer(text, add_special_tokens=False).input_ids, model.tokenizer.eos_token_id]

        def generate(input_ids, stopping_criteria=(), max_new_tokens=99, streamer=None, **_):
            told = [streamer] if streamer else []
            for stream in told:
                stream.put(input_ids)
            for token in said[:max_new_tokens]:
                input_ids = torch.cat([input_ids, torch.full_like(input_ids[:, :1], token)], dim=1)
                for criterion in stopping_criteria:
                    criterion(input_ids, None)
                for stream in told:
                    stream.put(input_ids[:, -1])
            for stream in told:
                stream.end()
            return input_ids

        monkeypatch.setattr(model, "generate", generate)

    return script


def test_a_target_is_the_quote_and_then_the_answer(tokenizer):
    words = get_template("quote", tokenizer)
    target = words.target(" Oslo", "Ada lives in Oslo.")
    assert words.question("Where?") + target == "Question: Where?\nQuote: Ada lives in Oslo.\nAnswer: Oslo"
    assert words.split(target) == ("Ada lives in Oslo.", " Oslo")
    assert words.split(words.target(" not in memory")) == (None, " not in memory")
    assert get_template("question", tokenizer).target(" Oslo", "Ada lives in Oslo.") == " Oslo"


def test_the_collator_trains_on_the_quote_where_there_is_one(tokenizer):
    batch = DataCollatorForGradMem(tokenizer, template=QUOTING, add_end_token=False)([ROW])
    masked = zip(batch["input_ids"][0], batch["attention_mask"][0], strict=True)
    space = tokenizer(" ", add_special_tokens=False).input_ids  # of which this vocabulary knows nothing
    assert [tokenizer.decode([token for token in row[mask == 1] if [token] != space]) for row, mask in masked] == [
        "?k:kv!v",
        "?l:w",
    ]
    assert (batch["labels"][0, 0] != -100).sum() == len([*space, *"kv!v"])


def test_rows_that_do_not_know_what_to_quote_are_refused(tokenizer):
    row = {name: value for name, value in ROW.items() if name != "quotes"}
    with pytest.raises(ValueError, match="no column 'quotes'"):
        DataCollatorForGradMem(tokenizer, template=QUOTING)([row])
    with pytest.raises(ValueError, match="2 queries and 1 quotes"):
        DataCollatorForGradMem(tokenizer, template=QUOTING)([ROW | {"quotes": [""]}])


@pytest.mark.parametrize(("said", "quote", "right"), [("kw!v", "kw", 0.5), ("v", None, 0.5), ("kv!w", "kv", 0.5)])
def test_what_is_measured_and_given_is_the_answer_behind_the_quote(model, says, said, quote, right):
    says(said)
    (record,) = evaluate_rows(model, [ROW], [1])
    assert record["exact_match"] == right
    memory = model.write("ab", measure_final_loss=True)
    (answer,) = model.answer("k", memory)
    assert (answer.text, answer.quote) == (said[-1], quote)
    (asked,) = ask_memory(model, ["k"], memory)
    assert asked.to_dict().get("quote") == quote
    answered = pipeline("gradmem-text-generation", model=model)(memory=memory, question="k")
    assert answered == [{"generated_text": said[-1]} | ({} if quote is None else {"quote": quote})]


def test_an_answer_that_is_withheld_shows_no_quote_either():
    answer = Answer("v", log_prob=-1.0, confidence=0.2, quote="kv")
    for abstained, shown in ((False, "kv"), (True, None)):
        assert Asked("k", answer, abstained, ((answer, None),)).to_dict().get("quote") == shown


@pytest.mark.parametrize(
    ("said", "text", "quote"),
    [("kv!v", "v", "kv"), ("kvv!vw", "vw", "kvv"), ("w", "w", None), ("k!", "", "k")],
)
def test_a_server_tells_the_answer_alone_and_the_quote_at_its_end(model, says, said, text, quote):
    says(said)
    told: list[Piece] = []
    engine = Engine(model)
    try:
        words = get_template(QUOTING, model.tokenizer)
        prompt = model.tokenizer(words.question("k"), add_special_tokens=False).input_ids
        engine.submit(Read(told.append, model.write("ab"), prompt, 20, Sampling(), words=words))
        while not told or (told[-1].finish_reason is None and told[-1].error is None):
            assert engine._thread.is_alive()
    finally:
        engine.close()
    assert "".join(piece.text for piece in told) == text
    assert [piece.quote for piece in told] == [None] * (len(told) - 1) + [quote]


@pytest.mark.parametrize(("said", "told"), [("kv!v", "v"), ("kvv!vw", "vw"), ("w", "w"), ("k!", "")])
def test_a_conversation_tells_the_answer_alone(model, says, said, told):
    says(said)
    pieces: list[str] = []
    chat = Chat(model, pieces.append)
    chat.keep("a", model.write("ab"))
    chat.take("k")
    assert "".join(pieces) == f"{told}\n"


def test_training_streams_what_is_to_be_quoted(tmp_path):
    values = {
        "task": "facts",
        "base_config": {"model_type": "llama"},
        "stages": [{"steps": 1}],
        "output_dir": str(tmp_path),
        "per_device_train_batch_size": 2,
    }
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(values), encoding="utf-8")
    recipe = load_recipe(tmp_path / "recipe.yaml")
    rows = list(training_stream(recipe.arguments, recipe.training, 1))
    assert [row["quotes"] for row in rows] == [row["quotes"] for row in load_task("facts", num_contexts=2)]
