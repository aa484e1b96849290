"""Pictures: any measure of results files over what it was measured at, an answer's tokens by where they come from, and
the size of a memory beside the cache of its context."""

import json
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeGuard

import numpy as np
from transformers import PreTrainedConfig

from ..base.cache_size import expected_cache_bytes
from ..configuration_gradmem import GradMemConfig
from ..files import whole_file
from ..variants import chosen
from .results import Record
from .tokens import AnswerTokens

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# What a record was measured on, beside the arguments of its task; any other number in it is a measure.
_HOW = ("split", "template", "metric")
_CONDITIONS = ("model", "writer", "num_memory_tokens", "write_steps_trained", "context", "write_steps", *_HOW)
_OF_MEMORIES = {"writer", "num_memory_tokens", "write_steps_trained", "context", "write_steps"}
_LINES = {"prompt": "--", "none": ":", "other": "-."}
_CONTEXTS = {"prompt": "context in the prompt", "none": "no context", "other": "another context's memory"}
_HOW_MUCH = {"num_contexts", "queries_per_context", "seed"}
_SYMBOLS = {"write_steps": "K", "num_memory_tokens": "m", "num_pairs": "N"}
_LABELS = {
    "write_steps": "WRITE steps",
    "num_memory_tokens": "memory tokens",
    "num_pairs": "pairs",
    "answer_loss": "answer loss (nats per token)",
    "write_loss": "reconstruction loss (nats per token)",
    "bits_over_start": "bits of context recovered, over the memory's start",
    "bits_over_base": "bits of context recovered, over the base alone",
    "bits_over_start_per_float": "bits recovered per number in the memory",
}
_WIDE = 8  # axes on which the largest value is so many times the smallest are logarithmic

_MOST_GAIN = 8.0  # nats, at and beyond which a token's colour is deepest: about one in 3,000
_ROW_WIDTH, _GAP = 64, 1.5  # characters in a row of tokens, and the space between two of them
_MEMORIES: dict[str, Any] = {
    "input vectors": "input_vectors",
    "keys and values": "key_values",
    "values alone": {"name": "key_values", "write": "values"},
}
_MEMORY_BYTES = 4  # of a number: memories are float32

Line = tuple[tuple[str, str], ...]


def plot_results(records: Sequence[Record], x: str = "write_steps", y: str = "exact_match") -> "Figure":
    """A line over `x` for each combination of whatever else differs between the records.

    Records that differ in nothing else, such as those of adapters of one size and several seeds over
    `num_memory_tokens`, are drawn as their mean in the band from the smallest to the largest. A baseline that knows no
    `x` is a level line.

    Args:
        records: of [`~hf_gradmem.evaluation.results.load_records`].
        x: `"write_steps"`, `"num_memory_tokens"`, or an argument of the task with numbers, such as `"num_pairs"`.
        y: a measure, such as `"exact_match"`, `"f1"`, `"answer_loss"` or `"bits_over_start"`.

    Raises:
        ImportError: matplotlib is not installed.
        ValueError: no record has such an `x` and `y`.
    """
    curves, levels = _collect(records, x, y)
    figure, axes = _new_figure(6.4, 4.4)
    labels = _line_labels([*curves, *levels])
    of_memories = [line for line in curves if _context(line) == "memory"]
    colors = {line: f"C{number % 10}" for number, line in enumerate(of_memories)}
    for line, points in curves.items():
        _draw_curve(axes, points, **_style(line, colors), marker="o", markersize=4, label=labels[line] or None)
    for line, values in levels.items():
        axes.axhline(sum(values) / len(values), **_style(line, colors), linewidth=1, label=labels[line])
    ticks = sorted({value for points in curves.values() for value in points})
    if ticks[0] > 0 and ticks[-1] >= _WIDE * ticks[0]:
        axes.set_xscale("log", base=2)
    axes.set_xticks(ticks, [f"{tick:g}" for tick in ticks])
    axes.minorticks_off()
    axes.set_xlabel(_LABELS.get(x, x.replace("_", " ")))
    axes.set_ylabel(_LABELS.get(y, y.replace("_", " ")))
    if all(0 <= value <= 1 for values in _all_values(curves, levels) for value in values):
        axes.set_ylim(-0.02, 1.02)
    axes.grid(alpha=0.3)
    if any(labels.values()):
        figure.legend(fontsize="small", loc="outside right upper")
    return figure


