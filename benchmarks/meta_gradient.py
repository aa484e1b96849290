"""The meta-gradient by each way back: how close to the exact one, and at what price.

    python -m benchmarks.meta_gradient            # both tables
    python -m benchmarks.meta_gradient accuracy   # on a trained model: error by radius and precision
    python -m benchmarks.meta_gradient cost       # time and peak memory by K, each cell in a process of its own

A cell of the second table that has a result is kept. Results go to `benchmarks/results/meta_gradient.json`, the tables
to `benchmarks/results/meta_gradient.md`.
"""

import argparse
import itertools
import json
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch.autograd import forward_ad
from torch.autograd.function import once_differentiable

import hf_gradmem
from benchmarks.cells import measure_memory
from hf_gradmem import DataCollatorForGradMem, GradMemForCausalLM
from hf_gradmem.tasks import load_task
from hf_gradmem.tasks.kv_retrieval import build_tokenizer
from hf_gradmem.writing import inner_loop
from hf_gradmem.writing.attention import twice_differentiable
from hf_gradmem.writing.finite_difference import RADIUS
from hf_gradmem.writing.objective import ReconstructionObjective

Tensor = torch.Tensor
RESULTS = Path(__file__).parent / "results" / "meta_gradient.json"
TABLES = RESULTS.with_suffix(".md")
ADAPTER = Path(hf_gradmem.__file__).parent / "pretrained" / "gradmem-kv-tiny"

RADII = [1e-4 * 2**power for power in range(10)]
# Precision: the weights' type, and that of autocast.
PRECISIONS = {
    "float32": (torch.float32, None),
    "bfloat16 autocast": (torch.float32, torch.bfloat16),
    "bfloat16": (torch.bfloat16, None),
}
FORWARD_MODE = "forward over reverse"
COST_VARIANTS = ("exact, unrolled", "exact", "finite_difference", FORWARD_MODE, "first_order")
COST_STEPS = (1, 2, 5, 8)
COST_CELL = {"kind": "train", "shape": "kv-4-layers", "dtype": "float32", "batch": 8, "tokens": 480}


# ------------------------------------------------------------------------------------------------ forward mode


class _ForwardOverReverse(torch.autograd.Function):
    """The same products as the finite differences, with no radius: the tangent of the first-order gradient along v.

    Second derivatives again: the MATH attention, and a gradient whose graph is kept, since not every fused backward
    kernel has a forward-mode rule.
    """

    @staticmethod
    def forward(ctx: Any, objective: ReconstructionObjective, memory: Tensor, *parameters: Tensor):
        ctx.objective, ctx.parameters = objective, parameters
        ctx.save_for_backward(memory)
        with torch.enable_grad():
            loss, gradient = objective.value_and_gradient(memory)
        return gradient, loss

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, adjoint: Tensor, loss_adjoint: Tensor):
        (memory,) = ctx.saved_tensors
        base_model = ctx.objective.weights.base_model
        with torch.enable_grad(), twice_differentiable(base_model), forward_ad.dual_level():
            start = forward_ad.make_dual(memory.detach().clone().requires_grad_(), adjoint.clone())
            loss = ctx.objective(start)
            # The tangent of the weights of the losses carries the loss's own gradient.
            weights = forward_ad.make_dual(torch.ones_like(loss_adjoint), loss_adjoint.clone())
            gradients = torch.autograd.grad(
                loss, (start, *ctx.parameters), weights, create_graph=True, allow_unused=True
            )
            tangents = [None if each is None else forward_ad.unpack_dual(each).tangent for each in gradients]
        return None, *(None if each is None else each.detach() for each in tangents)


def forward_over_reverse(
    objective: ReconstructionObjective, memory: Tensor, parameters: Sequence[Tensor], radius: float
) -> tuple[Tensor, Tensor]:
    """Stands in for `differenced_gradient`."""
    return _ForwardOverReverse.apply(objective, memory, *parameters)


# ------------------------------------------------------------------------------------------------ accuracy


