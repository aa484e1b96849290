"""The start of a memory, learned without a gradient through WRITE: the mean of memories that were written from it.

Reptile (Nichol et al., arXiv 1803.02999) with a full outer step: M0 ← mean of M_K, in rounds, each on further contexts.
Where the base is frozen, this costs no more than the writing itself, which no second derivative does.
"""

import hashlib
import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np
import torch
from datasets import Dataset
from safetensors import safe_open
from tqdm.auto import tqdm

from ..checkpoint.write_settings import OF_TRAINING, write_settings
from ..files import save_tensors, save_text
from ..memory.written import GradMemMemory
from ..modeling_gradmem import GradMemForCausalLM
from ..tasks.collator import DataCollatorForGradMem
from ..writing.contexts import Contexts
from ..writing.write import write_contexts
from .stages import is_whole

START_FILE = "start.safetensors"
_METHODS = ("reptile",)


@dataclass(frozen=True)
class Start:
    """How a start is learned.

    Attributes:
        method: `"reptile"`.
        contexts: how many each round writes.
        rounds: how many times the start becomes the mean of what was written from it.
        write_steps: steps of WRITE in these rounds; the configuration's by default.
        write_learning_rates: step sizes, of which the one is kept that writes the next contexts best; none is tried
            by default.

    Raises:
        ValueError: there is no such method, or a number is out of range.
    """

    method: str
    contexts: int
    rounds: int = 1
    write_steps: int | None = None
    write_learning_rates: Sequence[float] = ()

    def __post_init__(self) -> None:
        if self.method not in _METHODS:
            raise ValueError(f"The method of a start is {' or '.join(map(repr, _METHODS))}, got {self.method!r}.")
        for name in ("contexts", "rounds", "write_steps"):
            value = getattr(self, name)
            if value is None and name == "write_steps":
                continue
            if not is_whole(value, 1):
                raise ValueError(f"{name} of a start must be a number of at least 1, got {value!r}.")
        rates = self.write_learning_rates
        if not isinstance(rates, list | tuple) or not all(_is_rate(rate) for rate in rates):
            raise ValueError(f"write_learning_rates of a start must be a list of numbers above 0, got {rates!r}.")

    @classmethod
    def of(cls, values: Mapping[str, Any]) -> "Start":
        """From the values of a recipe.

        Raises:
            ValueError: as of the class; something is missing or unknown.
        """
        known = [entry.name for entry in fields(cls)]
        if set(values) - set(known) or not {"method", "contexts"} <= set(values):
            raise ValueError(
                f"start must have method and contexts, and may have {', '.join(known[2:])}, got {dict(values)}."
            )
        return cls(**values)


