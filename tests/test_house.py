"""The house: what the package's files may import, whose names they may use, and how long they may be.

The checks read the sources with `ast` and import nothing. Each is also run on a made-up tree that breaks its rule.
"""

import ast
import re
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache, cached_property
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGES = ("hf_gradmem", "hf_gradmem_cli")
FLOORED = "hf_gradmem"  # the package whose files stand on floors; the command line's stand above all of them
ARCHITECTURE = ROOT / "docs" / "architecture.md"
LONGEST_FILE, LONGEST_FUNCTION = 420, 60


# ------------------------------------------------------------------------------------------------ reading


@dataclass(frozen=True)
class Source:
    """A file of the package.

    Attributes:
        name: its module, such as `hf_gradmem.base.lora`.
        path: relative to the root, such as `hf_gradmem/base/lora.py`.
        text: what it holds.
    """

    name: str
    path: str
    text: str

    @cached_property
    def tree(self) -> ast.Module:
        return ast.parse(self.text)

    @property
    def package(self) -> str:
        """What its relative imports start from."""
        return self.name if self.path.endswith("__init__.py") else self.name.rpartition(".")[0]

    def imports(self) -> Iterator[tuple[ast.stmt, str, str | None]]:
        """Statement, module and, of `from module import name`, the name; wherever in the file they stand."""
        for node in ast.walk(self.tree):
            if isinstance(node, ast.Import):
                yield from ((node, alias.name, None) for alias in node.names)
            elif isinstance(node, ast.ImportFrom):
                module = node.module or ""
                if node.level:
                    above = self.package.split(".")[: len(self.package.split(".")) - node.level + 1]
                    module = ".".join([*above, module] if module else above)
                yield from ((node, module, alias.name) for alias in node.names)

    def own_names(self) -> set[str]:
        """Private names that the file defines: functions, classes, assignments, and attributes of self and cls."""
        found = set()
        for node in ast.walk(self.tree):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
                found.add(node.name)
            elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
                found.add(node.id)
            elif isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store) and _is_self(node.value):
                found.add(node.attr)
        return {name for name in found if _is_private(name)}


def _is_private(name: str) -> bool:
    return name.startswith("_") and not name.startswith("__") and name != "_"


def _is_self(node: ast.expr) -> bool:
    """`self`, `cls` or `super()`."""
    if isinstance(node, ast.Call):
        node = node.func
        return isinstance(node, ast.Name) and node.id == "super"
    return isinstance(node, ast.Name) and node.id in ("self", "cls")


def read_sources(root: Path) -> dict[str, Source]:
    """The files of the packages below `root`, by module."""
    found = {}
    for path in sorted(file for package in PACKAGES for file in (root / package).rglob("*.py")):
        relative = path.relative_to(root)
        parts = relative.with_suffix("").parts
        name = ".".join(parts[:-1] if parts[-1] == "__init__" else parts)
        found[name] = Source(name, relative.as_posix(), path.read_text(encoding="utf-8"))
    return found


def imported_files(sources: dict[str, Source], source: Source) -> set[str]:
    """Modules of the packages that a file names in its imports: `from package import module` is the module."""
    found = set()
    for _, module, name in source.imports():
        target = f"{module}.{name}" if f"{module}.{name}" in sources else module
        if target in sources and target != source.name:
            found.add(target)
    return found


def read_floors(document: Path) -> dict[str, int]:
    """The table between the markers: path below `hf_gradmem` → the number of its floor.

    Raises:
        ValueError: there is no table, or a path stands in it twice.
    """
    match = re.search(r"<!-- floors -->\n(.*?)<!-- /floors -->", document.read_text(encoding="utf-8"), re.DOTALL)
    if match is None:
        raise ValueError(f"{document} has no table between <!-- floors --> and <!-- /floors -->.")
    floors: dict[str, int] = {}
    for line in match[1].splitlines():
        floor, *rest = [cell.strip() for cell in line.strip().strip("|").split("|")]
        if not floor.isdigit():
            continue
        for path in re.findall(r"`([^`]+)`", rest[0]):
            if path in floors:
                raise ValueError(f"{document} has `{path}` twice.")
            floors[path] = int(floor)
    return floors


def floor_of(source: Source, floors: dict[str, int]) -> int | None:
    """The floor of a file: that of the longest path that holds it."""
    if not source.path.startswith(f"{FLOORED}/"):
        return max(floors.values(), default=0) + 1
    path = source.path.removeprefix(f"{FLOORED}/")
    holding = [room for room in floors if path == room or (room.endswith("/") and path.startswith(room))]
    return floors[max(holding, key=len)] if holding else None


