"""Transformers' own common tests, run on [`GradMemForCausalLM`] over a tiny Llama and a tiny GPT-2.

    python -m tests.support.transformers_common SOURCE --note benchmarks/results/transformers_tests.md

SOURCE is the unpacked source distribution of the installed Transformers (a wheel holds no tests), or a checkout of its
repository; `make transformers-tests` fetches the former. The package `parameterized` is needed as well. Or by pytest:

    TRANSFORMERS_SOURCE=SOURCE python -m pytest tests/support/transformers_common.py
"""

import argparse
import copy
import functools
import importlib
import inspect
import os
import re
import sys
import types
import unittest
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from importlib.metadata import version
from pathlib import Path
from unittest import mock

import pytest
import torch
import transformers
from torch import nn

from hf_gradmem import GradMemConfig, GradMemForCausalLM, GradMemOutput
from tests.support.tiny_models import FIRST_ORDINARY_TOKEN, VOCAB_SIZE, tiny_config

VARIABLE = "TRANSFORMERS_SOURCE"
_PACKAGE = "transformers_own_tests"
# Parts of the test tree that a source distribution leaves out, and what stands in for them there.
_LEFT_OUT = {
    "generation.test_utils": {"GenerationTesterMixin": type("GenerationTesterMixin", (), {})},
    "exporters.test_export": {"ExportTesterMixin": type("ExportTesterMixin", (), {})},
    "utils.test_configuration_utils": {"config_common_kwargs": {}},
}
_COVERED_BY = {
    "tests/generation/test_utils.py": "`GenerationTesterMixin`: greedy, sampled and beam generation. It is mixed in "
    "where SOURCE has it. This package's own tests of the same are in `tests/reading/test_read.py`.",
    "tests/exporters/test_export.py": "`ExportTesterMixin`: tracing for other runtimes. WRITE takes gradients inside "
    "the forward pass, which no traced graph holds.",
    "tests/utils/test_configuration_utils.py": "a table of values that `ConfigTester` gives to configurations that "
    "are not composite; this one is.",
}

# Over Llama everything beside the base that is not a LoRA; over GPT-2 nothing but the memory.
_NAMES = {"llama": "Llama", "gpt2": "GPT-2"}
OPTIONS = {
    "llama": {
        "num_control_tokens": 2,
        "memory_projection": True,
        "write_head": True,
        "learn_write_learning_rate": "per_token",
    },
    "gpt2": {},
}

_NO_MODEL = "no model built"
_NO_HIDDEN_STATES = (
    "asks for hidden states or attention weights: `forward` runs the base on memory and query and gives neither back"
)
CANNOT = {
    "test_attention_outputs": _NO_HIDDEN_STATES,
    "test_can_capture_specific_layers_hidden_states": _NO_HIDDEN_STATES,
    "test_capture_outputs_decorator": _NO_HIDDEN_STATES,
    "test_hidden_states_output": _NO_HIDDEN_STATES,
    "test_retain_grad_hidden_states_attentions": _NO_HIDDEN_STATES,
    "test_training_gradient_checkpointing_use_reentrant_true": "PyTorch's reentrant checkpointing has no "
    "`autograd.grad`, which WRITE is made of",
    "test_model_weights_reload_no_missing_tied_weights": "expects a warning for a checkpoint without weights; here "
    "that is an error (`tests/checkpoint/test_base_model.py`)",
}
"""Tests that fail by design, and why; one that passes is reported as a failure, so that the list stays true."""

BUILDS_A_MODEL: set[tuple[str, str]] = set()
"""Classes and names of the tests that did: many have nothing to ask of this class, and pass."""


