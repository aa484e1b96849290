"""One matrix over each dict of variants: what holds for every variant of a kind, a new one included.

A variant that is added to a dict is tested here by that alone.
"""

import itertools
from dataclasses import fields
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from hf_gradmem import GradMemConfig, GradMemForCausalLM, get_gradmem_model
from hf_gradmem.evaluation import evaluate_rows
from hf_gradmem.exports import EXPORTS
from hf_gradmem.losses import LOSSES
from hf_gradmem.memory import FORMS
from hf_gradmem.tasks import TASKS, load_task
from hf_gradmem.variants import KINDS, choices, options_of
from hf_gradmem.writing.contexts import Contexts
from hf_gradmem.writing.meta_gradients import META_GRADIENTS
from hf_gradmem.writing.objectives import OBJECTIVES
from hf_gradmem.writing.writers import WRITERS
from tests.support.tiny_models import tiny_causal_lm, tiny_tokens

# Beside the forms by their names, forms with settings of their own.
WITH_SETTINGS = [{"name": "key_values", "write": "values"}]
OWN_START = "own_start"  # a setting with tests of its own, in tests/memory/test_key_values.py
# What the configuration has no place for.
REFUSED = {("forward", "key_values"), ("pooled", "key_values")}
LONG, SHORT, QUERY = tiny_tokens(1, 9, seed=1), tiny_tokens(1, 6, seed=2), tiny_tokens(2, 4, seed=3)


def name_of(choice: str | dict[str, Any]) -> str:
    return choice if isinstance(choice, str) else choice["name"]


def every_combination() -> list[Any]:
    """Every writer and form, with every variant of the kinds that the writer reads."""
    found = []
    for writer, form in itertools.product(WRITERS, [*FORMS, *WITH_SETTINGS]):
        if (writer, name_of(form)) in REFUSED:
            continue
        kinds = [kind for kind in options_of(WRITERS[writer]) if kind in KINDS]
        for names in itertools.product(*(KINDS[kind] for kind in kinds)):
            settings = {"writer": writer, "memory_form": form} | dict(zip(kinds, names, strict=True))
            words = [writer, *(form.values() if isinstance(form, dict) else [form]), *names]
            found.append(pytest.param(settings, id="-".join(words)))
    return found


def build(**settings) -> GradMemForCausalLM:
    torch.manual_seed(0)
    rate = 0.02 if settings.get("write_optimizer") == "adam" else 0.3
    defaults = {"num_memory_tokens": 3, "write_steps": 2, "write_learning_rate": rate}
    return get_gradmem_model(tiny_causal_lm("llama"), GradMemConfig(**defaults | settings))


def padded(side: str) -> dict[str, torch.Tensor]:
    """Both contexts in one batch, the shorter one padded on one side."""
    ids, mask = torch.zeros((2, 9), dtype=torch.long), torch.zeros((2, 9), dtype=torch.long)
    ids[0], mask[0] = LONG[0], 1
    place = slice(0, 6) if side == "right" else slice(3, 9)
    ids[1, place], mask[1, place] = SHORT[0], 1
    return {"input_ids": ids, "attention_mask": mask}


# ------------------------------------------------------------------------------------------------ writing


@pytest.mark.parametrize("settings", every_combination())
def test_a_memory_depends_on_no_batch_and_no_padding_and_has_no_graph(settings):
    model = build(**settings)
    alone = [model.write(input_ids=ids) for ids in (LONG, SHORT)]
    for side in ("left", "right"):
        together = model.write(**padded(side))
        for row, memory in enumerate(alone):
            torch.testing.assert_close(together.embeddings[row], memory.embeddings[0], rtol=1e-6, atol=1e-8)
            torch.testing.assert_close(
                together.write_losses[row], memory.write_losses[0], rtol=1e-6, atol=1e-8, equal_nan=True
            )
        assert together.embeddings.shape == (2, *model.form.shape)
        assert not together.embeddings.requires_grad
        assert not together.write_losses.requires_grad
    start = model.form.start(1).detach()
    assert not torch.allclose(alone[0].embeddings, start.expand_as(alone[0].embeddings))
    assert all(parameter.grad is None for parameter in model.parameters())


