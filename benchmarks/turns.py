"""Ways that take turns in one process, on one thread: what such a benchmark is given, and how its ratios are told."""

import argparse
import statistics
from collections.abc import Sequence

import torch
from transformers import AutoModelForCausalLM, PreTrainedModel


def base_on_one_thread(description: str | None, rounds: int) -> tuple[argparse.Namespace, PreTrainedModel]:
    """What the command line says, `base`, `rounds` and `dtype`, and the base that it names.

    Args:
        description: of the command, for its help.
        rounds: how many by default.
    """
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--base", required=True, help="the base's directory or Hub repository")
    parser.add_argument("--rounds", type=int, default=rounds)
    parser.add_argument("--dtype", default="float32")
    given = parser.parse_args()
    torch.set_num_threads(1)
    return given, AutoModelForCausalLM.from_pretrained(given.base, dtype=given.dtype)


def median_and_range(ratios: Sequence[float]) -> str:
    """Three cells of a table."""
    return " | ".join(f"{of(ratios):.2f}" for of in (statistics.median, min, max))