class GradMemModelTester:
    """What Transformers' mixins ask of a model: a configuration and inputs for it."""

    is_training = True
    batch_size, seq_length, context_length = 3, 7, 9

    def __init__(self, model_type: str) -> None:
        self.model_type = model_type
        self.options = {"num_memory_tokens": 3, "write_steps": 2, **OPTIONS[model_type]}
        text_config = tiny_config(model_type)
        self.num_hidden_layers = text_config.num_hidden_layers
        self.hidden_size = text_config.hidden_size
        self.num_attention_heads = text_config.num_attention_heads

    def get_config(self) -> GradMemConfig:
        return GradMemConfig(text_config=tiny_config(self.model_type), **self.options)

    def prepare_config_and_inputs_for_common(self) -> tuple[GradMemConfig, dict[str, torch.Tensor]]:
        inputs = {}
        for prefix, length in (("", self.seq_length), ("context_", self.context_length)):
            # The tests of resizing take away the last fifteen tokens.
            ids = torch.randint(FIRST_ORDINARY_TOKEN, VOCAB_SIZE - 16, (self.batch_size, length))
            inputs |= {f"{prefix}input_ids": ids, f"{prefix}attention_mask": torch.ones_like(ids)}
        return self.get_config(), inputs


def import_common_tests(source: Path) -> tuple[types.ModuleType, types.ModuleType, list[str]]:
    """Transformers' `test_modeling_common` and `test_configuration_common`, and the files that the source lacks.

    Raises:
        FileNotFoundError: the directory is no source of Transformers.
    """
    tests = source / "tests"
    if not (tests / "test_modeling_common.py").is_file():
        raise FileNotFoundError(f"{source} is no source of Transformers: it has no tests/test_modeling_common.py.")
    package = types.ModuleType(_PACKAGE)
    package.__path__ = [str(tests)]
    sys.modules[_PACKAGE] = package
    lacking = []
    for name, members in _LEFT_OUT.items():
        file = Path(name.replace(".", "/") + ".py")
        if not (tests / file).is_file():
            lacking.append(f"tests/{file}")
            _stand_in(name, members, tests)
    # It would load Transformers a second time, from the tests' own folder.
    with mock.patch("transformers.utils.direct_transformers_import", return_value=transformers):
        modeling, configuration = (
            importlib.import_module(f"{_PACKAGE}.test_{part}_common") for part in ("modeling", "configuration")
        )
    steady, sdpa_test = modeling.set_config_for_less_flaky_test, modeling._test_eager_matches_sdpa_inference
    # It sets options of other models, which GradMemConfig refuses.
    modeling.set_config_for_less_flaky_test = lambda config: steady(config.get_text_config())
    modeling._test_eager_matches_sdpa_inference = _forward_as(_logits_as_hidden_state)(sdpa_test)
    return modeling, configuration, lacking


def _stand_in(name: str, members: dict[str, object], tests: Path) -> None:
    folder = name.partition(".")[0]
    for module_name in (folder, name):
        module = types.ModuleType(f"{_PACKAGE}.{module_name}")
        module.__path__ = [str(tests / folder)]
        sys.modules.setdefault(module.__name__, module)
    vars(sys.modules[f"{_PACKAGE}.{name}"]).update(members)


def common_test_class(modeling: types.ModuleType, configuration: types.ModuleType, model_type: str) -> type:
    """Transformers' common tests as a test case for GradMem over a base of this type."""
    generation = sys.modules[f"{_PACKAGE}.generation.test_utils"]

    class CommonTest(modeling.ModelTesterMixin, generation.GenerationTesterMixin, unittest.TestCase):
        all_model_classes = (GradMemForCausalLM,)
        _is_composite = True
        additional_model_inputs = ["context_input_ids"]
        # It looks for the year in which a model was added at the head of the configuration's file. GPT-2's own
        # weights do not pass.
        test_can_init_all_missing_weights_before_2023 = model_type != "gpt2"

        def setUp(self) -> None:
            built = mock.patch.object(GradMemForCausalLM, "__init__", _noting(GradMemForCausalLM.__init__, self.id()))
            built.start()
            self.addCleanup(built.stop)
            self.model_tester = GradMemModelTester(model_type)
            self.config_tester = configuration.ConfigTester(
                self, config_class=GradMemConfig, has_text_modality=False, num_memory_tokens=3, write_steps=4
            )

        def test_config(self) -> None:
            self.config_tester.run_common_tests()

        def _prepare_for_class(self, inputs_dict, model_class, return_labels=False):
            """The mixin knows by name which classes take labels."""
            inputs = copy.deepcopy(inputs_dict)
            return inputs | {"labels": inputs["input_ids"].clone()} if return_labels else inputs

        def test_model_outputs_equivalence(self) -> None:
            """Its requests for hidden states and attention weights are dropped."""
            with _forward_as(lambda forward, output_hidden_states=False, output_attentions=False: forward()):
                super().test_model_outputs_equivalence()

        def check_training_gradient_checkpointing(self, **arguments) -> None:
            """With the meta-gradient that leaves the base's layers under checkpointing in WRITE too.

            The test calls `train()` before it unfreezes the base, which would therefore stay in eval mode.
            """
            self.model_tester.options["meta_gradient"] = "finite_difference"
            with mock.patch.object(GradMemForCausalLM, "train", nn.Module.train):
                super().check_training_gradient_checkpointing(**arguments)

    for name, reason in CANNOT.items():
        setattr(CommonTest, name, _fails_by_design(getattr(CommonTest, name), reason))
    CommonTest.__name__ = CommonTest.__qualname__ = f"Test{model_type.capitalize()}"
    CommonTest.__module__ = __name__
    return CommonTest


