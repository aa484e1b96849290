"""The notebooks as they are kept: run to their end in full, with nothing in them of the machine that ran them.

`make notebooks` runs them.
"""

import re
from pathlib import Path

import nbformat
import pytest

NOTEBOOKS = sorted((Path(__file__).parents[1] / "notebooks").glob("*.ipynb"))
MACHINE = re.compile(
    r"/(?:home|root|tmp|var|usr|opt|mnt|work|Users)/|[A-Z]:\\|site-packages|127\.0\.0\.1|localhost|0x[0-9a-f]{6,}"
)
PROGRESS = re.compile(r"\d+%\|")


def read(path: Path) -> nbformat.NotebookNode:
    notebook = nbformat.read(path, as_version=4)
    nbformat.validate(notebook)
    return notebook


def code_cells(path: Path) -> list[nbformat.NotebookNode]:
    return [cell for cell in read(path).cells if cell.cell_type == "code"]


def shown(path: Path) -> str:
    """The text of all outputs, in whatever forms they are kept."""
    parts = []
    for output in (output for cell in code_cells(path) for output in cell.outputs):
        forms = output.get("data", {})
        parts += [output.get("text", ""), *(forms[name] for name in forms if not name.startswith("image/"))]
    return "\n".join(str(part) for part in parts)


def named(start: str) -> Path:
    (path,) = (path for path in NOTEBOOKS if path.name.startswith(start))
    return path


each_notebook = pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)


@each_notebook
def test_every_cell_was_run_once_in_order_and_without_complaint(path):
    cells = code_cells(path)
    assert [cell.execution_count for cell in cells] == list(range(1, len(cells) + 1))
    kinds = {(output.output_type, output.get("name")) for cell in cells for output in cell.outputs}
    assert kinds <= {("stream", "stdout"), ("display_data", None), ("execute_result", None)}


@each_notebook
def test_nothing_of_the_machine_is_kept(path):
    notebook, text = read(path), shown(path)
    assert MACHINE.findall(text) == []
    assert PROGRESS.findall(text) == []
    assert "\n".join(cell.source for cell in notebook.cells).count("/work/") == 0
    assert set(notebook.metadata) == {"kernelspec"}
    assert all(not cell.metadata for cell in notebook.cells)


def test_kept_outputs_are_those_of_full_runs():
    assert "verbatim: True" in shown(named("01"))
    last = re.findall(r"exact match ([\d.]+)", shown(named("02")))[-1]
    assert float(last) > 0.9
    assert "?!b: Q!" in shown(named("03"))
