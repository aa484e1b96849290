"""What `hf-gradmem calibrate` does: fit a confidence on questions, and keep it in the adapter's config.json."""

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from datasets import Dataset
from transformers.utils import CONFIG_NAME

from ..checkpoint.model_card import with_confidence
from ..configuration_gradmem import GradMemConfig
from ..evaluation.limits import limited_rows
from ..evaluation.reliability import Asked, ask_rows, calibrate_on, measure_confidence
from ..files import only_writer, save_text
from ..hub.cards import is_own_card
from ..hub.client import CARD_FILE
from ..modeling_gradmem import GradMemForCausalLM
from ..reading.confidence import MEASURED, Calibration
from ..tasks.rows import context_numbers


def check_adapter_directory(name: str) -> Path:
    """The directory of an adapter whose configuration can be written.

    Raises:
        ValueError: it is no directory, or holds no adapter.
    """
    directory = Path(os.path.expanduser(name))
    config = directory / CONFIG_NAME
    if not config.is_file():
        raise ValueError(
            f"{name} is no directory of an adapter: its config.json is to be written. Save or download it first, as by "
            "hf download, and give the directory."
        )
    try:
        values = json.loads(config.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{config} is not JSON ({error}). Was it copied whole?") from error
    if not isinstance(values, dict) or values.get("model_type") != GradMemConfig.model_type:
        raise ValueError(f"{name} holds no GradMem adapter. Give the directory of one.")
    return directory


def first_contexts(rows: Dataset, most: int) -> Dataset:
    """The rows on the first so many contexts, each of which may have several."""
    return rows.select([place for place, number in enumerate(context_numbers(rows)) if number < most])


def count_contexts(rows: Mapping[str, Dataset]) -> str:
    """How many contexts each set has, for people to read."""
    return ", ".join(f"{len(set(context_numbers(part)))} contexts of {name}" for name, part in rows.items())


def run_calibration(
    model: GradMemForCausalLM,
    rows: Mapping[str, Dataset],
    metrics: Mapping[str, str | None],
    name: str,
    *,
    fit: bool = True,
    limits: Mapping[str, int | None] | None = None,
    **options: Any,
) -> dict[str, Any]:
    """Fit a confidence on the questions of some sets, or measure the one that the model has.

    Args:
        model: adapter and base, whose configuration gets the confidence.
        rows: of each set, by its name.
        metrics: which answers of each set are right, as in [`~hf_gradmem.evaluation.results.metrics_of_sets`].
        name: of the sets together, for people to read.
        fit: otherwise the model's own confidence is measured, and stays.
        limits: of [`~hf_gradmem.evaluation.limits.limited_rows`]; none by default.
        options: those of [`~hf_gradmem.evaluation.reliability.ask_rows`].

    Returns:
        `confidence`, the coefficients with what was measured on all sets together; `sets`, what was measured on each,
        and on all together, `"all"`. After a fit that is by confidences of fits that did not see the context, five of
        them.

    Raises:
        ValueError: nothing is answered in a set, the answers are all right or all wrong, or there is no confidence
            to measure.
    """
    compared = {of: metric for of in rows if (metric := metrics[of]) is not None}
    if len(compared) < len(rows):
        raise ValueError(
            f"The answers of {', '.join(rows.keys() - compared.keys())} are not compared with anything: a confidence "
            "needs right and wrong ones. Choose the other sets, or a metric."
        )
    present = model.config.confidence
    if not fit and present is None:
        raise ValueError("The adapter has no confidence to measure: calibrate it first, on another split.")
    limited = {of: limited_rows(model, given, limits or {}) for of, given in rows.items()}
    numbers: dict[str, int] = {}
    parts = {of: ask_rows(model, given, compared[of], numbers, **options) for of, given in limited.items()}
    every = Asked.cat(list(parts.values()))
    if fit:
        calibration, sure = calibrate_on(every, name)
    else:
        sure = Calibration.of(present or {})(every.features)
    of_all = measure_confidence(every, sure)
    if fit:
        model.config.confidence = calibration.to_dict() | {MEASURED: of_all}
    split = dict(zip(parts, sure.split([len(part.right) for part in parts.values()]), strict=True))
    measured = {of: measure_confidence(part, split[of]) for of, part in parts.items()}
    return {"confidence": model.config.confidence, "sets": measured | {"all": of_all}}


def save_confidence(directory: Path, confidence: Mapping[str, Any]) -> None:
    """Write a confidence into the config.json of an adapter's directory, whole or not at all; all else in it stays.

    A card that is not the user's own shows it from then on.

    Raises:
        OSError: it cannot be written.
    """
    path = directory / CONFIG_NAME
    with only_writer(directory, wait=True):
        config = json.loads(path.read_text(encoding="utf-8"))
        config["confidence"] = dict(confidence)
        save_text(json.dumps(config, indent=2, sort_keys=True) + "\n", path)
        card = directory / CARD_FILE
        if card.is_file() and is_own_card(text := card.read_text(encoding="utf-8", errors="replace")):
            save_text(with_confidence(text, confidence), card)
