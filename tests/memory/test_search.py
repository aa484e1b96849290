"""Which memory a question is about: by its likelihood under each, by its words, and by both."""

import copy
import pickle
import sys
from pathlib import Path

import datasets
import numpy as np
import pytest
import torch
from datasets import Dataset
from tqdm.auto import tqdm

from hf_gradmem import GradMemForCausalLM, MemoryStore
from hf_gradmem.commands.packaged import RETRIEVAL_ADAPTER
from hf_gradmem.commands.write_dataset import write_dataset
from hf_gradmem.memory import search
from hf_gradmem.memory.bm25 import WordIndex
from hf_gradmem.memory.search import LikelihoodSearch, SearchResult
from tests.support.stores import save_store

# Each pair of a letter as key and a digit as value; no two contexts share a key.
CONTEXTS = {
    "first": ["!a:1!", "!b:2!", "!c:3!", "!d:4!"],
    "second": ["!e:5!", "!f:6!", "!g:7!", "!h:8!"],
    "third": ["!i:9!", "!j:1!", "!k:2!", "!l:3!"],
    "fourth": ["!m:4!", "!n:5!", "!o:6!", "!p:7!"],
    "fifth": ["!q:8!", "!r:9!", "!s:1!", "!t:2!"],
}
QUESTIONS = {name: [f"?{pair[:2]}:" for pair in pairs] for name, pairs in CONTEXTS.items()}
# Keys that none of the contexts has.
GENERIC = tuple(f"?!{key}:" for key in "uvwxyzABCDEF")


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    datasets.disable_progress_bars()


@pytest.fixture(scope="module")
def model() -> GradMemForCausalLM:
    return GradMemForCausalLM.from_pretrained(RETRIEVAL_ADAPTER)


@pytest.fixture
def store(model: GradMemForCausalLM, tmp_path: Path) -> MemoryStore:
    rows = Dataset.from_dict({"id": list(CONTEXTS), "context": list(CONTEXTS.values())})
    write_dataset(model, rows, tmp_path / "store", shard_size=2)
    return MemoryStore.from_pretrained(tmp_path / "store")


# ------------------------------------------------------------------------------------------------ likelihood


def test_a_trained_reader_finds_the_memory_that_each_question_is_about(model, store):
    asked = [(name, question) for name, questions in QUESTIONS.items() for question in questions]
    found = store.search(model, [question for _, question in asked], k=2, calibration=GENERIC)
    assert [len(results) for results in found] == [2] * len(asked)
    right = sum(results[0].id == name for (name, _), results in zip(asked, found, strict=True))
    assert right >= 0.95 * len(asked)  # 1 in 5 by chance
    assert all(results[0].score > results[1].score for results in found)


def test_one_text_is_no_list_of_questions_to_compare_with(model, store):
    with pytest.raises(ValueError, match=r"calibration must be a list of questions, got the text 'What is it\?'"):
        store.search(model, "?!a:", calibration="What is it?")


def test_a_score_is_the_mean_log_probability_less_that_of_the_calibration(model, store):
    """Against the loss of a plain forward pass, one memory and one question at a time."""

    def log_prob(memory, question):
        ids = model.tokenizer(question, add_special_tokens=False, return_tensors="pt").input_ids
        return -float(model(input_ids=ids, labels=ids, memory=memory).read_loss)

    found = {result.id: result.score for result in store.search(model, "?!a:", calibration=GENERIC[:3], batch_size=2)}
    plain = {result.id: result.score for result in store.search(model, "?!a:", calibration=())}
    assert found.keys() == CONTEXTS.keys()
    for name, score in found.items():
        memory = store[name]
        own = log_prob(memory, "?!a:")
        mean = sum(log_prob(memory, question) for question in GENERIC[:3]) / 3
        assert score == pytest.approx(own - mean, abs=1e-4)
        assert plain[name] == pytest.approx(own, abs=1e-4)


def test_a_batch_is_read_at_a_time_and_no_more(model, store, monkeypatch):
    sizes = []
    scored = search.mean_log_probs

    def counted(phase, memory, queries):
        sizes.append(len(memory))
        return scored(phase, memory, queries)

    monkeypatch.setattr(search, "mean_log_probs", counted)
    monkeypatch.setattr(MemoryStore, "__getitem__", lambda *_: pytest.fail("memories were looked up"))
    store.search(model, "?!a:", calibration=(), batch_size=2)
    assert sizes == [2, 2, 1]


def runs_of(model, store, monkeypatch, question="?!a:", **options):
    """How many batches a search runs."""
    counted = []
    scored = search.mean_log_probs
    with monkeypatch.context() as patch:
        patch.setattr(search, "mean_log_probs", lambda *given: counted.append(1) or scored(*given))
        found = store.search(model, question, calibration=GENERIC, **options)
    return len(counted), found


