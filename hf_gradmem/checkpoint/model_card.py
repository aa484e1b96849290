"""The model card that a save or a push writes: what the memory costs, how it was trained, what it scored."""

import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import EvalResult, ModelCard, ModelCardData
from transformers import PreTrainedConfig

from ..base.cache_size import expected_cache_bytes, most_cached
from ..configuration_gradmem import GradMemConfig
from ..hub.cards import MARK, TAGS
from ..reading.confidence import MEASURED
from ..variants import chosen
from .base_model import recorded_base
from .run_facts import CardFacts, Result

TEMPLATE = Path(__file__).with_name("model_card_template.md")
_CONFIDENCE = "## How sure an answer is"
_MEASURES = {
    "auroc": "AUROC of right answers above wrong ones",
    "auroc_own_or_other": "of memories that hold the context above others",
    "brier": "Brier score",
}
_FLOAT_BYTES = 4  # memories are float32; float64 on a float64 base


def model_card(
    config: GradMemConfig, repo_id: str, facts: CardFacts | None = None, tags: Sequence[str] = ()
) -> ModelCard:
    """The card of an adapter, from its configuration and what is known of its training.

    Args:
        config: of a model that was saved or is about to be.
        repo_id: the repository, for its code; [`local_id`] while there is none.
        facts: of its training and results.
        tags: beside those of every GradMem model.
    """
    facts = CardFacts() if facts is None else facts
    metadata = dict(facts.metadata)
    title = metadata.pop("model_name", repo_id.rsplit("/", 1)[-1])
    scores = [entry for result in facts.results for entry in eval_results(result, config)]
    base, text_config = config.base_model_name_or_path, recorded_base(config).get_text_config()
    on_hub = base is not None and not os.path.isabs(base)
    plain = config.template == "plain"
    asked = "The ferry to Trieste" if plain else "When does the ferry to Trieste leave?"
    context, query = facts.example or ("The ferry to Trieste leaves at 06:45 from gate 7.", asked)
    dtype = str(text_config.dtype or torch.float32).removeprefix("torch.")
    form, settings = chosen("memory_form", config)
    width = form.numbers(text_config, **settings)
    memory_bytes = width and config.num_memory_tokens * width * (8 if dtype == "float64" else _FLOAT_BYTES)
    return ModelCard.from_template(
        ModelCardData(
            library_name="transformers",
            base_model=base if on_hub else None,
            base_model_relation="adapter" if on_hub else None,
            pipeline_tag="text-generation",
            tags=[*TAGS, *tags],
            **({"model_name": title, "eval_results": scores} if scores else {}),
            **metadata,
        ),
        template_path=str(TEMPLATE),
        mark=MARK,
        title=title,
        repo_id=repo_id,
        base=f"[{base}](https://huggingface.co/{base})" if on_hub else None,
        commit=config.base_model_revision,
        vectors=config.num_memory_tokens,
        width=width,
        holds_vectors=form.holds_vectors,
        write=_describe_write(config),
        descends=config.writer == "gradient",
        memory_bytes=memory_bytes,
        **_cache_sizes(text_config, dtype),
        dtype=dtype,
        positions=form.positions(config.num_memory_tokens, config.num_control_tokens),
        context=json.dumps([context] if isinstance(context, list) else context, ensure_ascii=False),
        plain=plain,
        query=json.dumps(query, ensure_ascii=False),
        training=facts.training,
        recipe=facts.recipe,
        results=[_with_steps(result, config) for result in facts.results],
        metric_names=list(dict.fromkeys(name for result in facts.results for name in result.metrics)),
        confidence=confidence_section(config.confidence),
    )


def _cache_sizes(text_config: PreTrainedConfig, dtype: str) -> dict[str, Any]:
    """What each token adds to the base's cache, at first and once its sliding windows are full."""
    window = most_cached(text_config)
    first, full, beyond = (expected_cache_bytes(text_config, tokens, dtype) for tokens in (1, window, window + 1))
    return {"cache_bytes": first, "window": window, "later_bytes": beyond - full}


def confidence_section(confidence: Mapping[str, Any] | None) -> str:
    """What a card says of an adapter's confidence: what it was fitted on, how far it holds; empty without one."""
    if confidence is None:
        return ""
    lines = [
        _CONFIDENCE,
        "",
        "`model.answer` gives each answer a confidence, 0 to 1. It was fitted on "
        f"{confidence['num_questions']:,} answers ({confidence['calibration_set']}): each question was asked of its "
        "own context's memory and of another's.",
    ]
    measured = confidence.get(MEASURED)
    if measured is not None:
        told = [f"{text} {measured[name]:.3f}" for name, text in _MEASURES.items() if measured.get(name) is not None]
        lines += [f"On contexts that a fit did not see: {'; '.join(told)}.", ""]
        lines += ["| confidence | mean | share right | answers |", "|---|---|---|---|"]
        lines += [
            "| {from:.1f} to {to:.1f} | {confidence:.3f} | {right:.3f} | {count:,} |".format(**row)
            for row in measured["reliability"]
        ]
    return "\n".join([*lines, ""])


def with_confidence(card: str, confidence: Mapping[str, Any]) -> str:
    """A card that was written here, with what it says of the adapter's confidence in its place, before the limits."""
    before, limits, after = card.partition("\n## Limits\n")
    return f"{before.partition(_CONFIDENCE)[0].rstrip()}\n\n{confidence_section(confidence)}{limits}{after}"


def _describe_write(config: GradMemConfig) -> str:
    if config.writer == "pooled":
        return "the means of its embeddings, without a step"
    if config.writer == "forward":
        return f"{config.write_steps} reading{'s' * (config.write_steps != 1)} of it, without gradients"
    optimizer = {"sgd": "gradient descent", "momentum": "gradient descent with momentum", "adam": "Adam"}
    learned = " with learned step sizes" if config.learn_write_learning_rate != "none" else ""
    steps = f"{config.write_steps} step{'s' * (config.write_steps != 1)}"
    sums = config.write_loss_reduction == "sum" and config.write_optimizer != "adam"
    summed = ", the sum over its tokens" if sums else ""
    return f"{steps} of {optimizer[config.write_optimizer]}{learned} on its reconstruction loss{summed}"


def _with_steps(result: Result, config: GradMemConfig) -> dict[str, Any]:
    taken = 0 if config.writer == "pooled" else config.write_steps
    return vars(result) | {"write_steps": taken if result.write_steps is None else result.write_steps}


def eval_results(result: Result, config: GradMemConfig) -> list[EvalResult]:
    """For the card's `model-index`: the scores, since a loss compares with nothing outside the run.

    A public data set is named where the rows came from it, and not where a file was in its form.
    """
    source = result.source
    steps = _with_steps(result, config)["write_steps"]
    return [
        EvalResult(
            task_type="text-generation",
            dataset_type=source.type,
            dataset_name=f"{source.name} ({result.dataset})" if source.name else result.dataset,
            dataset_config=source.config or result.dataset,
            dataset_revision=source.revision,
            dataset_split=result.split,
            metric_type=name,
            metric_name=f"{name.replace('_', ' ')}, {steps} WRITE step{'' if steps == 1 else 's'}",
            metric_value=value,
            metric_args={"write_steps": steps},
        )
        for name, value in result.metrics.items()
        if not name.endswith("loss")
    ]