def _noting(initialise: Callable[..., None], test: str) -> Callable[..., None]:
    @functools.wraps(initialise)
    def run(*args, **kwargs) -> None:
        BUILDS_A_MODEL.add(tuple(test.split(".")[-2:]))
        initialise(*args, **kwargs)

    return run


@contextmanager
def _forward_as(adapted: Callable[..., object]) -> Iterator[None]:
    """`forward` in another form: `adapted` gets it ready to be called, and the arguments that it does not take."""
    own = GradMemForCausalLM.forward
    known = inspect.signature(own).parameters

    def forward(self, *args, **kwargs):
        taken = {name: value for name, value in kwargs.items() if name in known}
        others = {name: value for name, value in kwargs.items() if name not in known}
        return adapted(functools.partial(own, self, *args, **taken), **others)

    with mock.patch.object(GradMemForCausalLM, "forward", forward):
        yield


def _logits_as_hidden_state(forward: Callable[[], GradMemOutput], output_hidden_states: bool) -> dict[str, tuple]:
    return {"hidden_states": (forward().logits,)}


def _fails_by_design(method: Callable[..., None], reason: str) -> Callable[..., None]:
    @functools.wraps(method)
    def run(self) -> None:
        with mock.patch.object(self, "subTest", return_value=nullcontext()):
            try:
                method(self)
            except Exception:  # whatever it fails with
                self.skipTest(reason)
        self.fail("This test passes now: take it out of CANNOT.")

    return run


if os.environ.get(VARIABLE):
    _modeling, _configuration, LACKING = import_common_tests(Path(os.environ[VARIABLE]))
    for _model_type in OPTIONS:
        _test_class = common_test_class(_modeling, _configuration, _model_type)
        globals()[_test_class.__name__] = _test_class
    del _test_class
else:

    def test_common():
        pytest.skip(f"{VARIABLE} does not say where the source of Transformers is: see the head of this file")


class Outcomes:
    """A pytest plugin that keeps what became of each test: `(base, test)` to an outcome and, if skipped, why."""

    def __init__(self) -> None:
        self.of: dict[tuple[str, str], tuple[str, str]] = {}

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        """Of a test's parts, the worst counts."""
        if report.when != "call" and report.passed:
            return
        _, base, test = report.nodeid.split("::")
        reason = report.longrepr[2].removeprefix("Skipped: ") if report.skipped else ""
        rank = ("passed", "skipped", "failed").index
        if rank(report.outcome) >= rank(self.of.get((base, test), ("passed", ""))[0]):
            self.of[base, test] = report.outcome, reason


