"""The pipeline: one write for many questions, batches, memories, streams; questions tokenised as in training."""

from pathlib import Path

import pytest
import torch
import transformers
from datasets import Dataset
from tokenizers import processors
from transformers import AutoModelForCausalLM, GenerationConfig, TextStreamer, pipeline

from hf_gradmem import GradMemConfig, GradMemForCausalLM, get_gradmem_model, modeling_gradmem
from hf_gradmem.reading.generation import ending_tokens
from hf_gradmem.reading.queries import tokenize_queries
from hf_gradmem.tasks.collator import DataCollatorForGradMem
from tests.reading.test_confidence import WHOLE
from tests.support.small_models import cutting_adapter, named_base, small_tokenizer
from tests.support.tiny_models import tiny_causal_lm

TASK = "gradmem-text-generation"
CONTEXTS = ["thequickbrownfox", ["jumps", "over"], "lazydog"]
QUESTIONS = ["who", "fox", "whereisit"]
NEW = {"max_new_tokens": 6}


@pytest.fixture(scope="module")
def adapter(tmp_path_factory) -> str:
    return cutting_adapter(tmp_path_factory.mktemp("models"), write_learning_rate=2.0)


@pytest.fixture
def model(adapter) -> GradMemForCausalLM:
    return AutoModelForCausalLM.from_pretrained(adapter)


@pytest.fixture
def pipe(model):
    return pipeline(TASK, model=model, tokenizer=model.tokenizer, device="cpu", **NEW)


def expected(model, context, question: str, **options) -> str:
    """By the model's own write and generate, one at a time."""
    prompt = model.tokenizer(question, add_special_tokens=False, return_tensors="pt")
    tokens = model.generate(prompt.input_ids, memory=model.write([context]), **NEW | {"do_sample": False} | options)
    return model.tokenizer.decode(tokens[0, prompt.input_ids.shape[1] :], skip_special_tokens=True)


def texts(answers) -> list:
    """`[{"generated_text": x}]` as x, at any depth."""
    if isinstance(answers[0], dict):
        (answer,) = answers
        return answer["generated_text"]
    return [texts(answer) for answer in answers]


@pytest.fixture
def writes(model, monkeypatch) -> list[int]:
    """How many contexts each call of `write` had."""
    sizes = []
    write = model.write

    def counted(*arguments, **options):
        memory = write(*arguments, **options)
        sizes.append(len(memory))
        return memory

    monkeypatch.setattr(model, "write", counted)
    return sizes


# ------------------------------------------------------------------------------------------------ answers


@pytest.mark.parametrize("batch_size", [1, 2, 8])
def test_answers_are_those_of_write_and_generate(model, pipe, batch_size):
    each = [[expected(model, context, question) for question in QUESTIONS] for context in CONTEXTS]
    assert len({answer for answers in each for answer in answers}) > 5
    size = {"batch_size": batch_size}
    assert texts(pipe(context=CONTEXTS, questions=QUESTIONS, **size)) == each
    assert texts(pipe(context=CONTEXTS, questions=[QUESTIONS[:1], QUESTIONS, QUESTIONS[1:]], **size)) == [
        each[0][:1],
        each[1],
        each[2][1:],
    ]
    assert texts(pipe(context=CONTEXTS, question=QUESTIONS, **size)) == [each[i][i] for i in range(3)]
    assert texts(pipe(context=CONTEXTS[0], questions=QUESTIONS, **size)) == each[0]
    assert pipe(context=CONTEXTS[0], question="fox", **size) == [{"generated_text": each[0][1]}]


def test_questions_behind_keys_and_values_run_from_the_cache_in_runs_of_one_length(monkeypatch):
    """Of several lengths and several sequences each, as each question alone; an empty one among them."""
    options = {"memory_form": "key_values", "num_memory_tokens": 3, "write_learning_rate": 3.0}
    torch.manual_seed(0)
    model = get_gradmem_model(tiny_causal_lm("llama", torch.float32), GradMemConfig(**options), small_tokenizer())
    pipe = pipeline(TASK, model=model, tokenizer=model.tokenizer, device="cpu", **NEW)
    asked = ["who", "fox", "whereisit", "", "bat"]
    runs = []
    generate = model.generate
    monkeypatch.setattr(model, "generate", lambda ids, **given: runs.append(ids.shape) or generate(ids, **given))
    monkeypatch.setattr(modeling_gradmem, "generate_from_forward", lambda *_: pytest.fail("nothing was cached"))
    together = pipe(context=CONTEXTS[0], questions=asked, batch_size=8)
    assert runs == [(1, 0), (3, 3), (1, 9)]
    assert together == [pipe(context=CONTEXTS[0], question=each) for each in asked]
    assert len(set(texts(together))) > 1
    beams = {"num_beams": 2, "num_return_sequences": 2}
    several = pipe(context=CONTEXTS[0], questions=asked, batch_size=8, **beams)
    alone = [pipe(context=CONTEXTS[0], question=each, **beams) for each in asked]
    assert [len(answers) for answers in several] == [2] * len(asked)
    assert several == alone