def test_the_means_are_computed_once_for_each_memory_and_kept_beside_the_store(model, store, tmp_path, monkeypatch):
    first, found = runs_of(model, store, monkeypatch)
    assert first == 1 + len(GENERIC)
    again = MemoryStore.from_pretrained(tmp_path / "store")
    assert runs_of(model, again, monkeypatch) == (1, found)
    assert runs_of(model, again.filter(["second", "fifth"]), monkeypatch)[0] == 1  # a part has them too
    rows = Dataset.from_dict({"id": ["new"], "context": [["!u:1!", "!v:2!"]]})
    write_dataset(model, rows, tmp_path / "more")
    again.append(MemoryStore.from_pretrained(tmp_path / "more"))
    assert runs_of(model, again, monkeypatch)[0] == 1 + len(GENERIC)  # of the new one alone


def test_means_of_another_reader_or_in_a_broken_file_are_not_used(model, store, tmp_path, monkeypatch):
    expected = runs_of(model, store, monkeypatch)
    (path,) = (tmp_path / "store" / "search").iterdir()
    changed = GradMemForCausalLM.from_pretrained(RETRIEVAL_ADAPTER)
    identities = {LikelihoodSearch(model, GENERIC).identity}
    for words in ("{query}", "Q{query}", "!a:{memory}{query}", "!b:{memory}{query}"):
        changed.config.template = {"context": "{context}", "query": words}
        identities.add(LikelihoodSearch(changed, GENERIC).identity)
    assert len(identities) == 4  # the first words are none
    assert LikelihoodSearch(model, GENERIC[1:]).identity != LikelihoodSearch(model, GENERIC).identity
    path.write_bytes(path.read_bytes()[:40])
    assert runs_of(model, MemoryStore.from_pretrained(tmp_path / "store"), monkeypatch) == expected


def test_a_search_is_by_the_model_that_it_is_asked_with(model, store):
    expected = store.filter(list(store)).search(model, "?!a:", calibration=GENERIC)
    other = GradMemForCausalLM.from_pretrained(RETRIEVAL_ADAPTER)
    assert store.search(other, "?!a:", calibration=GENERIC) == expected
    with torch.no_grad():
        other.get_output_embeddings().weight.neg_()
    assert store.search(model, "?!a:", calibration=GENERIC) == expected


def test_a_store_of_another_writer_is_refused(model, tmp_path):
    store = MemoryStore.from_pretrained(save_store(tmp_path / "other"))
    with pytest.raises(ValueError, match="written by"):
        store.search(model, "?!a:")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"k": 0}, "k must be at least 1, got 0"),
        ({"batch_size": 0}, "batch_size must be at least 1, got 0"),
        ({"shortlist": 0}, "shortlist must be at least 1, got 0"),
        ({"method": "cosine"}, "method must be 'likelihood', 'joint' or 'bm25', got 'cosine'"),
        ({"question": ""}, "The question '' is empty"),
        ({"question": " "}, "The question ' ' is empty"),
        ({"question": ["?!a:", ""], "method": "bm25"}, "The question '' is empty"),
        ({"calibration": [""]}, "The question '' has no token"),
        ({"method": "bm25"}, "keeps no texts.*--keep-text"),
        ({"method": "joint"}, "keeps no texts.*--keep-text"),
        ({"shortlist": 2}, "keeps no texts.*--keep-text"),
    ],
    ids=str,
)
def test_what_cannot_be_searched_is_refused(model, store, options, message):
    given = {"question": "?!a:"} | options
    with pytest.raises(ValueError, match=message):
        store.search(model, **given)


# ------------------------------------------------------------------------------------------------ words

TEXTS = {
    "airport": "Gate 7 opens at 06:45, and gate 9 at noon.",
    "bakery": ["The bakery sells rye bread.", "It opens at six."],
    "ferry": "The ferry leaves every two hours from the pier.",
}


@pytest.fixture
def written(model, tmp_path) -> MemoryStore:
    """A store that keeps its texts; its memories are of no use to this reader, whose words are single symbols."""
    rows = Dataset.from_dict(
        {"id": list(TEXTS), "context": [[text] if isinstance(text, str) else text for text in TEXTS.values()]}
    )
    write_dataset(model, rows, tmp_path / "texts", shard_size=2, keep_text=True)
    return MemoryStore.from_pretrained(tmp_path / "texts")


def test_words_find_the_text_and_a_store_without_texts_stays_as_it_was(written, store):
    assert (written.keeps_text, store.keeps_text) == (True, False)
    assert written.dataset["text"][1] == TEXTS["bakery"]
    assert "text" not in store.dataset.column_names
    asked = {"When does gate 7 open?": "airport", "Which bread is sold?": "bakery", "the pier": "ferry"}
    found = written.search(None, list(asked), k=1, method="bm25")
    assert [results[0].id for results in found] == list(asked.values())
    assert [result.score for result in written.search(None, "zzz", method="bm25")] == [0, 0, 0]


def test_a_store_that_was_searched_by_words_can_be_copied(written):
    found = written.search(None, "the pier", method="bm25")
    for copied in (copy.deepcopy(written), pickle.loads(pickle.dumps(written))):
        assert copied.search(None, "the pier", method="bm25") == found


