"""The kinds of variants, by the option that chooses one, and the options that each variant reads.

A variant says which options it reads by the names of its keyword-only arguments, and is made from exactly these, so
that what it declares and what it gets cannot differ.
"""

import functools
import inspect
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from .memory import FORMS
from .writing.meta_gradients import META_GRADIENTS
from .writing.objectives import OBJECTIVES
from .writing.update_rules import UPDATE_RULES
from .writing.writers import WRITERS

KINDS: dict[str, Mapping[str, Callable[..., Any]]] = {
    "memory_form": FORMS,
    "writer": WRITERS,
    "write_optimizer": UPDATE_RULES,
    "meta_gradient": META_GRADIENTS,
    "write_objective": OBJECTIVES,
}
"""The dicts of variants, by the option of [`GradMemConfig`] that chooses from each."""

_CHOSEN_FIRST = ("memory_form", "writer")  # the others are chosen by options that one of these reads


@functools.cache
def options_of(variant: Callable[..., Any]) -> tuple[str, ...]:
    """Names of the options that a variant reads."""
    parameters = inspect.signature(variant).parameters.values()
    return tuple(parameter.name for parameter in parameters if parameter.kind is parameter.KEYWORD_ONLY)


def chosen(kind: str, config: Any) -> tuple[Any, dict[str, Any]]:
    """The variant that a configuration chooses, and what the choice says beside its name.

    Raises:
        ValueError: there is none of this name, or it has no such setting.
    """
    value = getattr(config, kind)
    settings = dict(value) if isinstance(value, Mapping) else {"name": value}
    name = settings.pop("name", None)
    if name not in KINDS[kind]:
        raise ValueError(f"{kind} must be one of {', '.join(map(repr, KINDS[kind]))}, got {name!r}.")
    variant = KINDS[kind][name]
    known = [setting for setting in options_of(variant) if not hasattr(config, setting)]
    for setting in settings:
        if setting not in known:
            raise ValueError(
                f"{kind}={name!r} has no setting {setting!r}. It has {', '.join(map(repr, known)) or 'none'}."
            )
    return variant, settings


def build(kind: str, config: Any, *arguments: Any) -> Any:
    """Make the variant that a configuration chooses.

    Args:
        kind: one of [`KINDS`].
        config: with an attribute for every option.
        arguments: what the variant is given beside its options; those that it needs of other kinds likewise.
    """
    variant, settings = chosen(kind, config)
    for name in options_of(variant):
        if name in KINDS:
            settings[name] = _part(name, config, *arguments)
        elif hasattr(config, name):
            settings[name] = getattr(config, name)
    return variant(*arguments, **settings)


def _part(kind: str, config: Any, *arguments: Any) -> Any:
    """A variant that another is made from: an objective comes as a class, for there is one for each batch."""
    if kind == "write_objective":
        return chosen(kind, config)[0]
    return build(kind, config, *(() if kind == "write_optimizer" else arguments))


def choices(config: Any) -> Iterator[tuple[str, str, Callable[..., Any]]]:
    """Kind, name and variant of all that a configuration chooses and that something chosen reads."""
    waiting = list(_CHOSEN_FIRST)
    while waiting:
        kind = waiting.pop(0)
        variant, _ = chosen(kind, config)
        value = getattr(config, kind)
        yield kind, value["name"] if isinstance(value, Mapping) else value, variant
        waiting += [name for name in options_of(variant) if name in KINDS]


def settings(config: Any) -> tuple[Any, ...]:
    """The values of all options that variants read, to tell whether any has changed."""
    return tuple(repr(getattr(config, name)) for name in _all_options() if hasattr(config, name))


@functools.cache
def _all_options() -> tuple[str, ...]:
    every = {name for variants in KINDS.values() for variant in variants.values() for name in options_of(variant)}
    return tuple(sorted(every | KINDS.keys()))


def unread(config: Any, defaults: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """Options that are set although no chosen variant reads them, each with the choices that would.

    Args:
        config: with an attribute for every option.
        defaults: of the options; one that is not in here is never reported.
    """
    selected = list(choices(config))
    read = {name for _, _, variant in selected for name in options_of(variant)}
    for name, default in defaults.items():
        readers = {
            f'{kind}="{reader}"': kind
            for kind, variants in KINDS.items()
            for reader, variant in variants.items()
            if name in options_of(variant)
        }
        if not readers or name in read or getattr(config, name) == default:
            continue
        instead = [f'{kind}="{given}"' for kind, given, _ in selected if kind in readers.values()]
        yield name, " or ".join(readers) + (f", and not to {' or '.join(instead)}" if instead else "")


__all__ = ["KINDS", "build", "choices", "chosen", "options_of", "settings", "unread"]