def test_a_data_set_may_have_one_question_in_some_rows_and_several_in_others(pipe):
    items = [{"context": "abc", "question": "who"}, {"context": "lazydog", "questions": ["fox", "who"]}]
    rows = Dataset.from_list([{"question": None, "questions": None} | item for item in items])
    assert list(pipe(rows)) == pipe(items)


def test_a_memory_stands_in_for_its_context(model, pipe, writes):
    memories = [model.write([context]) for context in CONTEXTS]
    each = texts(pipe(context=CONTEXTS, questions=QUESTIONS))
    writes.clear()
    assert texts(pipe(memory=memories, questions=QUESTIONS, batch_size=2)) == each
    assert texts(pipe(memory=memories[0].cat(memories), questions=QUESTIONS)) == each
    assert pipe(memory=memories[2], question="who") == [{"generated_text": each[2][0]}]
    assert writes == []


@pytest.mark.parametrize("kind", [str, Path])
def test_a_path_as_memory_is_a_memory_to_load(model, pipe, writes, tmp_path, kind):
    memory = model.write(["thequickbrownfox", "lazydog"])
    memory.save_pretrained(tmp_path / "both")
    memory[1].save_pretrained(tmp_path / "one")
    writes.clear()
    both = pipe(memory=memory, question="who")
    assert pipe(memory=kind(tmp_path / "both"), question="who") == both
    assert pipe(memory=[kind(tmp_path / "one"), memory[0]], question="who") == both[::-1]
    assert pipe({"memory": kind(tmp_path / "one"), "question": "who"}) == both[1]
    assert writes == []
    with pytest.raises(ValueError, match="write_steps would do nothing"):
        pipe(memory=kind(tmp_path / "one"), question="who", write_steps=3)
    with pytest.raises(OSError, match="nowhere"):
        pipe(memory=kind(tmp_path / "nowhere"), question="who")


def test_a_context_is_written_once_for_all_its_questions(pipe, writes):
    pipe(context=CONTEXTS, questions=QUESTIONS)
    assert writes == [1, 1, 1]
    writes.clear()
    pipe(context=["abc", "defg", "hi", "jkl", "m"], questions=QUESTIONS, batch_size=2)
    assert writes == [2, 2, 1]


def test_inputs_may_be_dictionaries_and_are_read_as_they_are_asked_for(model, pipe):
    rows = [{"context": context, "question": "who"} for context in CONTEXTS[::2]]
    each = [expected(model, row["context"], "who") for row in rows]
    assert texts(pipe(rows[0])) == each[0]
    assert texts(pipe(rows, batch_size=2)) == each
    taken = []
    answers = pipe(taken.append(index) or rows[index % 2] for index in range(1000))
    assert texts([next(answers), next(answers)]) == each
    assert len(taken) < 10


def test_write_and_generate_take_their_own_options(model, pipe):
    memory = model.write("thequickbrownfox", write_steps=5, write_learning_rate=3.0)
    five = pipe(context="thequickbrownfox", question="who", write_steps=5, write_learning_rate=3.0)
    assert five == pipe(memory=memory, question="who")
    assert five != pipe(context="thequickbrownfox", question="who")
    sampled = pipe(memory=memory, questions=["who", "fox"], do_sample=True, num_return_sequences=3, batch_size=2)
    assert [len(answers) for answers in sampled] == [3, 3]
    config = GenerationConfig(max_new_tokens=2, do_sample=False)
    short = pipe(memory=memory, question="who", generation_config=config, return_tensors=True)
    (long,) = pipe(memory=memory, question="who", return_tensors=True, return_dict_in_generate=True)
    assert short == [{"generated_token_ids": long["generated_token_ids"][:2]}]
    (full,) = pipe(memory=memory, question="who", return_full_text=True)
    assert full["generated_text"] == "who" + five[0]["generated_text"]


@pytest.mark.parametrize("batch_size", [1, 2])
def test_what_follows_an_empty_question_comes_from_the_memory_alone(model, pipe, batch_size):
    memory = model.write("thequickbrownfox")
    tokens = torch.empty((1, 0), dtype=torch.long)
    for _ in range(6):
        last = model.base_model(
            inputs_embeds=torch.cat([memory.embeddings, model.decoder.embed(tokens)], dim=1)
        ).logits[:, -1:]
        tokens = torch.cat([tokens, last.argmax(-1)], dim=1)
    alone, between = pipe(memory=memory, questions=["", "fox"], return_tensors=True, batch_size=batch_size)
    assert alone == [{"generated_token_ids": tokens[0].tolist()}]
    assert between == pipe(memory=memory, question="fox", return_tensors=True)