@pytest.mark.parametrize("settings", every_combination())
def test_a_saved_model_answers_as_before(settings, tmp_path):
    model = build(**settings)
    memory = model.write(**padded("left"))
    model.save_pretrained(tmp_path / "model")
    memory.save_pretrained(tmp_path / "memory")
    loaded = GradMemForCausalLM.from_pretrained(tmp_path / "model")
    for name in KINDS:
        assert getattr(loaded.config, name) == getattr(model.config, name)
    kept = type(memory).from_pretrained(tmp_path / "memory")
    assert torch.equal(loaded.write(**padded("left")).embeddings, memory.embeddings)
    with torch.no_grad():
        assert torch.equal(loaded(input_ids=QUERY, memory=kept).logits, model(input_ids=QUERY, memory=memory).logits)
    length = {"max_new_tokens": 3, "min_new_tokens": 3, "do_sample": False}
    answers = model.generate(input_ids=QUERY, memory=memory, **length)
    assert torch.equal(loaded.generate(input_ids=QUERY, memory=kept, **length), answers)


@pytest.mark.parametrize("settings", every_combination())
def test_a_step_of_training_lowers_the_loss_with_a_finite_gradient(settings):
    model = build(**settings)
    model.base_model.requires_grad_(True)
    inputs = {f"context_{name}": value for name, value in padded("right").items()}
    inputs |= {"input_ids": QUERY, "labels": QUERY}
    model.train()
    loss = model(**inputs).loss
    loss.backward()
    gradients = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    assert all(gradient.isfinite().all() for gradient in gradients.values())
    assert any(gradient.any() for gradient in gradients.values())
    if settings["writer"] == "pooled":
        assert "memory_init" not in gradients
    elif settings.get("meta_gradient") != "none":
        assert gradients["memory_init"].any()
    size = torch.stack([gradient.norm() for gradient in gradients.values()]).norm()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name in gradients:
                parameter -= 1e-3 * gradients[name] / size
        assert model(**inputs).loss < loss


@pytest.mark.parametrize(("writer", "form"), sorted(REFUSED))
def test_what_does_not_go_together_is_refused(writer, form):
    with pytest.raises(ValueError, match=form):
        build(writer=writer, memory_form=form)


@pytest.mark.parametrize("objective", OBJECTIVES)
@pytest.mark.parametrize("form", [*FORMS, *WITH_SETTINGS], ids=str)
def test_every_way_to_take_an_objective_gives_one_loss_and_one_gradient(objective, form):
    model = build(memory_form=form, write_objective=objective)
    contexts = Contexts(*padded("left").values(), None)
    loss = model.writer.objective(model.writer.rows(contexts))
    memory = model.form.start(2).detach().clone()
    memory = (memory + 0.1 * torch.randn_like(memory)).requires_grad_()
    losses = loss(memory)
    (gradient,) = torch.autograd.grad(losses.sum(), memory)
    assert losses.shape == (2,)
    for lean in (loss.first_order(memory), loss.value_and_gradient(memory)[0]):
        torch.testing.assert_close(lean.detach(), losses.detach(), rtol=1e-9, atol=1e-10)
    for lean in (torch.autograd.grad(loss.first_order(memory).sum(), memory)[0], loss.value_and_gradient(memory)[1]):
        torch.testing.assert_close(lean, gradient, rtol=1e-6, atol=1e-9)
    for way_back in META_GRADIENTS:
        writer = build(memory_form=form, write_objective=objective, meta_gradient=way_back).writer
        back = writer.meta_gradient(writer.objective(writer.rows(contexts)), memory)
        for actual, expected in zip(back, (losses, gradient), strict=True):
            torch.testing.assert_close(actual.detach(), expected.detach(), rtol=1e-6, atol=1e-9)


# ------------------------------------------------------------------------------------------------ options

DEFAULTS = {field.name: field.default for field in fields(GradMemConfig)}
ALWAYS_SET = {"write_learning_rate", "checkpoint_write_steps"}  # which stay with an adapter whatever is chosen
OTHER_VALUES = {
    "learn_write_learning_rate": "per_step",
    "write_loss_reduction": "sum",
    "write_betas": (0.5, 0.5),
    "write_step_decay": 0.5,
    "template": "question",
    "write_prompt": "Note:",
}


def other_value(option: str) -> Any:
    """A value of an option that is not its default; `None` where it has no other."""
    default = DEFAULTS[option]
    if option in KINDS:
        return next((name for name in KINDS[option] if name != default), None)
    if option in OTHER_VALUES:
        return OTHER_VALUES[option]
    return (not default) if isinstance(default, bool) else (default or 0) + 1


DECLARED = sorted(
    {option for variants in KINDS.values() for variant in variants.values() for option in options_of(variant)}
    & {option for option in DEFAULTS if other_value(option) is not None}
)


def read_by(**choice: str) -> set[str]:
    """Options that something reads beside this choice, the others being the defaults."""
    return {option for _, _, variant in choices(GradMemConfig(**choice)) for option in options_of(variant)}


EVERY_CHOICE = [
    (kind, name, option)
    for kind, variants in KINDS.items()
    for name in variants
    for option in DECLARED
    if option != kind
]