def plot_answer(answers: AnswerTokens | Sequence[AnswerTokens]) -> "Figure":
    """Answers token by token, coloured by what the memory adds to each, with the figure below it in nats.

    Blue is said from the memory; white would have been said without it; red the memory speaks against.

    Args:
        answers: of [`~hf_gradmem.evaluation.answer_tokens`].

    Raises:
        ImportError: matplotlib is not installed.
        ValueError: there is no answer.
    """
    shown = [answers] if isinstance(answers, AnswerTokens) else list(answers)
    if not shown:
        raise ValueError("There is nothing to draw: no answer was given.")
    rows = [(answer if first else None, row) for answer in shown for first, row in _rows_of_tokens(answer)]
    figure, axes = _new_figure(8.0, 0.75 * len(rows) + 0.9)
    axes.set_axis_off()
    axes.set_xlim(0, _ROW_WIDTH)
    axes.set_ylim(-len(rows), 0)
    from matplotlib import colormaps
    from matplotlib.cm import ScalarMappable
    from matplotlib.colors import Normalize

    scale = ScalarMappable(Normalize(-_MOST_GAIN, _MOST_GAIN), colormaps["RdBu"])
    for number, (begun, row) in enumerate(rows):
        if begun is not None:
            axes.text(0, -number - 0.2, begun.question, fontsize=9, parse_math=False)
        for place, token, gain in row:
            (shade,) = scale.to_rgba(np.array([gain]))
            box = {"facecolor": shade, "edgecolor": "0.7", "boxstyle": "round,pad=0.2", "linewidth": 0.5}
            color = "white" if abs(gain) > _MOST_GAIN / 2 else "black"
            style: dict[str, Any] = {"family": "monospace", "parse_math": False}
            axes.text(place, -number - 0.55, token, fontsize=10, color=color, bbox=box, **style)
            axes.text(place, -number - 0.85, f"{gain:+.1f}", fontsize=7, color="0.4")
    figure.colorbar(scale, ax=axes, location="bottom", aspect=40, label="nats that the memory adds to the token")
    return figure


def plot_memory_sizes(
    text_config: PreTrainedConfig, num_memory_tokens: int = 8, *, most_tokens: int = 4096, dtype: str = "float32"
) -> "Figure":
    """Bytes of a memory, in each form, over the length of its context, and of the base's KV cache of that context.

    Nothing is run: all of it follows from the base's configuration.

    Args:
        text_config: of the base.
        num_memory_tokens: m.
        most_tokens: of a context.
        dtype: that the base caches in. Memories are float32.

    Raises:
        ImportError: matplotlib is not installed.
        ValueError: a number is below 1, or the base keeps no cache that grows.
    """
    for name, value in (("num_memory_tokens", num_memory_tokens), ("most_tokens", most_tokens)):
        if value < 1:
            raise ValueError(f"{name} must be at least 1, got {value}.")
    lengths = [2**power for power in range((most_tokens - 1).bit_length())] + [most_tokens]
    cached = [expected_cache_bytes(text_config, length, dtype) for length in lengths]
    if not all(cached):
        raise ValueError(
            f"A base of type {text_config.model_type} keeps no cache that grows: there is nothing to draw."
        )
    figure, axes = _new_figure(6.4, 4.4)
    axes.plot(lengths, cached, color="0.4", label=f"KV cache ({dtype})")
    for number, (label, form) in enumerate(_MEMORIES.items()):
        kind, settings = chosen("memory_form", GradMemConfig(memory_form=form))
        width = kind.numbers(text_config, **settings)
        if width is not None:
            size = num_memory_tokens * width * _MEMORY_BYTES
            axes.plot([1, most_tokens], [size] * 2, color=f"C{number}", label=f"{num_memory_tokens} {label}")
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    axes.set_xlabel("tokens of the context")
    axes.set_ylabel("bytes")
    axes.grid(alpha=0.3)
    axes.legend(fontsize="small")
    return figure


def save_picture(figure: "Figure", path: str | os.PathLike) -> None:
    """Write a picture, whole or not at all, in the format of its ending: .png, .svg, .pdf, ...

    Raises:
        OSError: the file cannot be written there.
        ValueError: there is no such format.
    """
    known = figure.canvas.get_supported_filetypes()
    ending = Path(path).suffix.removeprefix(".").lower()
    if ending not in known:
        raise ValueError(f"{path} has no ending of a picture. Give one of {', '.join(sorted(known))}.")
    with whole_file(path) as unfinished:
        figure.savefig(unfinished, dpi=150)


def _new_figure(width: float, height: float) -> "tuple[Figure, Axes]":
    """An empty picture of so many inches."""
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError("Pictures need matplotlib: pip install 'hf-gradmem[plots]'.") from error
    figure = Figure(figsize=(width, height), layout="constrained")
    return figure, figure.subplots()


def _rows_of_tokens(answer: AnswerTokens) -> Iterator[tuple[bool, list[tuple[float, str, float]]]]:
    """Tokens with their places and gains, in rows that fit, and whether a row is the first."""
    row: list[tuple[float, str, float]] = []
    place, first = 0.5, True
    for text, gain in zip(answer.tokens, answer.gain.tolist(), strict=True):
        token = text.replace("\n", "⏎").replace(" ", "·") or "·"
        width = max(len(token), 4) + _GAP  # room for the figure below it
        if row and place + width > _ROW_WIDTH:
            yield first, row
            row, place, first = [], 0.5, False
        row.append((place, token, gain))
        place += width
    yield first, row