@pytest.mark.parametrize("way", ["eos_token_id", "generation_config", "stopping_criteria"])
def test_an_answer_is_scored_up_to_what_ends_it_and_its_padding_is_not(model, pipe, way):
    model.config.confidence = WHOLE
    memory = model.write("thequickbrownfox")
    answers = pipe(memory=memory, questions=QUESTIONS, return_tensors=True)
    each = [answer["generated_token_ids"] for (answer,) in answers]
    end = next(token for tokens in each for token in tokens[:3] if any(token not in other for other in each))
    options = {
        "eos_token_id": {"eos_token_id": end},
        "generation_config": {"generation_config": GenerationConfig(eos_token_id=[end], **NEW)},
        "stopping_criteria": {"stopping_criteria": [lambda ids, scores, **_: ids[:, -1] == end]},
    }[way]
    together, alone = (
        pipe(memory=memory, questions=QUESTIONS, return_confidence=True, batch_size=size, **options) for size in (3, 1)
    )
    for (one,), (other,) in zip(together, alone, strict=True):
        assert one["generated_text"] == other["generated_text"]
        assert one["log_prob"] == pytest.approx(other["log_prob"], abs=1e-5)


def test_a_confidence_does_not_depend_on_the_memories_beside(model, pipe):
    model.config.confidence = WHOLE | {"features": ["write_loss"]}
    memories = [model.write("thequickbrownfox", measure_final_loss=True), model.write("lazydog")]
    together, alone = (
        [record["confidence"] for (record,) in pipe(memory=memories, question="who", return_confidence=True, **size)]
        for size in ({"batch_size": 2}, {"batch_size": 1})
    )
    assert together == pytest.approx(alone)
    assert alone[0] != alone[1] == 0.5  # as the mean, of which nothing is known


# ------------------------------------------------------------------------------------------------ questions


def test_questions_are_tokenised_as_in_training():
    """By a tokenizer that puts a begin token in front of what it is not told to leave alone."""
    tokenizer = small_tokenizer()
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", 1)]
    )
    assert tokenizer("who").input_ids[0] == 1
    row = {"context": "abc", "queries": QUESTIONS, "targets": ["x"] * len(QUESTIONS)}
    batch = DataCollatorForGradMem(tokenizer)([row])
    input_ids, mask = tokenize_queries(QUESTIONS, tokenizer)
    for trained, labels, read, real in zip(batch["input_ids"][0], batch["labels"][0], input_ids, mask, strict=True):
        length = int((labels != -100).nonzero()[0])
        assert read[real.bool()].tolist() == trained[:length].tolist()


def test_an_answer_ends_at_the_end_token_of_the_tokenizer_or_of_the_base():
    tokenizer = small_tokenizer()
    config = GenerationConfig(eos_token_id=[7, 2], pad_token_id=5)
    assert ending_tokens(tokenizer, config) == {"eos_token_id": [7, 2], "pad_token_id": 0}
    tokenizer.pad_token = None
    assert ending_tokens(tokenizer, GenerationConfig(eos_token_id=7)) == {"eos_token_id": [7, 2], "pad_token_id": 7}
    tokenizer.eos_token = None
    assert ending_tokens(tokenizer, GenerationConfig()) == {}


def test_a_chat_template_is_applied_where_there_is_one(model, pipe):
    with pytest.raises(ValueError, match="no chat template"):
        pipe(context="abc", question="who", template="chat")
    with pytest.raises(ValueError, match="'poem'"):
        pipe(context="abc", question="who", template="poem")
    pipe.tokenizer.chat_template = "{% for message in messages %}x{{ message['content'] }}y{% endfor %}"
    chat = pipe(context="abc", questions=QUESTIONS, template="chat")
    assert texts(chat) == [expected(model, "abc", f"x{question}y") for question in QUESTIONS]


# ------------------------------------------------------------------------------------------------ streaming


def test_tokens_are_streamed_question_by_question(pipe, capsys):
    streamer = TextStreamer(pipe.tokenizer, skip_prompt=True)
    answers = pipe(context=CONTEXTS[0], questions=QUESTIONS, streamer=streamer, batch_size=8)
    plain = pipe(context=CONTEXTS[0], questions=QUESTIONS, skip_special_tokens=False)
    assert capsys.readouterr().out.split("\n")[:-1] == texts(plain)
    assert answers == pipe(context=CONTEXTS[0], questions=QUESTIONS)


def test_a_streamer_with_beams_is_refused_before_anything_is_written(pipe, writes):
    with pytest.raises(ValueError, match="num_beams=2"):
        pipe(context="abc", question="who", num_beams=2, streamer=TextStreamer(pipe.tokenizer))
    assert writes == []


# ------------------------------------------------------------------------------------------------ building, saving


