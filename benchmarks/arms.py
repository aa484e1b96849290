"""Arms of a study: run one after the other, each result in a file of its own, and a table of all of them."""

import argparse
import json
from collections.abc import Callable, Iterable
from pathlib import Path

import torch


def run_chosen(
    description: str,
    arms: Iterable[str],
    results: Path,
    run_arm: Callable[[str], dict],
    write_table: Callable[[], None],
) -> None:
    """Run the arms that the command line names, or all that have no result yet.

    Args:
        description: of the command, for its help.
        arms: their names.
        results: directory of the results; an arm that was interrupted has none.
        run_arm: from a name to what is kept of the arm.
        write_table: called after each arm.
    """
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("arms", nargs="*", help=", ".join(arms))
    chosen = parser.parse_args().arms or [name for name in arms if not (results / f"{name}.json").is_file()]
    torch.set_num_threads(1)
    results.mkdir(parents=True, exist_ok=True)
    for name in chosen:
        result = run_arm(name)
        (results / f"{name}.json").write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
        write_table()