def trained_model(dtype: torch.dtype) -> GradMemForCausalLM:
    model = GradMemForCausalLM.from_pretrained(ADAPTER, dtype=dtype)
    model.requires_grad_(True)
    return model.train()


def meta_gradient(
    model: GradMemForCausalLM,
    batch: dict[str, Tensor],
    mode: str,
    steps: int,
    radius: float | None = None,
    autocast: torch.dtype | None = None,
) -> Tensor:
    """The gradient of everything that trains, flat, in float64."""
    model.config.meta_gradient, model.config.meta_gradient_radius = mode, radius
    model.zero_grad()
    with torch.autocast(model.device.type, dtype=autocast or torch.bfloat16, enabled=autocast is not None):
        loss = model(**batch, write_steps=steps).loss
    loss.backward()
    return torch.cat([parameter.grad.double().flatten() for parameter in model.parameters()])


def compared(gradient: Tensor, reference: Tensor) -> dict[str, float]:
    return {
        "error": ((gradient - reference).norm() / reference.norm()).item(),
        "cosine": torch.cosine_similarity(gradient, reference, dim=0).item(),
    }


def accuracy(steps: int, precisions: Sequence[str]) -> list[dict[str, Any]]:
    """Error against the exact meta-gradient in float64, by precision, way back and radius."""
    rows = load_task("kv_retrieval", num_contexts=32, num_pairs=8, key_length=1, value_length=1, end_mark=False, seed=5)
    batch = DataCollatorForGradMem(build_tokenizer(), queries_per_context=8)(list(rows))
    reference = meta_gradient(trained_model(torch.float64), batch, "exact", steps)
    table = []

    def add(precision: str, way: str, gradient: Tensor, radius: float | None = None) -> None:
        row = {"write_steps": steps, "precision": precision, "way": way, "radius": radius}
        table.append(row | compared(gradient, reference))
        print(json.dumps(table[-1]), flush=True)

    for precision in precisions:
        weights, autocast = PRECISIONS[precision]
        model = trained_model(weights)
        add(precision, "exact", meta_gradient(model, batch, "exact", steps, autocast=autocast))
        add(precision, "first_order", meta_gradient(model, batch, "first_order", steps, autocast=autocast))
        if autocast is None:
            with mock.patch.object(inner_loop, "differenced_gradient", forward_over_reverse):
                add(precision, FORWARD_MODE, meta_gradient(model, batch, "finite_difference", steps))
        default = RADIUS[autocast or weights]
        by_radius = {
            radius: meta_gradient(model, batch, "finite_difference", steps, radius, autocast)
            for radius in (default, *RADII)
        }
        add(precision, "default", by_radius[default], default)
        for radius in RADII:
            add(precision, "central", by_radius[radius], radius)
            if 2 * radius in by_radius:  # Richardson: two more evaluations for an error of order r⁴
                add(precision, "Richardson", (4 * by_radius[radius] - by_radius[2 * radius]) / 3, radius)
    return table


# ------------------------------------------------------------------------------------------------ cost


def cost_cell(variant: str, steps: int) -> dict[str, Any]:
    """Bytes and seconds of one training step, in this process."""
    mode = "finite_difference" if variant == FORWARD_MODE else variant
    stand_in = forward_over_reverse if variant == FORWARD_MODE else inner_loop.differenced_gradient
    with mock.patch.object(inner_loop, "differenced_gradient", stand_in):
        return measure_memory(COST_CELL | {"variants": [mode], "steps": steps})


def run_costs(results: dict[str, list[dict[str, Any]]]) -> None:
    """Every cell that has no result yet, by K."""
    table = results.setdefault("cost", [])
    # glibc keeps what is freed otherwise, and the peak would count it.
    environment = os.environ | {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}
    for steps, variant in itertools.product(COST_STEPS, COST_VARIANTS):
        if any((row["way"], row["write_steps"]) == (variant, steps) for row in table):
            continue
        command = [sys.executable, "-m", "benchmarks.meta_gradient", "cell", variant, str(steps)]
        output = subprocess.run(command, env=environment, check=True, stdout=subprocess.PIPE, text=True).stdout
        table.append({"way": variant, "write_steps": steps} | json.loads(output.splitlines()[-1]))
        print(json.dumps(table[-1]), flush=True)
        write_tables(results)


