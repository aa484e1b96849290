"""`hf-gradmem ask` on many memories, on many questions, and with a confidence; the reader is a trained one."""

import json
import re
import shutil
from pathlib import Path

import datasets
import pytest
from datasets import Dataset

from hf_gradmem import GradMemForCausalLM, MemoryStore
from hf_gradmem.commands.asking import ask_store, read_questions
from hf_gradmem.commands.calibrate import save_confidence
from hf_gradmem.commands.packaged import RETRIEVAL_ADAPTER
from hf_gradmem.commands.write_dataset import write_dataset
from tests.reading.test_confidence import WHOLE
from tests.support.command_line import mistake, run

CONTEXTS = {"first": ["!a:1!", "!b:2!", "!c:3!", "!d:4!"], "second": ["!e:5!", "!f:6!", "!g:7!", "!h:8!"]}


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")


def written(directory: Path, **options) -> Path:
    model = GradMemForCausalLM.from_pretrained(RETRIEVAL_ADAPTER)
    rows = Dataset.from_dict({"id": list(CONTEXTS), "context": list(CONTEXTS.values())})
    write_dataset(model, rows, directory, **options)
    return directory


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return written(tmp_path_factory.mktemp("memories") / "store", shard_size=1)


@pytest.fixture
def calibrated(tmp_path: Path) -> Path:
    """An adapter whose confidence is 1/(1 + exp(−4 − 100 · the mean log-probability))."""
    directory = shutil.copytree(RETRIEVAL_ADAPTER, tmp_path / "adapter")
    save_confidence(directory, WHOLE | {"weights": [100.0], "bias": 4.0})
    return directory


def test_a_question_finds_its_memory_which_is_named(store):
    model, opened = GradMemForCausalLM.from_pretrained(RETRIEVAL_ADAPTER), MemoryStore.from_pretrained(store)
    for question in ("?!f:", "?!a:"):
        (found,) = opened.search(model, question, k=1)
        answer = model.answer(question, opened[found.id])[0].text
        result = run("ask", question, "--memories", store, "--model", RETRIEVAL_ADAPTER)
        assert result.stdout == f"{answer}\nfrom {found.id}\n", result.output
    assert run("-q", "ask", "?!a:", "--memories", store, "--model", RETRIEVAL_ADAPTER).stdout == f"{answer}\n"
    named = run("ask", "?!f:", "--memories", store, "--id", "second", "--model", RETRIEVAL_ADAPTER)
    assert named.stdout == "6!\n"
    assert "no memory 'third'" in mistake(
        run("ask", "?!f:", "--memories", store, "--id", "third", "--model", RETRIEVAL_ADAPTER)
    )


def test_memories_with_their_texts_are_ranked_by_likelihood_and_words_together(tmp_path):
    store = written(tmp_path / "texts", keep_text=True)
    model, opened = GradMemForCausalLM.from_pretrained(RETRIEVAL_ADAPTER), MemoryStore.from_pretrained(store)
    told = json.loads(run("ask", "?!c:", "--memories", store, "--model", RETRIEVAL_ADAPTER, "--json").stdout)
    scores = {candidate["memory_id"]: candidate["score"] for candidate in told["candidates"]}
    assert scores == {found.id: found.score for found in opened.search(model, "?!c:", method="joint")}
    assert scores != {found.id: found.score for found in opened.search(model, "?!c:")}


def test_the_surest_answer_of_several_memories_is_given(store, calibrated):
    told = json.loads(run("ask", "?!c:", "--memories", store, "--model", calibrated, "--json").stdout)
    assert (told["answer"], told["id"], told["abstained"]) == ("3!", "first", False)
    assert {candidate["memory_id"] for candidate in told["candidates"]} == {"first", "second"}
    assert told["confidence"] == max(candidate["confidence"] for candidate in told["candidates"])
    text = run("ask", "?!c:", "--memories", store, "--model", calibrated).stdout
    assert text == f"3!\nfrom first, confidence {told['confidence']:.2f}\n"