def test_it_is_built_from_a_path_or_a_model_without_a_warning(adapter, model, caplog, recwarn, monkeypatch):
    transformers.utils.logging.enable_propagation()
    transformers.utils.logging.set_verbosity_warning()
    model.tokenizer.pad_token = None  # which pipelines that batch usually ask for
    try:
        by_path = pipeline(TASK, model=adapter, device="cpu")
        alone = pipeline(TASK, model=model, device="cpu")
        given = pipeline(TASK, model=model, tokenizer=model.tokenizer, batch_size=3, device="cpu")
        answers = [pipe(context=CONTEXTS, question="who", max_new_tokens=6) for pipe in (by_path, alone, given)]
    finally:
        transformers.utils.logging.disable_propagation()
    assert answers[0] == answers[1] == answers[2]
    assert [record.getMessage() for record in caplog.records] == []
    assert [str(warning.message) for warning in recwarn] == []


def test_an_adapter_without_a_tokenizer_of_its_own_reads_with_that_of_its_base(tmp_path):
    base = named_base(tmp_path / "base")
    small_tokenizer().save_pretrained(tmp_path / "base")
    get_gradmem_model(base, GradMemConfig(num_memory_tokens=2)).save_pretrained(tmp_path / "adapter")
    pipe = pipeline(TASK, model=str(tmp_path / "adapter"), device="cpu", max_new_tokens=2)
    assert pipe.tokenizer("fox").input_ids == small_tokenizer()("fox").input_ids
    assert len(pipe(context="abc", question="who")) == 1


def test_a_plain_base_is_refused_by_name(tmp_path):
    named_base(tmp_path / "base")
    small_tokenizer().save_pretrained(tmp_path / "base")
    with pytest.raises(TypeError, match=r"LlamaForCausalLM.*get_gradmem_model"):
        pipeline(TASK, model=str(tmp_path / "base"), device="cpu")


def test_saving_saves_the_adapter_and_no_copy_of_the_pipeline(pipe, tmp_path):
    pipe.save_pretrained(tmp_path)
    assert not (tmp_path / "pipeline.py").exists()
    assert "custom_pipelines" not in (tmp_path / "config.json").read_text(encoding="utf-8")
    again = pipeline(TASK, model=str(tmp_path), device="cpu", **NEW)
    assert again(context="abc", question="who") == pipe(context="abc", question="who")


# ------------------------------------------------------------------------------------------------ mistakes


@pytest.mark.parametrize(
    ("inputs", "message"),
    [
        ({"question": "who"}, "context or memory: got question"),
        ({"context": "abc"}, "question or questions: got context"),
        ({"context": "abc", "question": "who", "questions": ["who"]}, "question or questions, and not both"),
        ({"context": ["a", "b"], "question": ["x", "y", "z"]}, "3 contexts, but 2"),
        ({"context": "abc", "question": ["x"]}, "one context"),
        ({"context": "abc", "questions": []}, "empty list"),
        ({"context": "abc", "questions": "who"}, "as question"),
        ({"context": ["a", "b"], "questions": ["x", ["y"]]}, "mix"),
        ({"context": [], "questions": ["x"]}, "no context"),
        ({"context": "", "question": "x"}, "no tokens"),
        ({"inputs": {"context": "abc", "query": "x"}}, "'query'"),
        ({"inputs": {"context": "abc", "question": "x"}, "question": "x"}, "not both"),
        ({"inputs": [{"context": ["a", "b"], "question": "x"}]}, "one context, got 2"),
        ({"context": "abc", "question": "x", "batch_size": 0}, "at least 1"),
    ],
)
def test_what_cannot_be_answered_is_said(pipe, inputs, message):
    with pytest.raises(ValueError, match=message):
        pipe(**inputs)


def test_write_options_with_a_memory_in_a_list_are_said(model, pipe):
    inputs = [{"context": "!a:b!", "question": "?!a:"}, {"memory": model.write("!a:b!"), "question": "?!a:"}]
    with pytest.raises(ValueError, match="write_steps would do nothing"):
        pipe(inputs, write_steps=1)
    assert pipe(inputs, write_steps=None) == pipe(inputs)


def test_a_memory_that_is_none_and_write_options_with_a_memory_are_said(model, pipe):
    with pytest.raises(TypeError, match="got a int"):
        pipe(memory=[3], question="x")
    with pytest.raises(TypeError, match="a context is a text or a list of texts"):
        pipe(context={"abc": "def"}, question="x")
    with pytest.raises(TypeError, match="a question is a text"):
        pipe(context="abc", questions=[["x"], [3]])
    with pytest.raises(TypeError, match="a question is a text"):
        pipe(context=["abc"], question=[["x"]])
    with pytest.raises(ValueError, match="write_steps would do nothing"):
        pipe(memory=model.write("abc"), question="x", write_steps=3)