def _collect(
    records: Sequence[Record], x: str, y: str
) -> tuple[dict[Line, dict[float, list[float]]], dict[Line, list[float]]]:
    """Values by line and x, and those of the baselines that have no x."""
    curves: dict[Line, dict[float, list[float]]] = {}
    levels: dict[Line, list[float]] = {}
    for record, line in zip(records, _lines(records, x), strict=True):
        place, value = _place(record, x), record.get(y)
        if not _is_number(value):
            continue
        if _is_number(place):
            curves.setdefault(line, {}).setdefault(place, []).append(value)
        elif place is None and record.get("context") in _CONTEXTS:
            levels.setdefault(line, []).append(value)
    if not curves:
        measured = [record for record in records if _is_number(record.get(y))]
        found = {name for record in measured for name in (*_CONDITIONS, *record.get("arguments", {}))}
        places = sorted(name for name in found if any(_is_number(_place(record, name)) for record in measured))
        measures = sorted({name for record in records for name in record if _is_number(record[name])})
        raise ValueError(
            f"There is nothing to draw: no result has both {y!r} and a number for {x!r}. "
            + (f"With {y!r} there are {', '.join(places)}." if places else f"Measured were {', '.join(measures)}.")
        )
    return curves, levels


def _place(record: Record, name: str) -> Any:
    return record.get(name) if name in _CONDITIONS else record.get("arguments", {}).get(name)


def _lines(records: Sequence[Record], x: str) -> list[Line]:
    """The line of each record: how much was measured parts lines only where it differs at one place."""
    # Results of before these were kept say nothing of them, which is no other value.
    alike = {name for name in _HOW if len({json.dumps(record[name]) for record in records if record.get(name)}) < 2}
    whole = [_line(record, alike | {x}) for record in records]
    lean = [tuple((name, value) for name, value in line if name not in _HOW_MUCH) for line in whole]
    at_place: dict[Any, set[Line]] = {}
    for record, line, shorter in zip(records, whole, lean, strict=True):
        at_place.setdefault((shorter, json.dumps(_place(record, x))), set()).add(line)
    return lean if all(len(lines) == 1 for lines in at_place.values()) else whole


def _line(record: Record, without: set[str]) -> Line:
    """Everything that a record was measured on, but for some of it."""
    # Each size of memory is a model of its own; where models are told apart, they need not be by how they were trained.
    names = {*_CONDITIONS, *record.get("arguments", {})} - without
    names -= {"model"} if "num_memory_tokens" in without else {"write_steps_trained"}
    return tuple((name, json.dumps(_place(record, name))) for name in sorted(names))


def _line_labels(lines: Sequence[Line]) -> dict[Line, str]:
    """What tells the lines apart."""
    values: dict[str, set[str]] = {}
    for line in lines:
        for name, value in line:
            values.setdefault(name, set()).add(value)
    differing = {name for name, found in values.items() if len(found - {"null"}) > 1} - {"context"}
    if len(values.get("context", ())) > 1:
        differing.add("context")
    # How much was measured is said only where nothing else tells two lines apart.
    for told in (differing - _HOW_MUCH, differing):
        labels = {line: ", ".join(_label_parts(dict(line), told)) for line in lines}
        if len(set(labels.values())) == len(labels):
            break
    return labels


def _label_parts(line: dict[str, str], differing: set[str]) -> list[str]:
    values = {name: json.loads(line.get(name, "null")) for name in sorted(differing - {"context"})}
    parts = [
        str(value) if name == "model" else f"{_SYMBOLS.get(name, name.replace('_', ' '))}={value}"
        for name, value in values.items()
        if value is not None
    ]
    context = json.loads(line["context"])
    if context in _CONTEXTS or (not parts and "context" in differing):
        parts.append(_CONTEXTS.get(context, context))
    return parts


def _context(line: Line) -> str:
    return json.loads(dict(line)["context"])


def _style(line: Line, colors: dict[Line, str]) -> dict[str, Any]:
    """A memory has a colour of its own; a baseline has that of the one memory it belongs to, or is grey."""
    style = {"linestyle": _LINES.get(_context(line), "-")}
    if line in colors:
        return style | {"color": colors[line]}
    shared = [color for other, color in colors.items() if _without_memory(other) == _without_memory(line)]
    return style | {"color": shared[0] if len(shared) == 1 else "0.4"}


def _without_memory(line: Line) -> dict[str, str]:
    return {name: value for name, value in line if name not in _OF_MEMORIES}


def _draw_curve(axes: "Axes", points: dict[float, list[float]], **style: Any) -> None:
    places = sorted(points)
    axes.plot(places, [sum(points[place]) / len(points[place]) for place in places], **style)
    if any(len(points[place]) > 1 for place in places):
        lowest, highest = ([bound(points[place]) for place in places] for bound in (min, max))
        axes.fill_between(places, lowest, highest, alpha=0.2, color=style["color"], linewidth=0)


def _all_values(curves: dict[Line, dict[float, list[float]]], levels: dict[Line, list[float]]) -> list[list[float]]:
    return [values for points in curves.values() for values in points.values()] + list(levels.values())


def _is_number(value: Any) -> TypeGuard[float]:
    return isinstance(value, int | float) and not isinstance(value, bool)
