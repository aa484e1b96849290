"""The performance tables and their plot, from the cells that have been measured."""

import json
import statistics
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

NEW_TOKENS = 16  # of a query in `read_variant`
PAPERS_READS = 64  # after which WRITE has paid, by the paper
Cells = list[dict[str, Any]]


def write_tables(directory: Path, results: Path, device: str) -> None:
    """Write `performance_<device kind>.md`, `.json` and `.png` from the cells in `directory`."""
    cells = [json.loads(path.read_text(encoding="utf-8")) for path in sorted(directory.glob("*.json"))]
    if not cells:
        return
    for cell in cells:
        cell["cell"].setdefault("threads", 1)  # what those before there was a choice were measured on
    name = f"performance_{directory.name}"
    clock = (
        "seconds on the clock"
        if directory.name == "gpu"
        else "processor seconds of one thread, or, where two threads are named, seconds on the clock"
    )
    text = [
        "# Time and memory",
        "",
        f"Device: {device}; torch {cells[0]['torch']}; float32 unless a row names another precision. "
        f"Times are medians in {clock}. A ratio is taken within each round, in which every variant ran once, one after "
        "the other; given are its median and, in brackets, its quartiles. Peaks are those of a process of its own "
        "above the loaded model. Weights are random. Command: `python -m benchmarks.run`; the cells are in "
        f"`performance/{directory.name}/`.",
        "",
        *_write_table(cells),
        *_training_tables(cells),
        *_reader_table(cells),
        *_attention_table(cells),
        *_short_attention_table(cells),
        *_segments_table(cells),
        *_read_table(cells),
    ]
    (results / f"{name}.md").write_text("\n".join(text), encoding="utf-8")
    (results / f"{name}.json").write_text(json.dumps(cells, indent=1) + "\n", encoding="utf-8")
    _plot(cells, results / f"{name}.png")


# ------------------------------------------------------------------------------------------------ cells


def _of(cells: Cells, **wanted: Any) -> Cells:
    return [cell for cell in cells if all(cell["cell"][name] == value for name, value in wanted.items())]


def _seconds(cell: dict[str, Any], variant: str) -> float | None:
    times = [row[variant] for row in cell["rounds"] if variant in row]
    return statistics.median(times) if times else None


def _ratio(cell: dict[str, Any], variant: str, other: str) -> str:
    return _spread([row[variant] / row[other] for row in cell["rounds"] if variant in row and other in row])


def _spread(values: list[float]) -> str:
    if not values:
        return "–"
    if len(values) == 1:
        return f"{values[0]:.2f}"
    low, middle, high = statistics.quantiles(values, n=4, method="inclusive")
    return f"{middle:.2f} [{low:.2f}–{high:.2f}]"


def _peak(cells: Cells, variant: str, **wanted: Any) -> float | None:
    """Megabytes above the model."""
    found = [cell for cell in _of(cells, measure="memory", **wanted) if cell["cell"]["variants"] == [variant]]
    return found[0]["bytes"] / 1e6 if found else None


def _number(value: float | None, form: str = ".2f") -> str:
    return "–" if value is None else f"{value:{form}}"


def _over(value: float | None, other: float | None) -> str:
    return "–" if value is None or other is None else f"{value / other:.3f}"


def _shapes(cells: Cells, kind: str, names: Iterable[str]) -> list[dict[str, Any]]:
    found = {tuple(cell["cell"][name] for name in names) for cell in _of(cells, kind=kind)}
    return [dict(zip(names, values, strict=True)) for values in sorted(found)]


def _in_order(cell: dict[str, Any], *names: str) -> tuple[Any, ...]:
    return tuple(cell["cell"][name] for name in names)


def _table(header: list[str], rows: list[list[str]]) -> list[str]:
    return [f"| {' | '.join(row)} |" for row in (header, ["---"] * len(header), *rows)] + [""]


# ------------------------------------------------------------------------------------------------ tables


