"""Docstrings in the style of Hugging Face, as the builder of the API reference takes them.

[`Name`] refers to what `Name` is where the docstring stands, and [`~package.module.Name`] to what it says in full. A
reference of either kind that leads nowhere ends the build. Types of parameters are plain expressions.
"""

import re

from griffe import Alias, Extension, Module, NameResolutionError, Object

_REFERENCE = re.compile(r"\[`(~?)([\w.]+)`\](?![(\[])")
_TYPE = re.compile(r"^(?P<start>[ ]+[\w, ]+ \()(?P<type>.+)(?P<end>\):)", re.MULTILINE)
# Documented elsewhere; the build needs no network.
_OTHERS = {"datasets", "evaluate", "huggingface_hub", "peft", "torch", "transformers"}


class HuggingFaceDocstrings(Extension):
    """Makes Markdown references of the references in all docstrings of a package."""

    def on_package(self, *, pkg: Module, **_: object) -> None:
        """Called once a package has been read."""
        _rewrite(pkg)


def _rewrite(item: Object) -> None:
    if item.docstring is not None:
        text = _TYPE.sub(lambda match: match["start"] + _plain(match["type"]) + match["end"], item.docstring.value)
        item.docstring.value = _REFERENCE.sub(lambda match: _link(match, item), text)
    for member in item.members.values():
        if not isinstance(member, Alias):
            _rewrite(member)


def _plain(described_type: str) -> str:
    return _REFERENCE.sub(r"\2", described_type).replace("`", "").replace("*optional*", "optional")


def _link(match: re.Match, item: Object) -> str:
    is_full, name = match.groups()
    label = name.rpartition(".")[2] if is_full else name
    if name.partition(".")[0] in _OTHERS:
        return f"`{label}`"
    return f"[`{label}`][{name if is_full else _resolve(name, item)}]"


def _resolve(name: str, item: Object) -> str:
    first, *rest = name.split(".")
    try:
        return ".".join([item.resolve(first), *rest])
    except NameResolutionError:
        return name  # which no page has, so that it is reported with the place where it stands
