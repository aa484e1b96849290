"""Run the notebooks in full, and keep what they show: this is where their stored outputs come from.

    python notebooks/execute.py                             # all of them
    python notebooks/execute.py 02_train_with_trainer       # this one

A notebook is replaced when it has run to its end, and stays as it was if a cell fails. `make notebooks` runs them
shortened, as a test, and keeps nothing.
"""

import argparse
import os
import re
from pathlib import Path

import nbformat
from nbclient import NotebookClient

from hf_gradmem.files import whole_file

ROOT = Path(__file__).parent
ENVIRONMENT = {
    "HF_GRADMEM_NOTEBOOK": "full",
    # tqdm's complaint that it cannot draw its bars as widgets; none is drawn.
    "PYTHONWARNINGS": "ignore:IProgress not found",
}


def execute(path: Path) -> None:
    """Run one notebook and write it back with its outputs."""
    notebook = nbformat.read(path, as_version=4)
    # No times in the metadata: two runs that show the same are the same file, but for the seconds that they print.
    place = {"metadata": {"path": str(ROOT)}}
    client = NotebookClient(notebook, timeout=None, record_timing=False, coalesce_streams=True, resources=place)
    client.execute(env=os.environ | ENVIRONMENT)
    notebook.metadata = {"kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"}}
    for index, cell in enumerate(notebook.cells):
        cell.id = f"cell-{index}"
        for output in cell.get("outputs", ()):
            _strip(output)
    with whole_file(path) as unfinished:
        nbformat.write(notebook, unfinished)


def _strip(output: nbformat.NotebookNode) -> None:
    """Take out the addresses in the text that stands for a picture or a table where neither can be shown."""
    text = output.get("data", {}).get("text/plain")
    if text is not None:
        output.data["text/plain"] = re.sub(r" at 0x[0-9a-f]+", "", text)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    names = sorted(path.stem for path in ROOT.glob("*.ipynb"))
    parser.add_argument("names", nargs="*", metavar="name", help=f"of {', '.join(names)}; all by default")
    chosen = parser.parse_args().names
    if unknown := set(chosen) - set(names):
        parser.error(f"There is no notebook {', '.join(sorted(unknown))}. There are {', '.join(names)}.")
    for name in chosen or names:
        print(name, flush=True)
        execute(ROOT / f"{name}.ipynb")


if __name__ == "__main__":
    main()