def _write_table(cells: Cells) -> list[str]:
    rows = []
    whole, cells = _of(cells, shape="smollm2"), _of(cells, shape="smollm2-8-layers")
    for shape in _shapes(cells, "write", ("threads", "steps", "batch", "tokens")):
        threads = shape.pop("threads")
        own = _of(cells, kind="write", **shape)
        timed = next(iter(_of(own, measure="time", threads=threads)), {"rounds": []})
        peak, reference = _peak(own, "gradmem"), _peak(own, "reference")
        rows.append(
            [
                f"{shape['batch']} × {shape['tokens']}",
                str(shape["steps"]),
                str(threads),
                _number(_seconds(timed, "gradmem")),
                *(_ratio(timed, "gradmem", other) for other in ("reference", "floor", "floor with attention")),
                _ratio(timed, "gradmem, bfloat16", "reference"),
                _ratio(timed, "compiled", "gradmem"),
                _ratio(timed, "forward-only", "gradmem"),
                _number(peak, ".0f"),
                _number(reference, ".0f"),
                _over(peak, reference),
            ]
        )
    return [
        "## WRITE",
        "",
        "SmolLM2-135M's shape with 8 layers, 8 memory tokens. The floor is the step's products with the weights, timed "
        "bare: one forward pass and one backward pass to the activations. The other floor has the products inside "
        "causal attention as well.",
        "",
        *_table(
            [
                "contexts × tokens",
                "K",
                "threads",
                "seconds",
                "/ reference style",
                "/ floor",
                "/ floor with attention",
                "in bfloat16 / reference style",
                "base compiled / this",
                "forward-only writer / this",
                "peak MB",
                "reference MB",
                "/ reference",
            ],
            rows,
        ),
        "All 30 layers, one step. A floor is in the precision of the step.",
        "",
        *_whole_write_table(whole),
    ]


def _whole_write_table(cells: Cells) -> list[str]:
    rows = []
    for shape in _shapes(cells, "write", ("dtype", "threads", "batch", "tokens")):
        (timed,) = _of(cells, kind="write", **shape)
        floors = ("floor", "floor with attention")
        rows.append(
            [
                f"{shape['batch']} × {shape['tokens']}",
                shape["dtype"],
                str(shape["threads"]),
                _number(_seconds(timed, "gradmem")),
                *(_number(_seconds(timed, floor)) for floor in floors),
                *(_ratio(timed, "gradmem", floor) for floor in floors),
            ]
        )
    return _table(
        [
            "contexts × tokens",
            "precision",
            "threads",
            "seconds",
            "floor s",
            "floor with attention s",
            "/ floor",
            "/ floor with attention",
        ],
        rows,
    )


def _training_tables(cells: Cells) -> list[str]:
    return [
        "## A training step",
        "",
        "The loss and its backward pass, one query of 8 tokens on each context. `exact` recomputes each step in the "
        "backward pass; `unrolled` keeps the graph; `compiled` is after `model.compile()`, once it is; in `last step` "
        "the step before has no second-order term.",
        "",
        "Every weight trains: 4 layers, 128 wide, 128 symbols. The floor is the matrix products with the weights, "
        "timed bare: six forward passes' worth for each second-order step.",
        "",
        *_train_table(cells, "kv-4-layers"),
        "SmolLM2-135M's shape, all 30 layers, frozen: LoRA of rank 16 on every linear layer, one for WRITE and one for "
        "READ, and the memory's start train. The reference is a plain loop that differentiates twice: the same base, "
        "frozen, with eager attention and one LoRA for both. The floors are the products with the frozen weights, "
        "timed bare, LoRA's own left out: four forward passes' worth for a second-order step, two for any other and "
        "for READ.",
        "",
        *_train_table(cells, "smollm2"),
    ]


def _train_table(cells: Cells, base: str) -> list[str]:
    rows = []
    of_base = _of(cells, kind="train", shape=base)
    for shape in _shapes(of_base, "train", ("dtype", "batch", "tokens", "steps", "threads")):
        threads = shape.pop("threads")
        own = _of(of_base, **shape)
        timed = next(iter(_of(own, measure="time", threads=threads)), {"rounds": []})
        variants = dict.fromkeys(name for cell in own for name in cell["cell"]["variants"])
        for variant in variants:
            peak = _peak(own, variant)
            at_one = _peak(_of(of_base, **shape | {"steps": 1}), variant)
            rows.append(
                [
                    f"{shape['batch']} × {shape['tokens']}",
                    shape["dtype"],
                    str(shape["steps"]),
                    str(threads),
                    variant,
                    _number(_seconds(timed, variant)),
                    _ratio(timed, variant, "reference"),
                    _number(peak, ".0f"),
                    _over(peak, _peak(own, "reference")),
                    _over(peak, at_one),
                ]
            )
    return _table(
        [
            "contexts × tokens",
            "precision",
            "K",
            "threads",
            "meta-gradient",
            "seconds",
            "/ reference style",
            "peak MB",
            "/ reference",
            "/ its own at K = 1",
        ],
        rows,
    )


def _reader_table(cells: Cells) -> list[str]:
    rows = [
        [
            str(cell["cell"]["tokens"]),
            cell["cell"]["dtype"],
            str(cell["cell"]["threads"]),
            _number(_seconds(cell, "full context")),
            *(_number(_seconds(cell, form)) for form in ("input_vectors", "key_values")),
            *(_ratio(cell, form, "full context") for form in ("input_vectors", "key_values")),
        ]
        for cell in sorted(_of(cells, kind="reader"), key=lambda cell: _in_order(cell, "tokens", "dtype", "threads"))
    ]
    return [
        "## Training a reader on memories that were written before",
        "",
        "SmolLM2-135M's shape, frozen; LoRA of rank 16 on every linear layer trains; 16 questions with their answers, "
        "24 tokens each. From eight memory tokens, or with the context in the prompt, by the base's own forward.",
        "",
        *_table(
            [
                "context tokens",
                "precision",
                "threads",
                "full context s",
                "input vectors s",
                "keys and values s",
                "input vectors / full context",
                "keys and values / full context",
            ],
            rows,
        ),
    ]