@pytest.mark.parametrize(("kind", "name", "option"), EVERY_CHOICE)
def test_an_option_is_taken_where_it_is_read_and_refused_where_it_is_not(kind, name, option):
    choice = {kind: name, option: other_value(option)}
    if option in read_by(**{kind: name}) | ALWAYS_SET:
        assert getattr(GradMemConfig(**choice), option) == other_value(option)
    else:
        with pytest.raises(ValueError, match=option):
            GradMemConfig(**choice)


@pytest.mark.parametrize("kind", KINDS)
def test_an_unknown_variant_is_refused_with_the_known_ones(kind):
    with pytest.raises(ValueError, match=rf"{kind} must be one of .*{next(iter(KINDS[kind]))}.*got 'no_such'"):
        GradMemConfig(**{kind: "no_such"})


@pytest.mark.parametrize("form", FORMS)
def test_a_setting_that_a_form_does_not_have_is_refused(form):
    with pytest.raises(ValueError, match=f"memory_form='{form}' has no setting 'no_such'"):
        GradMemConfig(memory_form={"name": form, "no_such": 1})


def test_every_option_that_a_variant_declares_is_one_of_the_configuration_or_a_setting_of_a_form():
    settings = {name for choice in WITH_SETTINGS for name in choice if name != "name"} | {OWN_START}
    for variants in KINDS.values():
        for variant in variants.values():
            assert set(options_of(variant)) <= DEFAULTS.keys() | settings, variant


# ------------------------------------------------------------------------------------------------ other kinds


@pytest.mark.parametrize("loss", LOSSES)
def test_a_term_of_the_outer_loss_is_added_times_its_weight(loss):
    weight, terms = f"{loss}_loss_weight", []
    assert weight in DEFAULTS
    inputs = {f"context_{name}": value for name, value in padded("right").items()}
    for value in (0.0, 1.0, 2.0):
        others = {f"{name}_loss_weight": 0.0 for name in LOSSES}
        output = build(**others | {weight: value})(**inputs, input_ids=QUERY, labels=QUERY)
        terms.append((output.loss - output.read_loss).item())
    assert terms[0] == 0
    assert terms[1] != 0
    assert terms[2] == pytest.approx(2 * terms[1], rel=1e-9)
    with pytest.raises(ValueError, match=f"{weight} must be at least 0"):
        GradMemConfig(**{weight: -1.0})


@pytest.mark.parametrize("task", TASKS)
def test_a_task_refuses_what_it_does_not_take(task):
    with pytest.raises(ValueError, match=f"'{task}' does not take these arguments"):
        load_task(task, no_such_argument=1)
    with pytest.raises(ValueError, match="split"):
        load_task(task, "no_such_split")
    if TASKS[task].stream is None:
        with pytest.raises(ValueError, match="has no stream"):
            load_task(task, streaming=True)


@pytest.mark.parametrize("task", TASKS)
def test_a_task_is_scored_by_a_metric_that_there_is(task):
    """A metric that there is not would be refused by name; that there are no rows is what is found next."""
    with pytest.raises(ValueError, match="no row was given"):
        evaluate_rows(build(), [], [0], metric=TASKS[task].metric)


@pytest.mark.parametrize("export", EXPORTS)
def test_an_export_holds_finite_tensors_and_names_no_other_file(export, tmp_path):
    tiny_causal_lm("llama", torch.float32).save_pretrained(tmp_path / "base")
    base = type(tiny_causal_lm("llama")).from_pretrained(tmp_path / "base")
    model = get_gradmem_model(base, GradMemConfig(num_memory_tokens=3))
    EXPORTS[export](model.stock_prefix(model.write(input_ids=LONG)), tmp_path / "new" / "export")
    files = list((tmp_path / "new" / "export").iterdir())
    (weights,) = [file for file in files if file.suffix == ".safetensors"]
    assert all(tensor.isfinite().all() for tensor in load_file(weights).values())
    assert {file.suffix for file in files} <= {".safetensors", ".json"}


@pytest.mark.parametrize("form", [form for form in FORMS if form != "input_vectors"])
def test_a_form_that_stock_formats_do_not_hold_is_not_exported(form, tmp_path):
    tiny_causal_lm("llama", torch.float32).save_pretrained(tmp_path / "base")
    base = type(tiny_causal_lm("llama")).from_pretrained(tmp_path / "base")
    model = get_gradmem_model(base, GradMemConfig(num_memory_tokens=3, memory_form=form))
    with pytest.raises(ValueError, match="cannot be exported"):
        model.stock_prefix(model.write(input_ids=LONG))
