"""What a run leaves in its `output_dir`: whether to go on from it, and whether it may be pushed."""

import json
import os
from pathlib import Path

import yaml
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_utils import get_last_checkpoint

from ..checkpoint.run_facts import OWN_RECIPE_FILE, RECIPE_FILE, published_recipe
from ..hub.client import FACTS_FILE, MEMORY_FILE
from .recipe import Recipe


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
    output = Path(output)
    if not output.is_dir() or get_last_checkpoint(str(output)) is None:
        return None
    whole = [path.parent for path in output.glob(f"checkpoint-*/{TRAINER_STATE_NAME}") if _is_readable(path)]
    return str(max(whole, key=lambda path: int(path.name.rsplit("-", 1)[1]))) if whole else None


def _is_readable(state: Path) -> bool:
    """Whether a trainer_state.json was written to its end."""
    try:
        return isinstance(json.loads(state.read_text(encoding="utf-8")), dict)
    except ValueError:  # of JSON, and of bytes that are no text
        return False


def keep_recipe(recipe: Recipe, output: Path) -> None:
    """Write the recipe beside its results, as it is published and as it is; refuse another one's run."""
    kept = output / OWN_RECIPE_FILE
    kept = kept if kept.is_file() else output / RECIPE_FILE  # which was whole in runs of before
    begun = last_checkpoint(output) is not None or (output / TRAINER_STATE_NAME).is_file()  # which is left at the end
    if begun and kept.is_file():
        before = yaml.safe_load(kept.read_text(encoding="utf-8"))
        changed = sorted(
            key for key in before.keys() | recipe.values.keys() if before.get(key) != recipe.values.get(key)
        )
        if changed:
            raise ValueError(
                f"{output} holds a run of another recipe; {', '.join(changed)} changed. Give another output_dir, or "
                "remove that run."
            )
    if recipe.training.process_index == 0:
        output.mkdir(parents=True, exist_ok=True)
        text = yaml.safe_dump(recipe.values, sort_keys=False)
        (output / OWN_RECIPE_FILE).write_text(text, encoding="utf-8")
        (output / RECIPE_FILE).write_text(f"{published_recipe(text).strip()}\n", encoding="utf-8")