def note(outcomes: Outcomes, lacking: list[str], builds_a_model: set[tuple[str, str]]) -> str:
    """What ran, what did not and why, as Markdown."""
    by_fate: dict[tuple[str, str], dict[str, list[str]]] = defaultdict(lambda: defaultdict(list))
    counts: dict[str, dict[str, int]] = defaultdict(lambda: defaultdict(int))
    for (base, test), (outcome, reason) in outcomes.of.items():
        name = _NAMES[base.removeprefix("Test").lower()]
        if outcome == "passed" and (base, test) not in builds_a_model:
            outcome = _NO_MODEL
        counts[name][outcome] += 1
        # One test for each of a list of parameters; Flash Attention has a number in its name.
        family = re.sub(r"(?<!flash_attn)_\d+(_.*)?$", "", test)
        by_fate[outcome, reason][family].append(name)
    versions = ", ".join(f"{name} {version(name)}" for name in ("transformers", "torch", "peft"))
    lines = [
        "# Transformers' own tests",
        "",
        f"Made by `make transformers-tests` with {versions}. Each test of `tests/test_modeling_common.py` "
        "(`ModelTesterMixin`) and `tests/test_configuration_common.py` (`ConfigTester`) in Transformers' source "
        "distribution, on `GradMemForCausalLM` over a tiny Llama (every option but LoRA) and a tiny GPT-2 (none).",
        "",
        f"| base | passed | passed, {_NO_MODEL} | failed | not run |",
        "|---|---|---|---|---|",
        *(
            f"| {name} | {of['passed']} | {of[_NO_MODEL]} | {of['failed']} | {of['skipped']} |"
            for name, of in counts.items()
        ),
    ]
    for title, outcome in (
        ("Failed", "failed"),
        ("Passed", "passed"),
        ("Passed without building a model: tests of the configuration, and those with nothing to ask here", _NO_MODEL),
    ):
        tests = by_fate.get((outcome, ""), {})
        if tests:
            lines += ["", f"## {title}", "", _listed(tests)]
    lines += [
        "",
        "Adapted to the class: `test_model_outputs_equivalence` without its requests for hidden states and attention "
        "weights; `test_eager_matches_sdpa_inference` compares logits in place of hidden states; "
        '`test_training_gradient_checkpointing` with `meta_gradient="finite_difference"`, which leaves the base\'s '
        "layers under checkpointing in WRITE too, and with the whole model in training mode.",
        "",
        "## Not run, and why",
        "",
        "| why (in Transformers' words, unless by design) | tests |",
        "|---|---|",
    ]
    skipped = [(reason, tests) for (outcome, reason), tests in by_fate.items() if outcome == "skipped"]
    for reason, tests in sorted(skipped, key=lambda entry: (entry[0] not in CANNOT.values(), entry[0])):
        whose = "**By design:** " if reason in CANNOT.values() else ""
        lines.append(f"| {whose}{reason} | {_listed(tests)} |")
    if lacking:
        lines += [
            "",
            "## Not in the source that was given",
            "",
            *(f"- `{name}`: {_COVERED_BY[name]}" for name in lacking),
        ]
    return "\n".join(lines) + "\n"


def _listed(tests: dict[str, list[str]]) -> str:
    """Names of tests; with the base where it is one only, and how many where there are parameters."""
    told = []
    for name, bases in sorted(tests.items()):
        remarks = [f"{bases[0]} only"] if len(set(bases)) == 1 else []
        remarks += [f"{len(bases)} cases"] if len(bases) > len(set(bases)) else []
        told.append(f"`{name}`" + (f" ({', '.join(remarks)})" if remarks else ""))
    return ", ".join(told)


def main() -> int:
    """Run the tests and write the note; the exit code is pytest's."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("source", type=Path, help="the unpacked source distribution, or a checkout")
    parser.add_argument("--note", type=Path, help="write here which tests ran, and which did not and why")
    arguments = parser.parse_args()
    os.environ[VARIABLE] = str(arguments.source.resolve())
    outcomes = Outcomes()
    status = pytest.main(["-q", "-r", "fE", "-W", "ignore", "-p", "no:cacheprovider", __file__], plugins=[outcomes])
    if arguments.note is not None:
        module = sys.modules[f"{__spec__.parent}.{Path(__file__).stem}"]  # as pytest imported it
        arguments.note.parent.mkdir(parents=True, exist_ok=True)
        arguments.note.write_text(note(outcomes, module.LACKING, module.BUILDS_A_MODEL), encoding="utf-8")
    return status


if __name__ == "__main__":
    sys.exit(main())
