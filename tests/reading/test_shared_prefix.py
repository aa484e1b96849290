"""Many queries on one memory: what stands before them is run once, and what they give is what it was."""

import pytest
import torch

from hf_gradmem import GradMemConfig, get_gradmem_model
from hf_gradmem.reading import read
from hf_gradmem.reading.queries import Queries
from hf_gradmem.reading.scoring import mean_log_probs
from tests.support.tiny_models import tiny_causal_lm, tiny_tokens

ROWS, LENGTH = 40, 6


@pytest.fixture(params=[("llama", torch.float64), ("llama", torch.float32), ("gpt2", torch.float64)])
def model(request):
    model_type, dtype = request.param
    torch.manual_seed(0)
    lora = {"r": 2, "target_modules": ["c_attn" if model_type == "gpt2" else "q_proj"], "init_lora_weights": False}
    config = GradMemConfig(num_memory_tokens=4, num_control_tokens=1, write_steps=1, read_lora=lora)
    return get_gradmem_model(tiny_causal_lm(model_type, dtype), config)


@pytest.fixture
def shared(model, monkeypatch):
    """Runs something with each memory's prefix run once, and as if each query had one of its own; and compares."""
    of_prefixes, kept = [], model.decoder.keys_and_values

    def counted(inputs):
        of_prefixes.append(len(inputs.embeddings))
        return kept(inputs)

    monkeypatch.setattr(model.decoder, "keys_and_values", counted)

    def compare(run, expected_runs):
        with torch.no_grad():
            once = run()
            assert of_prefixes == expected_runs
            monkeypatch.setattr(read, "_WORTH_A_RUN", 10**9)
            apart = run()
        assert of_prefixes == expected_runs
        exact = model.memory_init.dtype == torch.float64
        torch.testing.assert_close(once, apart, rtol=1e-9 if exact else 1e-4, atol=1e-9 if exact else 1e-4)

    return compare


def queries_on(num_memories: int):
    """Queries of 1 to 6 tokens, padded on either side, on all memories but the last."""
    lengths = 1 + torch.arange(ROWS) % LENGTH
    mask = (torch.arange(LENGTH) < lengths[:, None]).long()
    mask[::2] = mask[::2].flip(1)
    return {
        "input_ids": tiny_tokens(ROWS, LENGTH),
        "attention_mask": mask,
        "context_index": torch.arange(ROWS) % (num_memories - 1),
    }


def test_logits_and_losses_of_padded_queries(model, shared):
    memory = model.write(input_ids=tiny_tokens(3, 9, seed=1))
    given = queries_on(3)
    real = given["attention_mask"].bool()

    def run():
        output = model(memory=memory, labels=given["input_ids"], **given)
        return output.logits[real], output.loss

    shared(run, [2])


def test_scores(model, shared):
    memory = model.write(input_ids=tiny_tokens(3, 9, seed=1)).embeddings
    given = queries_on(3)
    queries = Queries(given["input_ids"], given["attention_mask"], given["input_ids"], given["context_index"], (ROWS,))
    shared(lambda: mean_log_probs(model.read_phase, memory, queries), [2])


@pytest.mark.parametrize("options", [{}, {"num_beams": 2, "num_return_sequences": 2}])
def test_tokens_of_prompts_of_one_length(model, shared, options):
    memory = model.write(input_ids=tiny_tokens(1, 9, seed=1))
    prompts = tiny_tokens(ROWS, LENGTH)
    arguments = {"max_new_tokens": 4, "do_sample": False, "eos_token_id": None, **options}
    shared(lambda: model.generate(prompts, memory=memory, **arguments), [1])


def test_prompts_that_are_padded_have_their_memory_beside_them(model, shared):
    memory = model.write(input_ids=tiny_tokens(3, 9, seed=1))
    arguments = {"max_new_tokens": 4, "do_sample": False, "eos_token_id": None}
    shared(lambda: model.generate(memory=memory, **queries_on(3), **arguments), [])


@pytest.mark.parametrize("num_memory_tokens", [7, 12])
def test_behind_a_sliding_window_the_prefix_is_run_once_where_it_is_kept_whole(num_memory_tokens, monkeypatch):
    torch.manual_seed(0)
    model = get_gradmem_model(tiny_causal_lm("mistral"), GradMemConfig(num_memory_tokens=num_memory_tokens))
    memory, queries = model.write(input_ids=tiny_tokens(1, 9, seed=1)), tiny_tokens(ROWS, LENGTH)
    with torch.no_grad():
        together = model(input_ids=queries, memory=memory).logits
        assert model.decoder.keeps_in_cache(num_memory_tokens - 1) == (num_memory_tokens == 7)
        monkeypatch.setattr(read, "_WORTH_A_RUN", 10**9)
        torch.testing.assert_close(model(input_ids=queries, memory=memory).logits, together, rtol=1e-6, atol=1e-6)


def test_training_and_few_queries_take_one_run(model, monkeypatch):
    def fail(inputs):
        raise AssertionError("a run that spares nothing")

    memory = model.write(input_ids=tiny_tokens(3, 9, seed=1))
    monkeypatch.setattr(model.decoder, "keys_and_values", fail)
    given = queries_on(3)
    model(memory=memory, labels=given["input_ids"], **given).loss.backward()
    with torch.no_grad():
        model(memory=memory, **{name: values[:4] for name, values in given.items()})