# ------------------------------------------------------------------------------------------------ the checks


def circles(sources: dict[str, Source]) -> list[list[str]]:
    """Groups of files that import each other, directly or through others (Tarjan's components)."""
    graph = {name: imported_files(sources, source) for name, source in sources.items()}
    numbers: dict[str, int] = {}
    lowest: dict[str, int] = {}
    stack: list[str] = []
    found = []

    def visit(name: str) -> None:
        numbers[name] = lowest[name] = len(numbers)
        stack.append(name)
        for target in sorted(graph[name]):
            if target not in numbers:
                visit(target)
                lowest[name] = min(lowest[name], lowest[target])
            elif target in stack:
                lowest[name] = min(lowest[name], numbers[target])
        if lowest[name] == numbers[name]:
            group = stack[stack.index(name) :]
            del stack[stack.index(name) :]
            if len(group) > 1:
                found.append(sorted(group))

    for name in graph:
        if name not in numbers:
            visit(name)
    return found


def imports_that_run_up(sources: dict[str, Source], floors: dict[str, int]) -> list[str]:
    """Imports from a lower floor to a higher one."""
    return [
        f"{source.path} (floor {floor_of(source, floors)}) imports {sources[target].path} "
        f"(floor {floor_of(sources[target], floors)})"
        for source in sources.values()
        for target in sorted(imported_files(sources, source))
        if (floor_of(source, floors) or 0) < (floor_of(sources[target], floors) or 0)
    ]


def without_a_floor(sources: dict[str, Source], floors: dict[str, int]) -> list[str]:
    """Files that stand on no floor, and rows of the table that hold no file."""
    paths = [source.path.removeprefix(f"{FLOORED}/") for source in sources.values()]
    empty = [
        f"`{room}` holds no file"
        for room in floors
        if not any(path == room or (room.endswith("/") and path.startswith(room)) for path in paths)
    ]
    return [source.path for source in sources.values() if floor_of(source, floors) is None] + empty


def private_names_of_others(sources: dict[str, Source]) -> list[str]:
    """Uses of a name with an underscore that another file of the packages defines and this one does not."""
    owners: dict[str, set[str]] = defaultdict(set)
    for source in sources.values():
        for name in source.own_names():
            owners[name].add(source.path)
    found = []
    for source in sources.values():
        for node, module, name in source.imports():
            if name is not None and _is_private(name) and module in sources:
                found.append(f"{source.path}:{node.lineno} imports {name} of {module}")
        for node in ast.walk(source.tree):
            if not isinstance(node, ast.Attribute) or not _is_private(node.attr) or _is_self(node.value):
                continue
            others = owners[node.attr] - {source.path}
            if others and source.path not in owners[node.attr]:
                found.append(f"{source.path}:{node.lineno} uses {ast.unparse(node)} of {', '.join(sorted(others))}")
    return found


def too_long(sources: dict[str, Source]) -> list[str]:
    """Files and functions with more lines than they may have."""
    found = []
    for source in sources.values():
        lines = len(source.text.splitlines())
        if lines > LONGEST_FILE:
            found.append(f"{source.path} has {lines} lines")
        for node in ast.walk(source.tree):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                lines = node.end_lineno - node.lineno + 1
                if lines > LONGEST_FUNCTION:
                    found.append(f"{source.path}:{node.lineno} {node.name} has {lines} lines")
    return found


# ------------------------------------------------------------------------------------------------ the package


@cache
def sources_of_the_package() -> dict[str, Source]:
    return read_sources(ROOT)


def test_no_circle_of_imports():
    assert circles(sources_of_the_package()) == []


def test_every_file_stands_on_one_floor():
    assert without_a_floor(sources_of_the_package(), read_floors(ARCHITECTURE)) == []


def test_no_import_runs_up():
    assert imports_that_run_up(sources_of_the_package(), read_floors(ARCHITECTURE)) == []


def test_no_private_name_of_another_room():
    assert private_names_of_others(sources_of_the_package()) == []


def test_no_file_or_function_is_too_long():
    assert too_long(sources_of_the_package()) == []


# ------------------------------------------------------------------------------------------------ broken trees


def tree(directory: Path, **files: str) -> dict[str, Source]:
    """A package of these files; `a__b="..."` is `hf_gradmem/a/b.py`."""
    for name, text in files.items():
        path = directory / FLOORED / f"{name.replace('__', '/')}.py"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")
        for package in (path.parent, directory / FLOORED):
            (package / "__init__.py").touch()
    return read_sources(directory)