def _attention_table(cells: Cells) -> list[str]:
    rows = []
    for shape in _shapes(cells, "attention", ("shape", "batch", "tokens")):
        own = _of(cells, kind="attention", **shape)
        for timed in _of(own, measure="time"):
            math, fused = _peak(own, "math"), _peak(own, "fused")
            rows.append(
                [
                    f"{shape['batch']} × {shape['tokens']}, heads of {shape['shape']}",
                    _number(_seconds(timed, "math"), ".3f"),
                    _ratio(timed, "fused", "math"),
                    _number(math, ".0f"),
                    _number(fused, ".0f"),
                ]
            )
    return [
        "## Attention that is differentiated twice",
        "",
        "One layer's causal attention, its backward pass and the derivative of that: PyTorch's MATH backend, and the "
        "fused kernels with their second derivative by hand (`base/fused_attention.py`, used from 128 keys on).",
        "",
        *_table(["rows × positions", "MATH s", "fused / MATH", "MATH peak MB", "fused peak MB"], rows),
    ]


def _short_attention_table(cells: Cells) -> list[str]:
    rows = [
        [
            "{batch} × {tokens}".format(**cell["cell"]),
            _number(_seconds(cell, "bfloat16"), ".3f"),
            _ratio(cell, "float32 inside", "bfloat16"),
        ]
        for cell in sorted(_of(cells, kind="short_attention"), key=lambda cell: cell["cell"]["tokens"])
    ]
    return [
        "## Attention of a base in half precision",
        "",
        "One layer's causal attention and its backward pass, 9 heads of 64, inputs and gradients in bfloat16: by "
        "PyTorch's kernel for bfloat16, and with the call made in float32 (`base/short_attention.py`, used up to 192 "
        "keys).",
        "",
        *_table(["rows × positions", "bfloat16 s", "float32 inside / bfloat16"], rows),
    ]


def _segments_table(cells: Cells) -> list[str]:
    rows = [
        [
            "{batch} × {segments} × {segment}".format(
                **cell["cell"], segments=cell["cell"]["tokens"] // cell["cell"]["segment"]
            ),
            cell["cell"]["shape"],
            what,
            _number(_seconds(cell, variant)),
            _ratio(cell, variant, f"{variant}, repeated"),
        ]
        for cell in _of(cells, kind="segments")
        for variant, what in (("write", "WRITE"), ("train", "training step, exact, unrolled"))
        if variant in cell["cell"]["variants"]
    ]
    return [
        "## Segments",
        "",
        "Contexts in segments without prefixes, K = 2. The segments of a context share one row and one copy of the "
        "memory; the ratio is to a row, and a copy, for each.",
        "",
        *_table(["contexts × segments × tokens", "model", "what", "seconds", "/ memory repeated"], rows),
    ]


def _read_table(cells: Cells) -> list[str]:
    rows = []
    for shape in _shapes(_of(cells, measure="time"), "read", ("shape", "tokens", "batch")):
        (timed,) = _of(cells, kind="read", measure="time", **shape)
        sizes = next(iter(_of(cells, kind="read", measure="bytes", **shape | {"batch": 1})), None)
        rows.append(
            [
                shape["shape"],
                str(shape["tokens"]),
                str(shape["batch"]),
                *(
                    _number(_seconds(timed, variant), ".3f")
                    for variant in (
                        "write",
                        "prefill",
                        "query, KV cache",
                        "query, memory in the prompt",
                        "query, memory cached",
                    )
                ),
                _break_even(timed, shape["batch"], _measured_saving),
                _break_even(timed, shape["batch"], _predicted_saving),
                f"{sizes['memory']:,} / {sizes['cache']:,}" if sizes else "–",
            ]
        )
    return [
        "## READ, and when a memory pays",
        "",
        f"K = 2. A query is 16 tokens and {NEW_TOKENS} new ones, greedy, each on a cache: of the "
        "context, or of the memory. Break-even is the number of queries on one context after which WRITE and the "
        "queries take less than the prefill and the queries on its KV cache: (WRITE − prefill) / (query on the KV "
        "cache − query on the memory). The arithmetic beside it puts the bare products of WRITE in WRITE's place, and "
        f"in that of the difference between the queries {NEW_TOKENS} copies of the KV cache, one for each new token: "
        "`DynamicCache` appends by copying, and attention reads every key and value.",
        "",
        *_table(
            [
                "model",
                "context tokens",
                "queries at once",
                "WRITE s",
                "prefill s",
                "query, KV cache s",
                "query, memory s",
                "… its cache kept s",
                "break-even, queries",
                "by arithmetic",
                "bytes: memory / KV cache",
            ],
            rows,
        ),
    ]