def test_a_shortlist_leaves_what_words_find_and_ranks_it_by_likelihood(model, written):
    by_words = [result.id for result in written.search(None, "the bread", k=2, method="bm25")]
    whole = [result.id for result in written.search(model, "the bread", calibration=()) if result.id in by_words]
    assert [result.id for result in written.search(model, "the bread", shortlist=2, calibration=())] == whole


def test_a_shortlist_that_would_cut_among_texts_without_a_word_of_the_question_leaves_all(model, written):
    for question in ("zzz", "rye"):
        whole, short = (written.search(model, question, shortlist=count, calibration=()) for count in (None, 2))
        assert [result.id for result in short] == [result.id for result in whole]


def test_a_shortlist_bounds_a_search_by_words_too(written):
    assert len(written.search(None, "the bread", method="bm25", shortlist=1)) == 1


def test_a_word_that_goes_over_the_border_of_two_segments_is_found(model, tmp_path):
    rows = Dataset.from_dict({"id": ["a", "b"], "context": [["lightho", "use"], ["harb", "our"]]})
    write_dataset(model, rows, tmp_path / "cut", keep_text=True)
    found = MemoryStore.from_pretrained(tmp_path / "cut").search(None, "harbour", method="bm25", k=1)
    assert found[0].id == "b"
    assert found[0].score > 0


@pytest.mark.parametrize("shortlist", [None, 2])
def test_a_joint_ranking_is_the_sum_of_the_standardised_scores(model, written, shortlist):
    """By NumPy."""
    question, count = "When does the rye bread open?", shortlist or len(TEXTS)
    words = {result.id: result.score for result in written.search(None, question, k=count, method="bm25")}
    likely = written.search(model, question, shortlist=shortlist)
    scores = np.array([[result.score, words[result.id]] for result in likely])
    expected = ((scores - scores.mean(0)) / scores.std(0)).sum(1)
    found = written.search(model, question, shortlist=shortlist, method="joint")
    assert {result.id: result.score for result in found} == pytest.approx(
        {result.id: score for result, score in zip(likely, expected, strict=True)}
    )
    assert [result.score for result in found] == pytest.approx(sorted(expected, reverse=True))


def test_words_that_no_text_has_leave_a_joint_ranking_to_likelihood(model, written):
    for question in ("zzz", "!"):
        likely, joint = (written.search(model, question, method=method) for method in ("likelihood", "joint"))
        assert [result.id for result in joint] == [result.id for result in likely]


def test_a_merge_of_stores_with_and_without_texts_keeps_the_texts(written, store, tmp_path):
    merged = MemoryStore.merge([store, written], tmp_path / "merged")
    assert merged.search(None, "rye bread", k=1, method="bm25")[0].id == "bakery"
    with pytest.raises(ValueError, match=r"keeps no texts, and .* does"):
        store.append(written)
    written.append(store)
    assert written.search(None, "rye bread", k=1, method="bm25")[0].id == "bakery"
    assert written.dataset["text"][len(TEXTS)] is None


def test_the_package_that_is_missing_is_named_with_its_extra(written, monkeypatch):
    monkeypatch.setitem(sys.modules, "bm25s", None)
    with pytest.raises(ImportError, match=r"pip install hf-gradmem\[search\]"):
        written.search(None, "bread", method="bm25")


def test_segments_that_are_texts_of_their_own_keep_their_words_apart():
    index = WordIndex(["gate", "other"], [["the gate opens", "bruno lives here"], ["nobody", "here"]])
    for question in ("when it opens", "where does bruno live"):
        best = index.best(question, 1)[0]
        assert best.id == "gate"
        assert best.score > 0


def test_a_word_of_one_letter_or_digit_tells_texts_apart():
    letters = [chr(ord("A") + number) for number in range(26)]
    index = WordIndex(letters, [[f"Terminal {letter} is open to the public."] for letter in letters])
    assert index.shortlist("Is terminal Z open?", 3)[0].id == "Z"
    assert index.best("gate 7", 1)[0].score == 0


def test_a_short_list_does_not_cut_among_equals():
    index = WordIndex(["a", "b", "c", "d"], [["rye rye bread"], ["bread rolls"], ["bread board"], ["tea pot"]])
    assert [result.id for result in index.shortlist("rye bread", 2)] == ["a", "b", "c"]
    assert [result.id for result in index.shortlist("rye bread", 1)] == ["a"]


def test_texts_without_words_are_all_alike():
    assert WordIndex(["a", "b"], [[], ["!"]]).best("rye bread", 5) == [SearchResult("a", 0.0), SearchResult("b", 0.0)]


def test_the_score_of_a_batch_is_that_of_each_alone(model, store):
    questions = LikelihoodSearch(model, ())
    with tqdm(disable=True) as bar:
        together = questions.scores("?!a:", store.batches(5), bar)
        alone = questions.scores("?!a:", store.batches(1), bar)
    torch.testing.assert_close(
        torch.tensor([result.score for result in together]), torch.tensor([result.score for result in alone])
    )
