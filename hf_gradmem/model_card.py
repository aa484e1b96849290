"""The model card that a save or a push writes: what the memory costs, how it was trained, what it scored."""

import functools
import json
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import yaml
from huggingface_hub import EvalResult, ModelCard, ModelCardData
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedConfig

from .configuration_gradmem import GradMemConfig
from .files import whole_file
from .hub import CARD_FILE

if TYPE_CHECKING:
    from .memory import GradMemMemory

# While it stands in a card, the card is ours to write anew; without it, the card is the user's and is left alone.
MARK = "<!-- Written by hf_gradmem at each save and push. To keep your own text, remove this line. -->"
# Stands for the namespace of the repository until there is one.
_NAMESPACE = "your-name"
TAGS = ("gradmem", "memory", "test-time-training", "arxiv:2603.13875")
_MEMORY_TAG = "gradmem-memory"
TEMPLATE = Path(__file__).with_name("model_card_template.md")
RECIPE_FILE, RESULTS_FILE = "recipe.yaml", "results.json"
# What a card shows of an evaluation, where it was measured.
_METRICS = ("exact_match", "f1", "teacher_forced_exact_match", "token_accuracy", "answer_loss", "write_loss")
_CACHE_TOKENS = 8  # the cache's growth is measured from so many tokens to twice as many
_FLOAT_BYTES = 4  # memories are float32; float64 on a float64 base


@dataclass
class Result:
    """Metrics of one evaluation set.

    Attributes:
        task: name of the task or data set.
        dataset: name of the evaluation set.
        metrics: by their names in `evaluate`.
        split: which part of the task.
        write_steps: steps of WRITE that they were measured with; the configuration's when `None`.
    """

    task: str
    dataset: str
    metrics: dict[str, float]
    split: str = "validation"
    write_steps: int | None = None


@dataclass
class CardFacts:
    """What a card says beside the configuration. A training callback fills it, or the files of a run do.

    Attributes:
        training: what the run was, for a list: steps, seed, hardware, ...
        recipe: the recipe it followed, as YAML.
        results: what was measured.
        example: a context (text, or segments) and a query of the training data, for the card's code.
        metadata: further fields of `ModelCardData`: `license`, `language`, `datasets`, ...
    """

    training: dict[str, Any] = field(default_factory=dict)
    recipe: str | None = None
    results: list[Result] = field(default_factory=list)
    example: tuple[str | list[str], str] | None = None
    metadata: dict[str, Any] = field(default_factory=dict)


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
    scores = [entry for result in facts.results for entry in _eval_results(result, config)]
    base, text_config = config.base_model_name_or_path, config.text_config.get_text_config()
    on_hub = base is not None and not os.path.isabs(base)
    context, query = facts.example or ("The ferry to Trieste leaves at 06:45 from gate 7.", "The ferry to Trieste")
    dtype = str(text_config.dtype or torch.float32).removeprefix("torch.")
    memory_bytes = config.num_memory_tokens * text_config.hidden_size * (8 if dtype == "float64" else _FLOAT_BYTES)
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
        width=text_config.hidden_size,
        write=_describe_write(config),
        memory_bytes=memory_bytes,
        cache_bytes=cache_bytes_per_token(text_config, dtype),
        dtype=dtype,
        positions=config.prefix_length,
        context=json.dumps([context] if isinstance(context, list) else context, ensure_ascii=False),
        query=json.dumps(query, ensure_ascii=False),
        training=facts.training,
        recipe=facts.recipe,
        results=[_with_steps(result, config) for result in facts.results],
        metric_names=list(dict.fromkeys(name for result in facts.results for name in result.metrics)),
    )


def memory_card(memory: "GradMemMemory", repo_id: str) -> ModelCard:
    """The card of memories shared by themselves: how many, how large, of which model."""
    count, vectors, width = memory.embeddings.shape
    tokens = ", ".join(f"{int(length):,}" for length in memory.num_context_tokens[:10])
    lines = [
        MARK,
        f"# {repo_id.rsplit('/', 1)[-1]}",
        f"{count} context{'s' * (count != 1)}, written into {vectors} vectors of width {width} "
        f"{'each ' * (count != 1)}by gradient descent ([GradMem](https://arxiv.org/abs/2603.13875)): "
        f"{memory.embeddings.numel() * memory.embeddings.element_size():,} bytes.",
        f"- tokens written: {tokens}{', ...' * (count > 10)}",
        f"- written for: `{memory.fingerprint}`. No other model reads them.",
        "```python\nfrom hf_gradmem import GradMemMemory\n\n"
        f'memory = GradMemMemory.from_pretrained("{repo_id}")\n```\n',
    ]
    data = ModelCardData(library_name="transformers", tags=["gradmem", _MEMORY_TAG, "arxiv:2603.13875"])
    return ModelCard(f"---\n{data.to_yaml()}\n---\n\n" + "\n\n".join(lines))


def is_own_card(text: str) -> bool:
    """Whether a card is one that was written here, and not the user's."""
    return MARK in text


def is_memory_card(text: str) -> bool:
    """Whether a card is one that [`memory_card`] wrote: it does not replace the card of a model beside the memory."""
    return is_own_card(text) and _MEMORY_TAG in text


def local_id(directory: str | os.PathLike) -> str:
    """What stands in a card for the repository that a directory has not been pushed to."""
    return f"{_NAMESPACE}/{Path(directory).resolve().name}"


def address_card(text: str, repo_id: str) -> str:
    """The card of a directory as it is pushed: one that was written here says from which repository to load."""
    return re.sub(rf"{_NAMESPACE}/[\w.-]+", repo_id, text) if is_own_card(text) else text


