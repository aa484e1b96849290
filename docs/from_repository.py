"""Pages that lie elsewhere in the repository: notebooks, tables of figures, model cards and the like.

They keep their place, so `benchmarks/results/study.md` is the page `benchmarks/results/study.html`. A link on any page
is written as it holds in the repository, and becomes one between pages; a file that is linked to, such as a picture or
the figures behind a table, comes along.
"""

import os
import re
from collections.abc import Iterator
from pathlib import Path

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.plugins import event_priority
from mkdocs.structure.files import File, Files, InclusionLevel
from mkdocs.structure.pages import Page

ROOT = Path(__file__).parents[1]
PAGES = (
    "notebooks/*.ipynb",
    "benchmarks/results/*.md",
    "model_cards/*/README.md",
    "tests/golden/README.md",
    "CONTRIBUTING.md",
    "CHANGELOG.md",
)
_LINK = re.compile(r"(\]\()([^)\s#]+)(#[^)\s]*)?(?=\))")


@event_priority(100)  # before mkdocs-jupyter looks for notebooks
def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the pages, and what they and those of docs/ link to."""
    paths = [path for pattern in PAGES for path in sorted(ROOT.glob(pattern))]
    linked = [
        target
        for document in [*Path(config.docs_dir).rglob("*.md"), *(path for path in paths if path.suffix == ".md")]
        for target in _targets(document)
    ]
    for path in dict.fromkeys([*paths, *linked]):
        name = _site_path(path)
        if files.get_file_from_path(name) is None:
            file = File(name, str(ROOT), config.site_dir, config.use_directory_urls)
            file.inclusion = InclusionLevel.NOT_IN_NAV  # and no warning where the navigation leaves it out
            files.append(file)
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Links to files of the repository, as they go from page to page."""
    place = Path(page.file.abs_src_path or config.docs_dir)

    def follow(match: re.Match[str]) -> str:
        target = _target(place, match[2])
        if target is None:
            return match[0]
        there = os.path.relpath(_site_path(target), os.path.dirname(page.file.src_uri)).replace(os.sep, "/")
        return match[1] + there + (match[3] or "")

    return _LINK.sub(follow, markdown)


def _targets(document: Path) -> Iterator[Path]:
    for _, link, _ in _LINK.findall(document.read_text(encoding="utf-8")):
        target = _target(document, link)
        if target is not None:
            yield target


def _target(document: Path, link: str) -> Path | None:
    """The file of the repository that a link leads to, if there is one; of a directory, what describes it."""
    target = Path(os.path.normpath(document.parent / link))
    if target.is_dir():
        target /= "README.md"
    return target if target.is_file() and target.is_relative_to(ROOT) else None


def _site_path(path: Path) -> str:
    return path.relative_to(ROOT).as_posix().removeprefix("docs/")