@pytest.mark.parametrize(
    "back",
    [
        "from . import one",
        "from .one import f",
        "import hf_gradmem.one",
        "def g():\n    from .one import f",
        "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    from .one import f",
    ],
    ids=["module", "name", "absolute", "in a function", "for the type checker"],
)
def test_a_circle_is_found(tmp_path, back):
    assert circles(tree(tmp_path, one="from .two import g", two="")) == []
    assert circles(tree(tmp_path, two=back)) == [["hf_gradmem.one", "hf_gradmem.two"]]


def test_a_circle_through_a_third_file_is_found(tmp_path):
    sources = tree(
        tmp_path, a__one="from ..b.two import g", b__two="from .. import three", three="from .a.one import f"
    )
    assert circles(sources) == [["hf_gradmem.a.one", "hf_gradmem.b.two", "hf_gradmem.three"]]


FLOORS = """
<!-- floors -->
| floor | rooms |
|---|---|
| 1 | `low/` |
| 2 | `high/`, `low/odd.py` |
| 3 | `__init__.py` |
<!-- /floors -->
"""


@pytest.fixture
def floors(tmp_path):
    (tmp_path / "architecture.md").write_text(FLOORS, encoding="utf-8")
    return read_floors(tmp_path / "architecture.md")


def test_an_import_that_runs_up_is_found(tmp_path, floors):
    sources = tree(tmp_path, low__one="", low__odd="from ..high import two", high__two="from ..low.one import f")
    assert floors == {"low/": 1, "high/": 2, "low/odd.py": 2, "__init__.py": 3}
    assert imports_that_run_up(sources, floors) == []
    sources = tree(tmp_path, low__one="def f():\n    from .odd import g")
    (found,) = imports_that_run_up(sources, floors)
    assert found == "hf_gradmem/low/one.py (floor 1) imports hf_gradmem/low/odd.py (floor 2)"


def test_the_command_line_stands_above_everything(tmp_path, floors):
    sources = tree(tmp_path, low__one="import hf_gradmem_cli.app")
    sources["hf_gradmem_cli.app"] = Source("hf_gradmem_cli.app", "hf_gradmem_cli/app.py", "import hf_gradmem.high")
    assert len(imports_that_run_up(sources, floors)) == 1


def test_a_file_without_a_floor_is_found(tmp_path, floors):
    sources = tree(tmp_path, low__one="", low__odd="", high__two="")
    assert without_a_floor(sources, floors) == []
    sources = tree(tmp_path, stray="")
    assert without_a_floor(sources, floors | {"empty/": 1}) == ["hf_gradmem/stray.py", "`empty/` holds no file"]


def test_a_table_that_is_missing_or_names_a_room_twice_is_refused(tmp_path):
    document = tmp_path / "architecture.md"
    document.write_text("no table", encoding="utf-8")
    with pytest.raises(ValueError, match="no table"):
        read_floors(document)
    document.write_text(FLOORS.replace("`high/`", "`low/`"), encoding="utf-8")
    with pytest.raises(ValueError, match="twice"):
        read_floors(document)


OWN = "_x = 1\nclass A:\n    _y: int = 2\n    def __init__(self):\n        self._z = 3\n    def _f(self): ...\n"


@pytest.mark.parametrize(
    "use",
    ["from .own import _x", "from . import own\nown._x", "def g(a):\n    a._y", "def g(a):\n    a.b._z", "A()._f()"],
    ids=["import", "module", "class attribute", "attribute of self", "method"],
)
def test_a_private_name_of_another_file_is_found(tmp_path, use):
    assert len(private_names_of_others(tree(tmp_path, own=OWN, other=use))) == 1


@pytest.mark.parametrize(
    "use",
    [
        "class B(A):\n    def g(self):\n        return self._z + super()._f()",
        "_x = 2\ndef g(a):\n    return a._x",
        "def g(config):\n    return config._of_another_library",
        "def g(a):\n    return a.__dict__",
    ],
    ids=["inherited", "its own", "another library's", "dunder"],
)
def test_what_is_no_private_name_of_another_file_is_left_alone(tmp_path, use):
    assert private_names_of_others(tree(tmp_path, own=OWN, other=use)) == []


def test_a_long_file_and_a_long_function_are_found(tmp_path):
    function = "def f():\n" + "    pass\n" * (LONGEST_FUNCTION - 1)
    assert too_long(tree(tmp_path, one=function + "x = 1\n" * (LONGEST_FILE - LONGEST_FUNCTION))) == []
    found = too_long(tree(tmp_path, one=function + "    pass\n" + "x = 1\n" * (LONGEST_FILE - LONGEST_FUNCTION)))
    assert found == [f"hf_gradmem/one.py has {LONGEST_FILE + 1} lines", "hf_gradmem/one.py:1 f has 61 lines"]