def _is_rate(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and value > 0


def learn_start(
    model: GradMemForCausalLM,
    contexts: Sequence[Sequence[str]],
    start: Start,
    *,
    batch_size: int,
    max_context_length: int | None = None,
    show_progress: bool = False,
) -> list[dict[str, Any]]:
    """Give the model a learned start, and the step size that suits it.

    Args:
        model: whose `memory_init`, or what else its form of memory starts from, is set.
        contexts: to write, in segments; each is written once, in order, so there must be enough for all rounds.
        start: how.
        batch_size: contexts at a time.
        max_context_length: most tokens of a context, as in training; the rest of it is cut off.
        show_progress: show a progress bar over the contexts.

    Returns:
        For each round, and each step size tried, what was written: its mean losses before each step and after the last.

    Raises:
        ValueError: there are too few contexts.
    """
    needed = start.contexts * (start.rounds + bool(start.write_learning_rates))
    if len(contexts) < needed:
        raise ValueError(
            f"The start is learned from {needed} contexts, {start.contexts} in each round, but there are "
            f"{len(contexts)}. Lower contexts or rounds."
        )
    parts = [contexts[number * start.contexts :][: start.contexts] for number in range(start.rounds + 1)]
    report: list[dict[str, Any]] = []
    total = start.contexts * (start.rounds + len(start.write_learning_rates))
    with tqdm(total=total, desc="Learning the start", unit="context", disable=not show_progress) as bar:
        options: dict[str, Any] = {"write_steps": start.write_steps, "batch_size": batch_size, "on_batch": bar.update}
        for number in range(start.rounds):
            memory, measured = _written(model, parts[number], max_context_length, **options)
            model.form.set_start(memory.embeddings.mean(0))
            report.append({"round": number + 1} | measured)
        tried = []
        for rate in start.write_learning_rates:
            _, measured = _written(model, parts[-1], max_context_length, write_learning_rate=rate, **options)
            tried.append({"write_learning_rate": rate} | measured)
    if tried:
        best = min(tried, key=lambda measured: measured["final_write_loss"])
        _set_step_size(model, best["write_learning_rate"])
    return report + tried


def _set_step_size(model: GradMemForCausalLM, rate: float) -> None:
    model.config.write_learning_rate = rate
    if model.write_log_learning_rate is not None:  # those that are learned begin there
        with torch.no_grad():
            model.write_log_learning_rate.copy_(model.writer.log_step_sizes(rate))


def _written(
    model: GradMemForCausalLM, contexts: Sequence[Sequence[str]], limit: int | None, **options: Any
) -> tuple[GradMemMemory, dict[str, Any]]:
    """Memories of these contexts, and what was measured: how many, their mean loss before each step and at the end."""
    collate = DataCollatorForGradMem(
        model.tokenizer, max_context_length=limit, queries_per_context=0, **model.writer.cutting
    )
    given = collate([{"context": context} for context in contexts])
    tokens = Contexts(given["context_input_ids"], given["context_attention_mask"], given.get("context_segment_ids"))
    memory = write_contexts(model.writer, tokens, identity=model.identity(), measure_final_loss=True, **options)
    assert memory.final_write_loss is not None
    losses = {"write_losses": memory.write_losses.mean(0).tolist()}
    return memory, {"contexts": len(memory)} | losses | {"final_write_loss": float(memory.final_write_loss.mean())}


def begin_with_start(
    model: GradMemForCausalLM, rows: Dataset, start: Start, directory: str | os.PathLike, **options: Any
) -> None:
    """Learn the start from the contexts of these rows, or take the one that an earlier part of the run learned.

    Args:
        model: which begins to train from it.
        rows: of a task.
        start: how.
        directory: of the run, where the start is kept, with what was measured on the way (`start.json`).
        options: of [`learn_start`].

    Raises:
        ValueError: the directory holds a start that was learned otherwise, or by another model; and as of
            [`learn_start`].
    """
    path = Path(directory) / START_FILE
    parameters = model.form.start_parameters()
    order = np.random.default_rng(0).permutation(len(rows))
    contexts = [rows[int(number)]["context"] for number in order]
    # What is in no tensor of the start, and decides over it.
    settings = {name: value for name, value in write_settings(model.config).items() if name not in OF_TRAINING}
    written = [settings, options.get("max_context_length"), contexts]
    origin = {
        "start": json.dumps(asdict(start), default=list),
        "fingerprint": model.fingerprint(),
        "written": hashlib.sha256(json.dumps(written, sort_keys=True).encode()).hexdigest(),
    }
    if not path.is_file():
        report = learn_start(model, contexts, start, **options)
        save_text(json.dumps(report, indent=2) + "\n", path.with_suffix(".json"))
        save_tensors(dict(parameters), path, origin | {"write_learning_rate": str(model.config.write_learning_rate)})
    with safe_open(path, "pt") as kept, torch.no_grad():
        facts = kept.metadata() or {}
        if any(facts.get(name) != value for name, value in origin.items()):
            raise ValueError(
                f"{path} holds a start that was learned otherwise, of other contexts, by other options of WRITE or by "
                f"another model: {facts.get('start')} by {facts.get('fingerprint')}, not {origin['start']} by "
                f"{origin['fingerprint']}. Remove it, or give another output_dir."
            )
        if start.write_learning_rates:
            _set_step_size(model, float(facts["write_learning_rate"]))
        for name, parameter in parameters.items():
            parameter.copy_(kept.get_tensor(name))
