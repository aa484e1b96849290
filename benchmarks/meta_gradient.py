"""The meta-gradient by each way back: how close to the exact one, on a trained model, by radius and precision.

    python -m benchmarks.meta_gradient

Results go to `benchmarks/results/meta_gradient.json`, the tables to `benchmarks/results/meta_gradient.md`.
"""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch.autograd import forward_ad
from torch.autograd.function import once_differentiable

import hf_gradmem
from hf_gradmem import DataCollatorForGradMem, GradMemForCausalLM
from hf_gradmem.base.attention import twice_differentiable
from hf_gradmem.tasks import load_task
from hf_gradmem.tasks.kv_retrieval import build_tokenizer
from hf_gradmem.writing.meta_gradients import finite_difference
from hf_gradmem.writing.meta_gradients.finite_difference import RADIUS
from hf_gradmem.writing.objectives.objective import Objective

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


# ------------------------------------------------------------------------------------------------ forward mode


class _ForwardOverReverse(torch.autograd.Function):
    """The same products as the finite differences, with no radius: the tangent of the first-order gradient along v.

    Second derivatives again: the MATH attention, and a gradient whose graph is kept, since not every fused backward
    kernel has a forward-mode rule.
    """

    @staticmethod
    def forward(ctx: Any, objective: Objective, memory: Tensor, *parameters: Tensor):
        ctx.objective, ctx.parameters = objective, parameters
        ctx.save_for_backward(memory)
        with torch.enable_grad():
            loss, gradient = objective.value_and_gradient(memory)
        return loss, gradient

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, loss_adjoint: Tensor, adjoint: Tensor):
        (memory,) = ctx.saved_tensors
        with torch.enable_grad(), twice_differentiable(), forward_ad.dual_level():
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
    objective: Objective, memory: Tensor, parameters: Sequence[Tensor], radius: float
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
        model.config.meta_gradient_steps = 1
        add(precision, "exact in the last step", meta_gradient(model, batch, "exact", steps, autocast=autocast))
        model.config.meta_gradient_steps = None
        add(precision, "first_order", meta_gradient(model, batch, "first_order", steps, autocast=autocast))
        if autocast is None:
            with mock.patch.object(finite_difference, "differenced_gradient", forward_over_reverse):
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


# ------------------------------------------------------------------------------------------------ tables


def accuracy_tables(rows: list[dict[str, Any]]) -> list[str]:
    lines = [
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


def write_table(rows: list[dict[str, Any]]) -> None:
    RESULTS.write_text(json.dumps(rows, indent=1) + "\n", encoding="utf-8")
    lines = [
        "# The meta-gradient, by each way back",
        "",
        "Command: `python -m benchmarks.meta_gradient`. What each costs is in `performance_cpu.md`.",
        "",
        *accuracy_tables(rows),
    ]
    TABLES.write_text("\n".join(lines) + "\n", encoding="utf-8")


def main() -> None:
    torch.set_num_threads(1)
    write_table(accuracy(2, list(PRECISIONS)) + accuracy(5, ["float32"]))


if __name__ == "__main__":
    main()
