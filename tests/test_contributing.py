"""CONTRIBUTING.md: the example of each kind of variant, run as it stands."""

import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from hf_gradmem import GradMemConfig
from hf_gradmem.exports import EXPORTS
from hf_gradmem.losses import LOSSES
from hf_gradmem.tasks import TASKS
from hf_gradmem.variants import KINDS
from tests.support.documents import links

ROOT = Path(__file__).parents[1]
DOCUMENT = ROOT / "CONTRIBUTING.md"
_BLOCK = re.compile(r"^```python\n(.*?)^```$", re.MULTILINE | re.DOTALL)
DICTS = {
    "OBJECTIVES": KINDS["write_objective"],
    "UPDATE_RULES": KINDS["write_optimizer"],
    "META_GRADIENTS": KINDS["meta_gradient"],
    "FORMS": KINDS["memory_form"],
    "LOSSES": LOSSES,
    "TASKS": TASKS,
    "EXPORTS": EXPORTS,
}

TEXT = DOCUMENT.read_text(encoding="utf-8")
_BEFORE, *_SECTIONS = TEXT[TEXT.index("\n## To add one of a kind") :].split("\n### ")
SHARED = _BLOCK.search(_BEFORE)
EXAMPLES = {section.partition("\n")[0]: _BLOCK.findall(section) for section in _SECTIONS}


@pytest.fixture(autouse=True)
def _dicts_as_they_were() -> Iterator[None]:
    """No variant of an example is left for other tests."""
    held = {name: dict(variants) for name, variants in DICTS.items()}
    yield
    for name, variants in DICTS.items():
        variants.clear()
        variants.update(held[name])
    for name in [name for name in vars(GradMemConfig) if name.endswith("_loss_weight")]:
        if name not in GradMemConfig.__dataclass_fields__:
            delattr(GradMemConfig, name)


@pytest.mark.parametrize("kind", EXAMPLES)
def test_the_example_of_each_kind_runs_and_adds_one_line_to_one_dict(kind: str) -> None:
    before = {name: set(variants) for name, variants in DICTS.items()}
    namespace: dict[str, object] = {"__name__": "__main__"}
    for code in (SHARED[1], *EXAMPLES[kind]):
        # As many lines before it as in the document, so that an error names the line there.
        line = TEXT[: TEXT.index(code)].count("\n")
        exec(compile("\n" * line + code, DOCUMENT.name, "exec"), namespace)
    added = {name: set(variants) - before[name] for name, variants in DICTS.items()}
    assert sum(map(len, added.values())) == 1
    assert len(re.findall(r"# its line$", "".join(EXAMPLES[kind]), re.MULTILINE)) == 1


def test_each_row_of_the_table_has_an_example_in_the_file_it_names() -> None:
    rows = re.findall(r"^\| [\w ]+ \| `([\w/]+\.py)` \| `(\w+)` \|", TEXT, re.MULTILINE)
    assert {name for _, name in rows} == set(DICTS)
    for (file, name), (kind, (code,)) in zip(rows, EXAMPLES.items(), strict=True):
        named = re.match(r"# (\S+)\n", code)[1]
        assert Path(named).parent == Path(file).parent, kind
        assert re.search(rf"^{name}\[", code, re.MULTILINE), kind


def test_links_lead_somewhere() -> None:
    assert links(DOCUMENT)
    assert [link for link in links(DOCUMENT) if not (ROOT / link).exists()] == []
