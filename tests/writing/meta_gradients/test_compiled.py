"""Compiled training steps: the results of the plain ones, one graph for many lengths, and a clear fall back."""

import copy
import os
import pickle
import shutil
import warnings

import pytest
import torch
from functorch.compile import nop
from torch._dynamo.backends.common import aot_autograd
from torch._dynamo.utils import counters
from transformers import Trainer, TrainingArguments, default_data_collator

from hf_gradmem import GradMemForCausalLM
from tests.support.gradients import EVERYTHING, SEGMENT_IDS, assert_same, build, gradients_of, loss_of, training
from tests.support.tiny_models import tiny_tokens


@pytest.fixture(autouse=True)
def nothing_compiled_before():
    torch.compiler.reset()
    counters.clear()


def warnings_of(model: GradMemForCausalLM) -> list[str]:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        gradients_of(model)
    return [str(each.message) for each in caught]


@pytest.mark.parametrize(
    ("settings", "segment_ids"),
    [
        (EVERYTHING, SEGMENT_IDS),
        ({"checkpoint_write_steps": False}, None),
        ({"write_segments_in_turn": True}, SEGMENT_IDS),
        ({"meta_gradient_steps": 1, "write_optimizer": "adam"}, None),
        ({"alignment_loss_weight": 0.5, "intermediate_read_loss_weight": 0.5}, SEGMENT_IDS),
    ],
    ids=["everything", "unrolled", "in turn", "last step", "terms of the steps"],
)
def test_gradients_are_those_of_the_plain_step(settings, segment_ids):
    model = training(**settings)
    expected = gradients_of(model, segment_ids=segment_ids)
    model.compile(backend="eager")
    compiled = gradients_of(model, segment_ids=segment_ids)
    assert counters["stats"]["unique_graphs"] >= 1
    assert not counters["graph_break"]
    assert_same(compiled, expected)


def test_the_backward_pass_of_the_traced_graph_is_right():
    """What `backend="eager"` leaves to autograd, AOTAutograd works out ahead of time, as it does for inductor."""
    model = training()
    expected = gradients_of(model)
    model.compile(backend="aot_eager")
    assert_same(gradients_of(model), expected)


def test_one_graph_for_all_steps_and_one_more_for_all_lengths():
    model = training(write_steps=3)
    model.compile(backend="eager")
    for length, graphs in ((9, 1), (5, 2), (7, 2), (12, 2)):
        ids = tiny_tokens(2, length)
        model(context_input_ids=ids, input_ids=ids, labels=ids).loss.backward()
        assert counters["stats"]["unique_graphs"] == graphs


def test_evaluation_and_write_of_exact_mode_are_left_as_they_are():
    model = build()
    ids = tiny_tokens(2, 9)
    model.compile(backend="eager")
    model.write(input_ids=ids)
    with torch.no_grad():
        loss_of(model)
    assert "unique_graphs" not in counters["stats"]


def no_compiler(graph, inputs):
    raise RuntimeError("there is no compiler here")


def test_a_failing_compiler_is_told_of_once_and_training_goes_on():
    model = training()
    expected = gradients_of(model)
    model.compile(backend=no_compiler)
    (message,) = warnings_of(model)
    assert "cannot be compiled" in message
    assert "there is no compiler here" in message
    assert "compile()" in message
    assert warnings_of(model) == []
    assert_same(gradients_of(model), expected)


def test_a_compiler_that_fails_in_the_backward_pass_is_told_of_as_well():
    model = training(checkpoint_write_steps=False)
    expected = gradients_of(model)
    model.compile(backend=aot_autograd(fw_compiler=nop, bw_compiler=no_compiler))
    (message,) = warnings_of(model)
    assert "there is no compiler here" in message
    assert_same(gradients_of(model), expected)


def test_more_shapes_than_are_compiled_are_trained_uncompiled():
    model = training()
    model.compile(backend="eager")
    with torch._dynamo.config.patch(recompile_limit=1), warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for length in (9, 5, 7):
            ids = tiny_tokens(2, length)
            model(context_input_ids=ids, input_ids=ids, labels=ids).loss.backward()
    assert [str(each.message).startswith("WRITE cannot be compiled") for each in caught] == [True]


def test_models_do_not_use_up_each_other_s_graphs():
    with torch._dynamo.config.patch(recompile_limit=1):
        for memory_tokens in (2, 3):
            model = training(num_memory_tokens=memory_tokens)
            model.compile(backend="eager")
            assert warnings_of(model) == []


def test_copies_and_pickles_are_uncompiled():
    model = training()
    expected = gradients_of(model)
    model.compile(backend="eager")
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert_same(gradients_of(twin), expected)
    assert "unique_graphs" not in counters["stats"]


def test_a_base_that_cannot_be_traced_trains_uncompiled():
    model = training()
    expected = gradients_of(model)
    decoder = model.get_decoder()
    decoder.register_forward_hook(lambda module, inputs, output: print(end=str(output[0].sum().item())[:0]))
    model.compile(backend="eager")
    (message,) = warnings_of(model)
    assert "uncompiled" in message
    assert_same(gradients_of(model), expected)


def test_torch_compile_of_the_model_compiles_the_step(monkeypatch):
    """As one graph WRITE would have no second derivative."""
    model = training()
    expected = gradients_of(model)
    wrapped = torch.compile(model, backend="eager")
    plain_compile = torch.compile
    monkeypatch.setattr(torch, "compile", lambda *args, **options: plain_compile(*args, **options, backend="eager"))
    model.zero_grad()
    loss_of(wrapped).backward()
    assert counters["stats"]["unique_graphs"] == 1
    assert_same({name: p.grad for name, p in model.named_parameters() if p.grad is not None}, expected)


@pytest.mark.parametrize("settings", [{"meta_gradient": "finite_difference"}, {"writer": "forward"}])
def test_what_takes_no_second_derivative_has_its_base_compiled(settings):
    model = training(**settings)
    expected = gradients_of(model)
    model.compile(backend="eager")
    compiled = gradients_of(model)
    assert counters["stats"]["unique_graphs"] >= 1
    assert compiled.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(compiled[name], value, rtol=1e-6, atol=1e-9, msg=name)


@pytest.mark.slow
@pytest.mark.skipif(shutil.which(os.environ.get("CXX", "g++")) is None, reason="inductor needs a C++ compiler")
def test_trainer_compiles_with_inductor(tmp_path):
    """`TrainingArguments(torch_compile=True)`, with the stock compiler, in float32."""
    contexts, queries = tiny_tokens(8, 9, seed=1), tiny_tokens(8, 5, seed=2)
    rows = [
        {"context_input_ids": context.tolist(), "input_ids": query.tolist(), "labels": query.tolist()}
        for context, query in zip(contexts, queries, strict=True)
    ]
    histories = []
    for compiled in (False, True):
        model = training().float()
        arguments = TrainingArguments(
            str(tmp_path),
            max_steps=3,
            per_device_train_batch_size=4,
            torch_compile=compiled,
            logging_steps=1,
            save_strategy="no",
            report_to=[],
            use_cpu=True,
            disable_tqdm=True,
        )
        trainer = Trainer(model, arguments, train_dataset=rows, data_collator=default_data_collator)
        trainer.train()
        histories.append([entry["loss"] for entry in trainer.state.log_history if "loss" in entry])
    assert counters["stats"]["unique_graphs"] >= 1
    assert histories[1] == pytest.approx(histories[0], rel=1e-4)
