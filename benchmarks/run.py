"""Time and memory of WRITE, training and READ, beside the reference style and the matrix products alone.

    python -m benchmarks.run                  # every cell that has no result yet, then the tables
    python -m benchmarks.run write train      # cells whose name contains one of these
    python -m benchmarks.run --tables         # the tables alone

A cell is a process of its own and one file, `performance/<device>/<cell>.json` in the results; one that is there is
kept, so an interrupted run goes on. A cell that needs more memory than is free is left out, and the run says so.
"""

import argparse
import itertools
import json
import os
import platform
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch

from benchmarks.meta_gradient import FORWARD_MODE
from benchmarks.tables import write_tables

RESULTS = Path(__file__).parent / "results"
# glibc keeps freed blocks below its threshold, which would count as memory in use.
GIVE_BACK = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}

FLOORS = ["floor", "floor with attention"]
WRITERS = ["gradmem", "reference", *FLOORS, "forward-only"]
WAYS_BACK = ["exact", "exact, last step", "finite_difference", "first_order"]
KEEP_THE_GRAPH = ["exact, unrolled", "reference"]
COMPILED = ["exact, compiled", "exact, unrolled, compiled"]
PRECISIONS: tuple[dict[str, str], ...] = ({}, {"dtype": "bfloat16"})
THREADS: tuple[dict[str, int], ...] = ({}, {"threads": 2})
PACKED = ["write", "write, repeated", "train", "train, repeated"]
READERS = [
    "write",
    "products of WRITE",
    "prefill",
    "copy of the KV cache",
    "query, KV cache",
    "query, memory cached",
    "query, memory in the prompt",
]


class _Cells(dict[str, dict[str, Any]]):
    """Cells by their names; `gigabytes` is what one needs beside the model."""

    def add(self, measure: str, variants: list[str], gigabytes: float, rounds: int = 3, **shape: Any) -> None:
        """One cell for all variants, or, where memory is measured, one for each."""
        name = "_".join(map(str, (*shape.values(), measure)))
        needs = {"measure": measure, "gigabytes": gigabytes, "rounds": rounds, "threads": 1, **shape}
        if measure == "memory":
            for variant in variants:
                self[f"{name}_{variant.replace(',', '').replace(' ', '-')}"] = needs | {"variants": [variant]}
        else:
            self[name] = needs | {"variants": variants}


def cells() -> dict[str, dict[str, Any]]:
    """Every cell by its name, in the order in which they are measured."""
    found = _Cells()
    _add_write(found)
    _add_training(found)
    _add_parts(found)
    _add_reading(found)
    return found


def _add_write(found: _Cells) -> None:
    for batch, length, rounds, gigabytes in (
        (1, 2048, 3, 18),
        (4, 256, 5, 7),
        (1, 256, 5, 3),
        (8, 256, 3, 13),
        (1, 1024, 3, 8),
        (1, 512, 5, 4),
    ):
        shape = {"kind": "write", "batch": batch, "tokens": length}
        found.add("memory", ["gradmem", "forward-only"], 2, **shape)
        found.add("memory", ["reference"], gigabytes, **shape)
        found.add("time", WRITERS, gigabytes, rounds, **shape)
    for batch, length, gigabytes in ((1, 2048, 18), (4, 256, 7)):
        shape = {"kind": "write", "batch": batch, "tokens": length, "threads": 2}
        found.add("time", [*WRITERS, "gradmem, bfloat16"], gigabytes, **shape)
    for batch, length in ((8, 50), (32, 56), (4, 256), (1, 2048)):
        shape = {"kind": "write", "batch": batch, "tokens": length, "steps": 1, "shape": "smollm2"}
        for precision, threads in itertools.product(PRECISIONS, THREADS):
            found.add("time", ["gradmem", *FLOORS], 6, **shape, **precision, **threads)
    found.add("memory", ["gradmem"], 6, kind="write", batch=1, tokens=16384, steps=1)
    found.add("time", ["gradmem", "compiled"], 2, kind="write", batch=2, tokens=512)
    for length in (4096, 8192):
        found.add("memory", ["gradmem"], 4, kind="write", batch=1, tokens=length)
        found.add("time", ["gradmem", *FLOORS], 4, 1, kind="write", batch=1, tokens=length)


def _add_training(found: _Cells) -> None:
    ways = [*WAYS_BACK, *KEEP_THE_GRAPH, *COMPILED, "floor"]
    for steps in (1, 2, 5, 8):
        shape = {"kind": "train", "batch": 8, "tokens": 480, "steps": steps, "shape": "kv-4-layers"}
        found.add("memory", WAYS_BACK, 2, **shape)
        found.add("memory", KEEP_THE_GRAPH, 2 + steps * 1.2, **shape)
        if steps in (1, 8):
            found.add("memory", COMPILED, 2 + steps, **shape)
        other_ways = [FORWARD_MODE] if steps == 2 else []  # the finite differences' products, with no radius
        found.add("memory", other_ways, 4, **shape)
        found.add("time", [*ways, *other_ways], 2 + steps * 1.2, rounds=5 if steps <= 2 else 2, **shape)
    shape = {"kind": "train", "batch": 64, "tokens": 40, "steps": 2, "shape": "kv-4-layers"}
    found.add("memory", [*WAYS_BACK, *KEEP_THE_GRAPH, *COMPILED], 4, **shape)
    found.add("time", ways, 4, rounds=9, **shape)
    shape = {"kind": "train", "batch": 16, "tokens": 40, "steps": 2, "shape": "smollm2", "trains": "lora"}
    ways = ["exact", "exact, last step", "exact, last step, unrolled", "finite_difference", "reference"]
    for precision in PRECISIONS:
        found.add("memory", ways, 14, **shape, **precision)
        for threads in THREADS:
            found.add("time", [*ways, "floor", "floor, last step"], 16, rounds=2, **shape, **precision, **threads)
    for length in (40, 256):
        shape = {"kind": "reader", "batch": 16, "tokens": length, "shape": "smollm2"}
        for precision, threads in itertools.product(PRECISIONS, THREADS):
            found.add("time", ["input_vectors", "key_values", "full context"], 12, **shape, **precision, **threads)


