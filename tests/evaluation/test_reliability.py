"""A confidence, measured and fitted on a trained adapter."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from datasets import Dataset

from hf_gradmem import GradMemForCausalLM
from hf_gradmem.commands.calibrate import count_contexts, first_contexts, run_calibration, save_confidence
from hf_gradmem.commands.packaged import RETRIEVAL_ADAPTER
from hf_gradmem.evaluation.metrics import auroc
from hf_gradmem.evaluation.reliability import Asked, ask_rows, measure_confidence
from tests.reading.test_confidence import WHOLE
from tests.support.command_line import mistake, run
from tests.support.small_models import PLAIN, named_base, with_memory

RECIPE = Path(__file__).parents[2] / "model_cards" / "gradmem-kv-tiny" / "recipe.yaml"
METRICS = {"four": "exact_match", "text": None}


@pytest.fixture
def model() -> GradMemForCausalLM:
    return GradMemForCausalLM.from_pretrained(RETRIEVAL_ADAPTER)


def rows(count: int = 15) -> Dataset:
    """Contexts of four pairs, none of which has a key of the one before it."""
    keys = "abcdefghijklmnopqrstuvwx"
    contexts = [
        [(keys[(4 * row + pair) % 24], str((3 * row + pair) % 10)) for pair in range(4)] for row in range(count)
    ]
    return Dataset.from_list(
        [
            {
                "context": [f"!{key}:{value}!" for key, value in pairs],
                "queries": [f"?!{key}:" for key, _ in pairs],
                "targets": [f"{value}!|" for _, value in pairs],
            }
            for pairs in contexts
        ]
    )


def test_auroc_is_the_share_of_pairs_that_are_ranked_rightly():
    rng = np.random.default_rng(0)
    scores, positive = rng.integers(0, 6, 60) / 6, rng.random(60) < 0.4
    pairs = np.subtract.outer(scores[positive], scores[~positive])
    assert auroc(scores, positive) == pytest.approx((pairs > 0).mean() + 0.5 * (pairs == 0).mean(), abs=1e-12)
    assert auroc(scores, np.ones(60, dtype=bool)) is None


def test_the_table_says_how_often_each_confidence_is_kept():
    sure = torch.tensor([0.02, 0.04, 0.95, 1.0, 0.9])
    right = torch.tensor([False, True, True, True, False])
    asked = Asked(torch.zeros(5, 3), right, torch.tensor([False, False, True, True, True]), torch.arange(5))
    measured = measure_confidence(asked, sure)
    low, high = measured["reliability"]
    assert (low["count"], low["right"], low["confidence"]) == (2, 0.5, pytest.approx(0.03))
    assert (high["from"], high["to"], high["count"], high["right"]) == (0.9, 1.0, 3, pytest.approx(2 / 3))
    assert (measured["share_right_own"], measured["share_right_other"]) == (pytest.approx(2 / 3), 0.5)
    assert measured["auroc_own_or_other"] == 1.0


def test_each_question_is_asked_of_its_own_memory_and_of_the_one_before(model):
    given = list(rows(5))
    asked = ask_rows(model, given, "exact_match", batch_size=2)
    assert int(asked.own.sum()) == 20 == int((~asked.own).sum())
    assert float(asked.right[asked.own].double().mean()) > 0.9
    assert not asked.right[~asked.own].any()
    alone = ask_rows(model, given, "exact_match", batch_size=5)
    order = [part.context * 2 + (~part.own).long() for part in (asked, alone)]
    by_context = [part.features[at.argsort(stable=True)] for part, at in zip((asked, alone), order, strict=True)]
    torch.testing.assert_close(*by_context, rtol=1e-4, atol=1e-4)


def test_the_memory_of_another_row_is_that_of_another_context(model):
    """Where each question is a row of its own, the row before it mostly has the same context, and the answer."""
    grouped = list(rows(3))
    single = [
        row | {"queries": [query], "targets": [target]}
        for row in grouped
        for query, target in zip(row["queries"], row["targets"], strict=True)
    ]
    expected = ask_rows(model, grouped, "exact_match")
    for batch_size in (1, 3, 16):
        asked = ask_rows(model, single, "exact_match", batch_size=batch_size)
        assert not asked.right[~asked.own].any()
        torch.testing.assert_close(asked.features[~asked.own], expected.features[~expected.own], rtol=1e-4, atol=1e-4)


def test_questions_on_one_text_are_of_one_context_wherever_they_stand(model):
    """Folds are of contexts: a fit that has seen one question of a text has seen its memory."""
    given = [
        row | {"queries": row["queries"][half::2], "targets": row["targets"][half::2]}
        for half in (0, 1)
        for row in rows(3)
    ]
    given[-1]["context"] = ["".join(given[-1]["context"])]
    numbers = {}
    asked = ask_rows(model, given, "exact_match", numbers)
    assert sorted(asked.context.tolist()) == [0] * 8 + [1] * 8 + [2] * 8
    again = ask_rows(model, given[:2], "exact_match", numbers)
    assert set(again.context.tolist()) == {0, 1}
    both = Dataset.from_list(given)
    assert count_contexts({"a": both, "b": first_contexts(both, 2)}) == "3 contexts of a, 2 contexts of b"
    assert first_contexts(both, 2)["queries"] == [given[place]["queries"] for place in (0, 1, 3, 4)]


def test_a_calibration_tells_own_memories_from_others_on_contexts_that_it_did_not_see(model):
    result = run_calibration(model, {"four": rows()}, METRICS, "fifteen contexts")
    measured = result["sets"]["all"]
    assert measured["auroc"] > 0.85  # 0.92 here; 0.5 by chance
    assert measured["auroc_own_or_other"] > 0.85
    assert model.config.confidence["calibration_set"] == "fifteen contexts"
    assert model.config.confidence["num_questions"] == 120
    assert model.config.confidence["measured"] == measured
    told = model.answer(["?!a:", "?!y:"], model.write([["!a:1!", "!b:2!", "!c:3!"]], measure_final_loss=True))
    assert told[0].confidence > told[1].confidence


def test_what_cannot_be_calibrated_is_refused(model):
    with pytest.raises(ValueError, match="no confidence to measure"):
        run_calibration(model, {"four": rows(2)}, METRICS, "two", fit=False)
    with pytest.raises(ValueError, match="The answers of text are not compared with anything"):
        run_calibration(model, {"four": rows(2), "text": rows(2)}, METRICS, "two")
    with pytest.raises(ValueError, match="of 1 rows none has another context"):
        ask_rows(model, list(rows(1)), "exact_match")
    wrong = rows(2).map(lambda row: row | {"targets": ["??|"] * 4})
    with pytest.raises(ValueError, match="All of the 16 answers are wrong"):
        run_calibration(model, {"four": wrong}, METRICS, "two")


def test_the_command_writes_the_configuration_and_nothing_else(tmp_path):
    adapter = shutil.copytree(RETRIEVAL_ADAPTER, tmp_path / "adapter")
    options = ["--recipe", RECIPE, "--set", "n4", "--contexts", 24]
    assert "no confidence to measure" in mistake(run("calibrate", adapter, *options, "--check"))
    result = run("calibrate", adapter, *options, "--report", tmp_path / "report.json", "--json")
    assert result.exit_code == 0, result.output
    report = json.loads(result.stdout)
    assert report == json.loads((tmp_path / "report.json").read_text(encoding="utf-8"))
    before, after = (json.loads((path / "config.json").read_text("utf-8")) for path in (RETRIEVAL_ADAPTER, adapter))
    assert after == before | {"confidence": report["confidence"]}
    assert report["confidence"]["calibration_set"] == "kv_retrieval validation: 24 contexts of n4"
    assert {path.name for path in adapter.iterdir()} == {path.name for path in RETRIEVAL_ADAPTER.iterdir()}
    assert GradMemForCausalLM.from_pretrained(adapter).config.confidence == report["confidence"]
    checked = json.loads(run("calibrate", adapter, *options, "--split", "test", "--check", "--json").stdout)
    assert checked["confidence"] == report["confidence"]
    assert checked["sets"]["n4"]["auroc"] > 0.75
    assert "no directory of an adapter" in mistake(run("calibrate", tmp_path / "none", *options))


def test_the_command_refuses_what_it_would_lose_and_what_would_do_nothing(tmp_path):
    adapter = shutil.copytree(RETRIEVAL_ADAPTER, tmp_path / "adapter")
    recipe = shutil.copy(RECIPE, tmp_path / "recipe.yaml")
    options = ["--recipe", recipe, "--set", "n4"]
    for report in (adapter / "config.json", adapter / ".." / "adapter" / "README.md", recipe):
        for check in ([], ["--check"]):
            told = mistake(run("calibrate", adapter, *options, "--report", report, *check))
            assert "is another file of this command, which would be lost" in told
    for override in ("gradmem.write_steps=7", "gradmem={write_steps: 7}"):
        assert f"--override {override} would do nothing" in mistake(
            run("calibrate", adapter, *options, "--override", override)
        )


def test_the_card_shows_how_far_the_confidence_holds(tmp_path):
    model = with_memory(named_base(tmp_path / "base"), **PLAIN)
    model.save_pretrained(tmp_path / "adapter")
    table = [{"from": 0.9, "to": 1.0, "confidence": 0.95, "right": 0.75, "count": 1200}]
    measured = {"auroc": 0.875, "auroc_own_or_other": None, "brier": 0.125, "num_answers": 1200, "reliability": table}
    for count in (120, 240):  # the second takes the place of the first
        save_confidence(tmp_path / "adapter", WHOLE | {"num_questions": count, "measured": measured})
    card = (tmp_path / "adapter" / "README.md").read_text(encoding="utf-8")
    assert card.count("## How sure an answer is") == card.count("## Limits") == 1
    assert "fitted on 240 answers" in card
    assert "above wrong ones 0.875; Brier score 0.125." in card
    assert "| 0.9 to 1.0 | 0.950 | 0.750 | 1,200 |" in card
    model.config.confidence = WHOLE | {"num_questions": 240, "measured": measured}
    model.save_pretrained(tmp_path / "adapter")
    assert (tmp_path / "adapter" / "README.md").read_text(encoding="utf-8") == card
    (tmp_path / "adapter" / "README.md").write_text("à moi", encoding="latin-1")
    save_confidence(tmp_path / "adapter", WHOLE)
    assert (tmp_path / "adapter" / "README.md").read_text(encoding="latin-1") == "à moi"