Saving = Callable[[dict[str, float]], tuple[float, float]]


def _break_even(timed: dict[str, Any], batch: int, saving: Saving) -> str:
    queries = _break_even_queries(timed, batch, saving)
    return "never" if queries is None else f"{queries:,.0f}"


def _break_even_queries(timed: dict[str, Any], batch: int, saving: Saving) -> float | None:
    """After how many queries a memory pays; `None` where it never does."""
    spent = [saving(row) for row in timed["rounds"]]
    extra, saved = (statistics.median(values) for values in zip(*spent, strict=True))
    return batch * extra / saved if saved > 0 else None


def _measured_saving(row: dict[str, float]) -> tuple[float, float]:
    return row["write"] - row["prefill"], row["query, KV cache"] - row["query, memory in the prompt"]


def _predicted_saving(row: dict[str, float]) -> tuple[float, float]:
    return row["products of WRITE"] - row["prefill"], NEW_TOKENS * row["copy of the KV cache"]


# ------------------------------------------------------------------------------------------------ plot


def _plot(cells: Cells, path: Path) -> None:
    """Cost against context length and against K; left out without matplotlib."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        return
    figure = Figure(figsize=(15, 7), layout="constrained")
    panels = figure.subplots(2, 3)
    lengths = _of(cells, kind="write", batch=1, steps=2, threads=1)
    steps = _of(cells, kind="train", batch=8, tokens=480)
    for column, (title, own, axis, variants) in enumerate(
        (
            ("WRITE, K = 2", lengths, "tokens", ("gradmem", "reference", "forward-only", "floor with attention")),
            ("Training step, 8 × 480 tokens", steps, "steps", ("exact", "finite_difference", "reference")),
        )
    ):
        for variant in variants:
            timed = [(cell["cell"][axis], _seconds(cell, variant)) for cell in _of(own, measure="time")]
            held = [
                (cell["cell"][axis], cell["bytes"] / 1e9)
                for cell in _of(own, measure="memory")
                if cell["cell"]["variants"] == [variant]
            ]
            for row, points in enumerate((timed, held)):
                points = sorted((x, y) for x, y in points if y is not None)
                if points:
                    panels[row][column].plot(*zip(*points, strict=True), marker="o", label=variant)
        panels[0][column].set(title=title, ylabel="seconds")
        panels[1][column].set(xlabel={"tokens": "context tokens", "steps": "K"}[axis], ylabel="GB above the model")
        for row in range(2):
            if axis == "tokens":
                panels[row][column].set_xscale("log", base=2)
                panels[row][column].set_yscale("log")
            if panels[row][column].lines:
                panels[row][column].legend()
    _plot_reading(_of(cells, kind="read", measure="time", shape="smollm2-8-layers"), panels[0][2], panels[1][2])
    figure.savefig(path, dpi=120)


def _plot_reading(cells: Cells, in_all: Any, break_even: Any) -> None:
    """The time of a context and all queries on it, and after how many of them a memory pays."""
    for timed in _of(cells, tokens=1024, batch=1):
        queries = [2**power for power in range(11)]
        for once, each, label in (
            ("write", "query, memory in the prompt", "WRITE, then the memory"),
            ("prefill", "query, KV cache", "prefill, then its KV cache"),
        ):
            first, further = (_seconds(timed, variant) or 0.0 for variant in (once, each))
            in_all.plot(queries, [first + number * further for number in queries], label=label)
    for batch in (1, 16):
        points = [
            (timed["cell"]["tokens"], _break_even_queries(timed, batch, _measured_saving))
            for timed in _of(cells, batch=batch)
        ]
        found = sorted((tokens, queries) for tokens, queries in points if queries is not None)
        if found:
            break_even.plot(*zip(*found, strict=True), marker="o", label=f"{batch} at once")
    in_all.axvline(PAPERS_READS, linestyle="--", color="grey", label=f"the paper's {PAPERS_READS} READs")
    break_even.axhline(PAPERS_READS, linestyle="--", color="grey", label=f"the paper's {PAPERS_READS} READs")
    in_all.set(title="1,024 tokens and the queries on them", xlabel="queries", xscale="log", yscale="log")
    break_even.set(xlabel="context tokens", ylabel="queries after which a memory pays", xscale="log", yscale="log")
    in_all.legend()
    break_even.legend()
