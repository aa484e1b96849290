"""What a run leaves in its `output_dir`: whether to go on from it, and whether it may be pushed."""

import json
import os
import re
from pathlib import Path

import yaml
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from ..checkpoint.run_facts import OF_THIS_MACHINE, OWN_RECIPE_FILE, RECIPE_FILE, published_recipe
from ..files import save_text
from ..hub.client import FACTS_FILE, MEMORY_FILE
from .recipe import Recipe

_CHECKPOINT = re.compile(rf"{PREFIX_CHECKPOINT_DIR}-(\d+)")


def check_pushed(recipe: Recipe, output: Path) -> None:
    """Refuse to have Trainer, which knows no memories, upload those of a recipe or others that lie there."""
    if not recipe.training.push_to_hub:
        return
    own = recipe.arguments.memories
    found = [Path(own)] if own is not None and Path(own).resolve().is_relative_to(output.resolve()) else []
    found += [path.parent for name in (FACTS_FILE, MEMORY_FILE) for path in output.rglob(name)]
    if found:
        raise ValueError(
            f"push_to_hub uploads all of {output}, and with it the memories in {found[0]}, which decode to the texts "
            "that they were written from. Give memories another folder, or push by `hf-gradmem push`, which leaves "
            "them out."
        )


def last_checkpoint(output: str | os.PathLike) -> str | None:
    """The newest whole checkpoint of a run; Trainer writes `trainer_state.json` last, and a kill may cut it off."""
    whole = {
        int(named[1]): state.parent
        for state in Path(output).glob(f"*/{TRAINER_STATE_NAME}")
        if (named := _CHECKPOINT.fullmatch(state.parent.name)) and _is_readable(state)
    }
    return str(whole[max(whole)]) if whole else None


def _is_readable(state: Path) -> bool:
    """Whether a trainer_state.json was written to its end."""
    try:
        return isinstance(json.loads(state.read_text(encoding="utf-8")), dict)
    except ValueError:  # of JSON, and of bytes that are no text
        return False


def check_recipe(recipe: Recipe, output: Path) -> None:
    """Refuse a folder with a run of another recipe, or with a file that the recipe would take the place of."""
    own, shown = output / OWN_RECIPE_FILE, output / RECIPE_FILE
    kept = own if own.is_file() else shown  # which was whole in runs of before
    begun = last_checkpoint(output) is not None or (output / TRAINER_STATE_NAME).is_file()  # which is left at the end
    if begun and not kept.is_file():
        raise ValueError(
            f"{output} holds a run that no recipe wrote, which this one would go on from. Give another output_dir."
        )
    if begun:
        _check_same(recipe, kept)
    elif kept == shown and shown.is_file() and shown.read_text(encoding="utf-8") != _texts(recipe)[1]:
        raise ValueError(
            f"{shown} was written by no run, and the recipe as it is published would take its place. Move it, or give "
            "another output_dir."
        )


def keep_recipe(recipe: Recipe, output: Path) -> None:
    """Write the recipe beside its results, as it is and as it is published, once [`check_recipe`] lets it pass."""
    if recipe.training.process_index == 0:
        for name, text in zip((OWN_RECIPE_FILE, RECIPE_FILE), _texts(recipe), strict=True):
            save_text(text, output / name)


def _texts(recipe: Recipe) -> tuple[str, str]:
    """The recipe as it is, and as it is published."""
    text = yaml.safe_dump(recipe.values, sort_keys=False)
    return text, f"{published_recipe(text).strip()}\n"


def _check_same(recipe: Recipe, kept: Path) -> None:
    before = yaml.safe_load(kept.read_text(encoding="utf-8"))
    of_training = (before.keys() | recipe.values.keys()) - set(OF_THIS_MACHINE)  # a run's folder may have been moved
    changed = sorted(key for key in of_training if before.get(key) != recipe.values.get(key))
    if changed:
        raise ValueError(
            f"{kept.parent} holds a run of another recipe; {', '.join(changed)} changed. Give another output_dir, or "
            "remove that run."
        )