# ------------------------------------------------------------------------------------------------ tables


def accuracy_tables(rows: list[dict[str, Any]]) -> list[str]:
    lines = [
        "## Accuracy",
        "",
        "Relative error (and cosine) of the gradient of all parameters of `gradmem-kv-tiny`, a trained model, against "
        "its exact meta-gradient in float64, on 32 contexts of 8 pairs with all queries. r is relative to the norm of "
        "each sample's memory. Richardson combines r and 2r.",
    ]
    for steps, precision in dict.fromkeys((row["write_steps"], row["precision"]) for row in rows):
        chosen = [row for row in rows if (row["write_steps"], row["precision"]) == (steps, precision)]
        lines += ["", f"{precision}, K = {steps}", "", "| way back | r | error | cosine |", "|---|---|---|---|"]
        lines += [
            f"| {'finite difference, default' if row['way'] == 'default' else row['way']} | "
            f"{'' if row['radius'] is None else format(row['radius'], '.2g')} | {row['error']:.1e} | "
            f"{row['cosine']:.6f} |"
            for row in chosen
        ]
    return lines


def cost_table(rows: list[dict[str, Any]]) -> list[str]:
    cells = {(row["way"], row["write_steps"]): row for row in rows}
    lines = [
        "## Cost",
        "",
        "One training step of a 4-layer, 128-wide Llama, all of it training, batch 8, 480 tokens, float32: seconds (of "
        "the processor on a CPU, one thread) and peak memory above the model, each in a process of its own, run once. "
        f"Other work shared the machine (load {min(row['load'] for row in rows):.0f} to "
        f"{max(row['load'] for row in rows):.0f}), so the seconds are rough.",
        "",
        "| way back | " + " | ".join(f"K = {steps}" for steps in COST_STEPS) + " | memory, K = 8 over K = 1 |",
        "|---|" + "---|" * (len(COST_STEPS) + 1),
    ]
    for variant in COST_VARIANTS:
        row = [cells.get((variant, steps)) for steps in COST_STEPS]
        texts = [
            "not run" if each is None else f"{each['seconds']:.1f} s, {each['bytes'] / 1e9:.2f} GB" for each in row
        ]
        growth = f"{row[-1]['bytes'] / row[0]['bytes']:.2f}" if row[0] and row[-1] else ""
        lines.append(f"| {variant} | {' | '.join(texts)} | {growth} |")
    return lines


def write_tables(results: dict[str, list[dict[str, Any]]]) -> None:
    RESULTS.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    lines = ["# The meta-gradient, by each way back", "", "Command: `python -m benchmarks.meta_gradient`."]
    if "accuracy" in results:
        lines += ["", *accuracy_tables(results["accuracy"])]
    if "cost" in results:
        lines += ["", *cost_table(results["cost"])]
    TABLES.write_text("\n".join(lines) + "\n", encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", nargs="?", choices=["accuracy", "cost", "cell"], help="both tables by default")
    parser.add_argument("cell", nargs="*", help="way back and K of one cell of the cost table")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    if arguments.what == "cell":
        variant, steps = arguments.cell
        print(json.dumps(cost_cell(variant, int(steps)) | {"load": os.getloadavg()[0]}))
        return
    results = json.loads(RESULTS.read_text(encoding="utf-8")) if RESULTS.is_file() else {}
    if arguments.what != "cost":
        results["accuracy"] = accuracy(2, list(PRECISIONS)) + accuracy(5, ["float32"])
        write_tables(results)
    if arguments.what != "accuracy":
        run_costs(results)


if __name__ == "__main__":
    main()