def write_card(card: ModelCard, directory: str | os.PathLike) -> None:
    """Write a card into a directory, unless the user's own is there."""
    path = Path(directory) / CARD_FILE
    if not path.exists() or is_own_card(path.read_text(encoding="utf-8")):
        with whole_file(path) as unfinished:
            unfinished.write_text(str(card), encoding="utf-8")


def facts_of_directory(directory: str | os.PathLike) -> CardFacts:
    """What `recipe.yaml` and `results.json` of a training run or a published adapter say.

    Raises:
        ValueError: one of them cannot be read.
    """
    directory, facts = Path(directory), CardFacts()
    recipe, results = {}, {}
    try:
        if (directory / RECIPE_FILE).is_file():
            facts.recipe = (directory / RECIPE_FILE).read_text(encoding="utf-8").strip()
            recipe = yaml.safe_load(facts.recipe)
        if (directory / RESULTS_FILE).is_file():
            results = json.loads((directory / RESULTS_FILE).read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise ValueError(f"{directory} has an unreadable {RECIPE_FILE} or {RESULTS_FILE}: {error}") from error
    task = results.get("task", recipe.get("task"))
    steps = results.get("steps", sum(stage["steps"] for stage in recipe.get("stages", [])) or None)
    given = {"task": task, "outer steps": steps, "seed": results.get("seed", recipe.get("seed"))}
    facts.training = {name: value for name, value in given.items() if value is not None}
    facts.results = [
        Result(task, record["set"], _shown(record), results["split"], record["write_steps"])
        for record in results.get("results", [])
        if record["context"] == "memory" and Path(record["model"]).name == directory.resolve().name
    ]
    facts.results += trainer_results(results.get("metrics", {}), list(recipe.get("eval_sets", {})), task)
    return facts


def trainer_results(metrics: Mapping[str, Any], set_names: Sequence[str], task: str | None) -> list[Result]:
    """The metrics of `Trainer.evaluate` by evaluation set; `set_names` is empty where there is one without a name."""
    results = []
    for name in set_names or [None]:
        prefix = "eval_" if name is None else f"eval_{name}_"
        of_set = {key.removeprefix(prefix): value for key, value in metrics.items() if key.startswith(prefix)}
        if shown := _shown(of_set):
            results.append(Result(task or "unknown", name or "evaluation set", shown))
    return results


def _shown(metrics: Mapping[str, Any]) -> dict[str, float]:
    return {name: float(metrics[name]) for name in _METRICS if metrics.get(name) is not None}


def cache_bytes_per_token(text_config: PreTrainedConfig, dtype: str = "float32") -> int | None:
    """What the base's cache grows by with each token, in bytes, measured on a copy of the base without storage.

    A save must not run the base itself, which may be spread over processes.

    Args:
        text_config: of the base.
        dtype: that it computes and caches in.

    Returns:
        `None` where the base keeps no cache that grows, or cannot be run without storage.
    """
    # A padding token would be looked for in the input, which has no values.
    values = text_config.to_dict() | {"pad_token_id": None}
    growth = _cached_elements_per_token(json.dumps(values, default=str, sort_keys=True))
    return growth * getattr(torch, dtype).itemsize or None


@functools.cache
def _cached_elements_per_token(text_config: str) -> int:
    try:
        with torch.random.fork_rng(devices=[]), torch.device("meta"), torch.no_grad():
            config = AutoConfig.for_model(**json.loads(text_config))
            # What runs without storage for most families: masks are not looked at, experts are not grouped by kernels.
            base_model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16, attn_implementation="eager")
            sizes = []
            for length in (_CACHE_TOKENS, 2 * _CACHE_TOKENS):
                output = base_model(input_ids=torch.zeros((1, length), dtype=torch.long), use_cache=True)
                sizes.append(cache_bytes(output.past_key_values))
    except Exception:  # a base with code of its own, or whose shapes depend on its data: the figure is left out
        return 0
    return (sizes[1] - sizes[0]) // _CACHE_TOKENS // torch.bfloat16.itemsize


def cache_bytes(cache: Any) -> int:
    """Bytes of the tensors that a Transformers cache holds, 0 for a cache of another form."""
    held = [value for layer in getattr(cache, "layers", []) for value in vars(layer).values()]
    return sum(value.numel() * value.element_size() for value in held if isinstance(value, torch.Tensor))


def _describe_write(config: GradMemConfig) -> str:
    if config.writer == "forward":
        return f"{config.write_steps} reading{'s' * (config.write_steps != 1)} of it, without gradients"
    optimizer = {"sgd": "gradient descent", "momentum": "gradient descent with momentum", "adam": "Adam"}
    learned = " with learned step sizes" if config.learn_write_learning_rate != "none" else ""
    steps = f"{config.write_steps} step{'s' * (config.write_steps != 1)}"
    return f"{steps} of {optimizer[config.write_optimizer]}{learned} on its reconstruction loss"


def _with_steps(result: Result, config: GradMemConfig) -> dict[str, Any]:
    return vars(result) | {"write_steps": config.write_steps if result.write_steps is None else result.write_steps}


def _eval_results(result: Result, config: GradMemConfig) -> list[EvalResult]:
    """For the card's `model-index`: the scores, since a loss compares with nothing outside the run."""
    steps = _with_steps(result, config)["write_steps"]
    return [
        EvalResult(
            task_type="text-generation",
            dataset_type=result.task,
            dataset_name=f"{result.task} ({result.dataset})",
            dataset_config=result.dataset,
            dataset_split=result.split,
            metric_type=name,
            metric_name=f"{name.replace('_', ' ')}, {steps} WRITE step{'' if steps == 1 else 's'}",
            metric_value=value,
            metric_args={"write_steps": steps},
        )
        for name, value in result.metrics.items()
        if not name.endswith("loss")
    ]