def test_a_confidence_that_does_not_tell_memories_apart_chooses_none(store, calibrated):
    model, opened = GradMemForCausalLM.from_pretrained(calibrated), MemoryStore.from_pretrained(store)
    questions = [f"?{pair[:3]}" for context in CONTEXTS.values() for pair in context]
    surest = ask_store(model, questions, opened)
    measured = dict.fromkeys(("auroc", "auroc_own", "auroc_own_or_other", "brier"), 0.6)
    model.config.confidence |= {"measured": measured | {"num_answers": 9, "reliability": []}}
    fitting = ask_store(model, questions, opened)
    for sure, fits in zip(surest, fitting, strict=True):
        assert sure.candidates == fits.candidates
        assert sure.answer == max((answer for answer, _ in sure.candidates), key=lambda answer: answer.confidence)
        assert fits.answer == fits.candidates[0][0]
    assert [sure.answer for sure in surest] != [fits.answer for fits in fitting]


def test_an_answer_that_is_not_sure_enough_is_not_given(store, calibrated):
    options = ["--memories", store, "--id", "first", "--model", calibrated, "--abstain-below", 0.5]
    assert run("ask", "?!a:", *options).stdout.startswith("1!\nconfidence ")
    unknown = run("ask", "?!z:", *options)
    assert (unknown.exit_code, unknown.stdout.splitlines()[0]) == (0, "not in memory")
    told = json.loads(run("ask", "?!z:", *options, "--json").stdout)
    assert (told["answer"], told["abstained"], told["id"]) == ("not in memory", True, "first")
    bare = ["--memories", store, "--id", "first", "--model", RETRIEVAL_ADAPTER]
    assert "hf-gradmem calibrate" in mistake(run("ask", "?!a:", *bare, "--abstain-below", 0.5))
    assert "must lie in 0..1, got 2" in mistake(run("ask", "?!a:", *options[:-1], 2))


@pytest.mark.parametrize("suffix", ["jsonl", "JSONL"])
def test_a_file_of_questions_may_begin_with_a_mark_and_hold_any_text(tmp_path, suffix):
    question, path = "Who\u2028built\x85it?", tmp_path / f"questions.{suffix}"
    path.write_text(json.dumps({"question": question}, ensure_ascii=False), encoding="utf-8-sig")
    assert read_questions(path) == [question]
    (tmp_path / "questions.txt").write_text("Who?\r\nWhere?\n", encoding="utf-8-sig")
    assert read_questions(tmp_path / "questions.txt") == ["Who?", "Where?"]


@pytest.mark.parametrize("form", ["txt", "jsonl"])
def test_a_file_of_questions_is_answered_in_order(store, calibrated, tmp_path, form):
    questions = ["?!f:", "?!a:", "?!h:"]
    lines = questions if form == "txt" else [json.dumps({"question": each, "id": 7}) for each in questions]
    path = tmp_path / f"questions.{form}"
    path.write_text("\n\n".join(lines) + "\n", encoding="utf-8")
    options = ["--questions", path, "--memories", store, "--model", calibrated, "--batch-size", 2]
    told = [json.loads(line) for line in run("ask", *options, "--json").stdout.splitlines()]
    assert [each["question"] for each in told] == questions
    assert [(each["answer"], each["id"]) for each in told] == [("6!", "second"), ("1!", "first"), ("8!", "second")]
    shown = run("ask", *options).stdout.split("\n\n")
    assert shown[0] == f"?!f:\n6!\nfrom second, confidence {told[0]['confidence']:.2f}"


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("q.txt", "\n \n", "holds no question"),
        ("q.jsonl", '{"question": "?"}\n{"query": "?"}', "Line 2 of .* holds no question"),
        ("q.jsonl", "{", "Line 1 of .* is not JSON"),
    ],
    ids=["empty", "no question", "no JSON"],
)
def test_a_file_without_questions_is_refused(store, tmp_path, name, text, message):
    (tmp_path / name).write_text(text, encoding="utf-8")
    said = mistake(run("ask", "--questions", tmp_path / name, "--memories", store, "--model", RETRIEVAL_ADAPTER))
    assert re.search(message, said), said


def test_what_contradicts_itself_is_refused(store):
    model = ["--model", RETRIEVAL_ADAPTER]
    assert "Give either a question or --questions" in mistake(run("ask", "--memories", store, *model))
    assert "Give either a question or --questions" in mistake(
        run("ask", "?", "--questions", "file", "--memories", store, *model)
    )
    assert "The question is empty" in mistake(run("ask", "", "--memories", store, *model))
