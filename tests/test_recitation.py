"""The arithmetic of the benchmark of recitation, on a tiny model in float64, against plain forward passes."""

import json

import pytest
import torch
from torch.nn import functional
from transformers import LlamaConfig, LlamaForCausalLM

from benchmarks.recitation import (
    CONTINUED,
    WRITTEN,
    Report,
    continuation_losses,
    longest,
    measure,
    memories_after,
    recited,
    tables,
)
from hf_gradmem import GradMemConfig, get_gradmem_model

CONDITIONS = {"base": "tiny", "start": "random start", "texts": 2, "steps": [1, 3], "books": ["a.txt"]}


@pytest.fixture
def model():
    shape = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
    base = LlamaForCausalLM(LlamaConfig(vocab_size=40, initializer_range=0.2, **shape)).double()
    adam = {"write_optimizer": "adam", "write_learning_rate": 0.3, "meta_gradient": "first_order"}
    return get_gradmem_model(base, GradMemConfig(num_memory_tokens=2, **adam))


@pytest.fixture
def texts():
    return torch.randint(4, 40, (2, WRITTEN + CONTINUED))


def test_memories_on_the_way_are_those_of_runs_that_end_there(model, texts):
    found = memories_after(model, texts[:, :7], [4, 1, 3])
    for steps, memory in found.items():
        alone = model.write(input_ids=texts[:, :7], write_steps=steps)
        torch.testing.assert_close(memory.embeddings, alone.embeddings, rtol=1e-12, atol=1e-12)
    again = model.write(input_ids=texts[:, :7], write_steps=4)  # nothing is recorded any more, and the rule is back
    torch.testing.assert_close(again.embeddings, found[4].embeddings, rtol=0, atol=0)


def test_recited_tokens_are_the_likeliest_after_the_right_ones(model, texts):
    context = texts[:, :9]
    memory = memories_after(model, context, [6])[6]
    with torch.no_grad():
        embeddings = torch.cat([memory.embeddings, model.get_input_embeddings()(context)], dim=1)
        likeliest = model.base_model(inputs_embeds=embeddings).logits[:, 1:-1].argmax(-1)
    expected = (likeliest == context).double().mean(1)
    assert 0 < expected.mean() < 1
    torch.testing.assert_close(recited(model, context, memory.embeddings).double(), expected, rtol=0, atol=1e-7)


def test_a_continuation_is_scored_on_the_same_tokens_whatever_it_is_given(model, texts):
    memory = memories_after(model, texts[:, :WRITTEN], [2])[2]
    losses = continuation_losses(model, texts, memory)
    continued = texts[:, WRITTEN:]
    with torch.no_grad():
        vectors = torch.cat([memory.embeddings, model.get_input_embeddings()(continued)], dim=1)
        runs = {
            "memory": model.base_model(inputs_embeds=vectors).logits[:, 2:],
            "full context": model.base_model(input_ids=texts).logits[:, WRITTEN:],
            "nothing": model.base_model(input_ids=continued).logits,
        }
    for given, logits in runs.items():
        log_probs = functional.log_softmax(logits, dim=-1)[:, :-1].gather(2, continued[:, 1:, None])
        torch.testing.assert_close(
            torch.tensor(losses[given], dtype=torch.float64), -log_probs.mean((1, 2)), rtol=1e-5, atol=1e-6
        )
    assert len({round(sum(values), 6) for values in losses.values()}) == 3


@pytest.mark.parametrize(
    ("accuracies", "expected"),
    [({8: 1.0, 16: 0.96, 24: 0.9, 32: 0.97}, 16), ({16: 0.95, 8: 0.99}, 16), ({8: 0.94, 16: 1.0}, None)],
)
def test_the_longest_length_is_one_that_all_shorter_ones_reach(accuracies, expected):
    assert longest(accuracies, 0.95) == expected


def test_a_run_that_was_interrupted_goes_on_and_other_conditions_are_refused(model, texts, tmp_path, monkeypatch):
    path = tmp_path / "recitation.json"
    measure({2: model}, texts, [4], [1, 3], Report(path, CONDITIONS))
    first = json.loads(path.read_text())
    assert first["recited"].keys() == {"2 vectors, 4 tokens"}
    written = []
    monkeypatch.setattr(
        "benchmarks.recitation.memories_after",
        lambda *given: written.append(given[1].shape[1]) or memories_after(*given),
    )
    measure({2: model}, texts, [4, 6], [1, 3], Report(path, CONDITIONS))
    assert written == [6]
    kept = json.loads(path.read_text())
    assert kept["recited"]["2 vectors, 4 tokens"] == first["recited"]["2 vectors, 4 tokens"]
    assert path.with_suffix(".md").read_text().splitlines() == tables(kept)
    with pytest.raises(ValueError, match=r"results of .*'texts': 2.* not of .*'texts': 3"):
        Report(path, CONDITIONS | {"texts": 3})


def test_the_tables_hold_means_over_passages_and_the_longest_lengths():
    cells = {
        "a": {"vectors": 2, "tokens": 8, "accuracy": {"1": [0.5, 1.0], "3": [1.0, 1.0]}},
        "b": {"vectors": 2, "tokens": 16, "accuracy": {"1": [1.0, 1.0], "3": [0.9375, 1.0]}},
    }
    losses = {"memory": [3.0, 4.0], "full context": [2.0, 2.0], "nothing": [3.0, 3.5]}
    continued = {"c": {"vectors": 2, "steps": 3, "losses": losses}}
    lines = tables({"conditions": CONDITIONS, "recited": cells, "continuation": continued})
    assert "| 2 | – / – | 16 / 8 |" in lines
    assert "| 2 | 8 | 0.750 | 1.000 |" in lines
    assert "| 2 | 16 | 1.000 | 0.969 |" in lines
    assert "| 2 | 3 | 3.500 | 2.000 | 3.250 |" in lines
