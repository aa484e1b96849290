"""The stages of a recipe's curriculum."""

from collections.abc import Sequence
from dataclasses import dataclass, field, fields
from typing import Any


@dataclass
class Stage:
    """One part of a curriculum.

    Attributes:
        steps: outer steps.
        task_arguments: over those of the recipe.
        write_steps: steps of WRITE, or a list of which each outer step draws one; the configuration's when `None`.
    """

    steps: int
    task_arguments: dict[str, Any] = field(default_factory=dict)
    write_steps: int | list[int] | None = None

    def __post_init__(self) -> None:
        if not is_whole(self.steps, 1):
            raise ValueError(f"steps of a stage must be a number of at least 1, got {self.steps!r}.")
        if not isinstance(self.task_arguments, dict):
            raise ValueError(
                f"task_arguments of a stage must be a mapping of names to values, got {self.task_arguments!r}. Leave "
                "it out where a stage has none of its own."
            )
        given = self.write_steps if isinstance(self.write_steps, list) else [self.write_steps]
        if self.write_steps is not None and (not given or not all(is_whole(steps, 0) for steps in given)):
            raise ValueError(f"write_steps of a stage must be at least 0, or a list of such, got {self.write_steps}.")

    def drawn_write_steps(self, default: int) -> list[int]:
        """The numbers of WRITE's steps that each outer step draws from."""
        if isinstance(self.write_steps, list):
            return self.write_steps
        return [default if self.write_steps is None else self.write_steps]


def is_whole(value: Any, least: int) -> bool:
    """Whether a value of a recipe is a whole number of at least this: Python takes true for 1."""
    return isinstance(value, int) and not isinstance(value, bool) and value >= least


def checked_stages(stages: Sequence[Any]) -> list[Stage]:
    """The stages of a curriculum from their values.

    Raises:
        ValueError: a stage has no steps, or something in it is unknown or out of range.
    """
    known = [entry.name for entry in fields(Stage)]
    for index, stage in enumerate(stages):
        if not isinstance(stage, dict) or "steps" not in stage or set(stage) - set(known):
            raise ValueError(f"Stage {index} must have steps and may have {', '.join(known[1:])}, got {stage!r}.")
    return [Stage(**stage) for stage in stages]
