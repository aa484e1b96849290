"""The figures of the published cards, from the files beside them: `model_cards/<name>/README.md` gets the `model-index`
that `results.json` and `recipe.yaml` say. The text of a card stays.

    python -m benchmarks.cards
"""

from pathlib import Path

from huggingface_hub import ModelCard

from hf_gradmem import GradMemConfig
from hf_gradmem.checkpoint.model_card import eval_results
from hf_gradmem.checkpoint.run_facts import facts_of_directory

ROOT = Path(__file__).parents[1]
PACKAGED = ROOT / "hf_gradmem" / "pretrained"


def card_with_figures(folder: Path) -> str:
    """The card of a folder, with the figures of its files in its metadata."""
    card = ModelCard((folder / "README.md").read_text(encoding="utf-8"))
    weights = folder if (folder / "config.json").is_file() else PACKAGED / folder.name
    config = GradMemConfig.from_pretrained(weights)
    card.data.model_name = folder.name
    card.data.eval_results = [
        entry for result in facts_of_directory(folder).results for entry in eval_results(result, config)
    ]
    return str(card)


def main() -> None:
    """Rewrite all cards."""
    for path in sorted(ROOT.glob("model_cards/*/README.md")):
        path.write_text(card_with_figures(path.parent), encoding="utf-8")


if __name__ == "__main__":
    main()