def _add_parts(found: _Cells) -> None:
    """Attention alone, and segments in one row."""
    for batch, length, shape in (
        (64, 48, "kv-4-layers"),
        (32, 128, "kv-4-layers"),
        (8, 488, "kv-4-layers"),
        (4, 264, "smollm2-8-layers"),
        (1, 1032, "smollm2-8-layers"),
    ):
        cell = {"kind": "attention", "batch": batch, "tokens": length, "shape": shape}
        found.add("time", ["math", "fused"], 2, rounds=9, **cell)
        found.add("memory", ["math", "fused"], 2, **cell)
    for batch, length in ((32, 64), (8, 66), (16, 144), (4, 264), (1, 1032)):
        cell = {"kind": "short_attention", "batch": batch, "tokens": length, "dtype": "bfloat16"}
        found.add("time", ["bfloat16", "float32 inside"], 2, rounds=15, **cell)
    for segments, length, batch, shape, variants in (
        (8, 7, 32, "kv-4-layers", PACKED),
        (16, 7, 16, "kv-4-layers", PACKED),
        (32, 7, 1, "smollm2-8-layers", PACKED[:2]),
        (12, 20, 1, "smollm2-8-layers", PACKED[:2]),
    ):
        cell = {"kind": "segments", "batch": batch, "tokens": segments * length, "segment": length, "shape": shape}
        found.add("time", variants, 2, rounds=7, **cell)


def _add_reading(found: _Cells) -> None:
    for length in (256, 1024, 4096):
        for batch in (1, 16):
            found.add("time", READERS, 4, kind="read", batch=batch, tokens=length)
        found.add("bytes", [], 1, kind="read", batch=1, tokens=length)
    for length, gigabytes, rounds in ((1024, 4, 2), (4096, 12, 1)):
        for batch in (1, 16):
            found.add("time", READERS, gigabytes, rounds, kind="read", batch=batch, tokens=length, shape="smollm2")
        found.add("bytes", [], 1, kind="read", batch=1, tokens=length, shape="smollm2")


def run_cell(cell: dict[str, Any], path: Path) -> None:
    """Measure a cell in a process of its own; its file appears whole or not at all."""
    threads = str(cell["threads"])
    # They spin for some microseconds before they sleep, as for the demo: the Makefile says why.
    environment = os.environ | {"OMP_NUM_THREADS": threads, "MKL_NUM_THREADS": threads, "GOMP_SPINCOUNT": "20000"}
    if cell["measure"] == "memory":
        environment |= GIVE_BACK
    arguments = {name: value for name, value in cell.items() if name != "gigabytes"}
    command = [sys.executable, "-m", "benchmarks.cells", json.dumps(arguments)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    if done.returncode:
        print(f"{path.stem} failed:\n{done.stderr[-2000:]}", file=sys.stderr)
        return
    unfinished = path.with_suffix(f".{os.getpid()}")
    unfinished.write_text(done.stdout.splitlines()[-1] + "\n", encoding="utf-8")
    unfinished.replace(path)


def free_gigabytes() -> float:
    if torch.cuda.is_available():
        return torch.cuda.mem_get_info()[0] / 2**30
    lines = Path("/proc/meminfo").read_text(encoding="ascii").splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("MemAvailable:")) / 2**20


def device_name() -> str:
    return torch.cuda.get_device_name() if torch.cuda.is_available() else platform.machine()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", help="measure cells whose name contains one of these; all by default")
    parser.add_argument("--tables", action="store_true", help="measure nothing, write the tables")
    parser.add_argument("--results", type=Path, default=RESULTS, help="directory of the tables and cells")
    arguments = parser.parse_args()
    directory = arguments.results / "performance" / ("gpu" if torch.cuda.is_available() else "cpu")
    directory.mkdir(parents=True, exist_ok=True)
    for name, cell in cells().items():
        path = directory / f"{name}.json"
        wanted = not arguments.names or any(part in name for part in arguments.names)
        if arguments.tables or path.is_file() or not wanted:
            continue
        if free_gigabytes() < cell["gigabytes"]:
            print(f"{name} needs {cell['gigabytes']:g} GB, {free_gigabytes():.1f} are free: left out", file=sys.stderr)
            continue
        print(name, flush=True)
        run_cell(cell, path)
        write_tables(directory, arguments.results, device_name())
    write_tables(directory, arguments.results, device_name())


if __name__ == "__main__":
    main()
