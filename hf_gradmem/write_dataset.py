"""Writing the contexts of a data set into a store of memories: shard by shard, so that a killed run goes on."""

import hashlib
import json
import math
import os
from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path
from typing import Any

import datasets
import torch
from accelerate import PartialState
from accelerate.utils import broadcast_object_list, parse_flag_from_env
from datasets import Dataset, load_dataset
from datasets.exceptions import DatasetGenerationError
from tqdm.auto import tqdm

from . import checkpoint
from .batching import Tokenized, check_fits, take, write_alike
from .files import whole_file
from .hub import CARD_FILE
from .memory_store import (
    FACTS_FILE,
    FORMAT,
    FORMAT_VERSION,
    as_columns,
    features,
    read_facts,
    shard_name,
    without_progress_bars,
)
from .modeling_gradmem import GradMemForCausalLM

_BUILDERS = {".jsonl": "json", ".json": "json", ".csv": "csv", ".parquet": "parquet"}
_ROWS_AT_A_TIME = 1000  # that are checked
# Processes wait for each other at the start and at the end, where one may have hours more to do than another.
_PATIENCE = timedelta(days=30)
# Facts that may differ between a run and the one that goes on with it: names, which say where things lie, not what.
_NAMES = {"model", "source.name"}
_CARD = """---
tags:
- gradmem
configs:
- config_name: default
  data_files: data/train-*.parquet
---

# Memories

{num_rows} contexts, each written into {num_memory_tokens} vectors of width {hidden_size} ({dtype}) by `{model}`.

```python
from hf_gradmem import MemoryStore

store = MemoryStore.from_pretrained("this repository")
memory = store["{first_id}"]
```

A memory means something to the base and the weights it was written for alone: `{fingerprint}`.
The contexts can be decoded from their memories in part or in whole: treat these as you would treat the texts.
"""


def load_source(name: str, split: str = "train") -> Dataset:
    """The rows of a JSON-lines, CSV or Parquet file, by its extension, or of a data set on the Hub.

    Args:
        name: the file, or the Hub repository.
        split: which part of a Hub data set.

    Raises:
        OSError: there is no such file or data set.
        ValueError: the file cannot be read as what its extension says, or there is no such split.
    """
    path = Path(name).expanduser()
    if path.suffix in _BUILDERS:
        if not path.is_file():
            raise FileNotFoundError(f"There is no file {name!r}.")
        verbosity = datasets.logging.get_verbosity()
        datasets.logging.set_verbosity(datasets.logging.CRITICAL)  # it logs the errors that it raises
        try:
            return load_dataset(_BUILDERS[path.suffix], data_files=str(path), split="train")
        except (DatasetGenerationError, ValueError) as error:
            raise ValueError(
                f"{name} cannot be read as {_BUILDERS[path.suffix]}: {error.__cause__ or error}"
            ) from error
        finally:
            datasets.logging.set_verbosity(verbosity)
    if path.exists():
        raise ValueError(f"{name} is none of {', '.join(_BUILDERS)}, nor a data set on the Hub.")
    return load_dataset(name, split=split)


def processes(cpu: bool | None = None) -> PartialState:
    """The processes of a launch, of which this is one; a process that was not launched is alone.

    Args:
        cpu: whether they compute on CPUs. By default where `accelerate launch --cpu` says so, or there is nothing else.
    """
    if cpu is None:
        cpu = parse_flag_from_env("ACCELERATE_USE_CPU") or not torch.accelerator.is_available()
    return PartialState(cpu=cpu, timeout=_PATIENCE)


def write_dataset(
    model: GradMemForCausalLM,
    source: Dataset,
    directory: str | os.PathLike,
    *,
    context_column: str = "context",
    id_column: str | None = None,
    batch_size: int = 8,
    shard_size: int = 1000,
    write_steps: int | None = None,
    write_learning_rate: float | None = None,
    tolerance: float | None = None,
    model_name: str | None = None,
    source_name: str | None = None,
    show_progress: bool = False,
) -> dict[str, Any]:
    """Write a memory for each row, and keep them where [`MemoryStore`] finds them by id.

    A shard is done if, and only if, its file is there; a call on a directory in which an earlier one was interrupted
    writes what is missing. Under `accelerate launch` or `torchrun` the processes share the shards.

    Args:
        model: the writer, with a tokenizer.
        source: rows with a context, which is a text or a list of texts, its segments.
        directory: where the store is to be; new, empty, or begun by the same call.
        context_column: where the contexts are.
        id_column: where the ids are; `"id"` where there is such a column, else the row's number is its id.
        batch_size: how many contexts are written at a time. Within a shard, those of like length are.
        shard_size: how many memories a file holds: what is lost, at most, if the process is killed, and held in
            working memory at a time.
        write_steps, write_learning_rate, tolerance: as in [`GradMemForCausalLM.write`].
        model_name, source_name: how to call them in the facts.
        show_progress: show a progress bar over this process's share.

    Returns:
        The facts of the store; and `written`, how many memories this process wrote in this call.

    Raises:
        OSError: the directory cannot be written to.
        ValueError: a column is missing; an id comes twice; a context is empty or longer than the base's window; the
            directory holds something else, or memories of another model, source or setting.
        FloatingPointError: a loss became NaN or infinite; what was written before is kept.
    """
    rows = _Rows(source, context_column, id_column)
    for name, value in (("batch_size", batch_size), ("shard_size", shard_size)):
        if value < 1:
            raise ValueError(f"{name} must be at least 1, got {value}.")
    directory = Path(directory).expanduser()
    options = {"write_steps": write_steps, "write_learning_rate": write_learning_rate, "tolerance": tolerance}
    state = processes(cpu=model.device.type == "cpu")
    mistake: Exception | None = None
    if state.is_main_process:
        try:
            facts = _facts(model, rows, options, shard_size) | {"model": model_name}
            facts["source"]["name"] = source_name
            _begin(directory, facts, model, rows, show_progress)
        except (ValueError, OSError) as error:
            mistake = error
    _stop_all(mistake)
    facts = read_facts(directory)
    shards = [directory / shard_name(index, facts["num_shards"]) for index in range(facts["num_shards"])]
    missing = [index for index, path in enumerate(shards) if not path.is_file()]
    state.wait_for_everyone()  # so that all share the same list
    own = [
        (shards[index], range(index * shard_size, min((index + 1) * shard_size, len(rows))))
        for index in missing[state.process_index :: state.num_processes]
    ]
    with tqdm(
        total=sum(len(numbers) for _, numbers in own),
        desc="Writing" if state.num_processes == 1 else f"Writing, 1 of {state.num_processes} processes",
        unit="memory",
        disable=not (show_progress and state.is_main_process),
    ) as bar:
        for path, numbers in own:
            _write_shard(model, rows, numbers, path, facts, batch_size, options, bar)
    state.wait_for_everyone()
    if state.is_main_process:
        for left_behind in (directory / "data").glob(".*"):  # by a run that was killed
            left_behind.unlink(missing_ok=True)
    return facts | {"written": sum(len(numbers) for _, numbers in own)}


def _stop_all(mistake: Exception | None) -> None:
    """Raise the main process's mistake, if it made one, in all processes: they would wait for it in vain."""
    message = broadcast_object_list([None if mistake is None else str(mistake)])[0]
    if mistake is not None:
        raise mistake
    if message is not None:
        raise ValueError(message)


class _Rows:
    """Ids and contexts of a data set, read from disk as they are asked for."""

    def __init__(self, dataset: Dataset, context_column: str, id_column: str | None) -> None:
        for column in (context_column, id_column):
            if column is not None and column not in dataset.column_names:
                raise ValueError(f"There is no column {column!r}. The columns are {', '.join(dataset.column_names)}.")
        if not len(dataset):
            raise ValueError("There is nothing to write: the source has no rows.")
        if id_column is None and "id" in dataset.column_names:
            id_column = "id"
        self.context_column, self.id_column = context_column, id_column
        columns = [context_column] if id_column is None else list(dict.fromkeys([context_column, id_column]))
        self._dataset = dataset.with_format(None).select_columns(columns)

    def __len__(self) -> int:
        return len(self._dataset)

    def read(self, numbers: range) -> tuple[list[str], list[str | list[str]]]:
        """Ids and contexts of some rows.

        Raises:
            ValueError: a row has no id, or its context is not a text or a list of texts.
        """
        part = self._dataset[numbers.start : numbers.stop]
        contexts = part[self.context_column]
        ids = list(numbers) if self.id_column is None else part[self.id_column]
        for number, name, context in zip(numbers, ids, contexts, strict=True):
            if name is None:
                raise ValueError(f"Row {number} has no id: column {self.id_column!r} is empty there.")
            segments = [context] if isinstance(context, str) else context
            if not isinstance(segments, list) or not all(isinstance(segment, str) for segment in segments):
                raise ValueError(
                    f"Row {number} (id {str(name)!r}) has no context: column {self.context_column!r} holds "
                    f"{context!r}, which is neither a text nor a list of texts."
                )
        return list(map(str, ids)), contexts

    def slices(self) -> Iterator[range]:
        for start in range(0, len(self), _ROWS_AT_A_TIME):
            yield range(start, min(start + _ROWS_AT_A_TIME, len(self)))

    def check_ids(self) -> str:
        """A hash of all rows, having checked them and that each id comes once.

        Raises:
            ValueError: an id comes twice.
        """
        digest, seen = hashlib.sha256(), {}
        for numbers in self.slices():
            ids, contexts = self.read(numbers)
            for number, name, context in zip(numbers, ids, contexts, strict=True):
                if name in seen:
                    raise ValueError(
                        f"Rows {seen[name]} and {number} have the same id {name!r}. Ids must be unique: choose another "
                        "--id-column."
                    )
                seen[name] = number
                digest.update(json.dumps([name, context]).encode())
        return digest.hexdigest()


def _facts(model: GradMemForCausalLM, rows: _Rows, options: dict[str, Any], shard_size: int) -> dict[str, Any]:
    """Whose memories these are, and all that they depend on; in the form that JSON gives back."""
    config = model.config
    num_memory_tokens, hidden_size = model.memory_init.shape
    settings = {name: getattr(config, name) for name in type(config).__annotations__}
    for name in ("text_config", "includes_base"):  # the first is told by the fingerprint, the second only of saving
        settings.pop(name)
    facts = {
        "format": FORMAT,
        "format_version": FORMAT_VERSION,
        "fingerprint": model.fingerprint(),
        "num_memory_tokens": num_memory_tokens,
        "hidden_size": hidden_size,
        "dtype": str(model.memory_init.dtype).removeprefix("torch."),
        "num_rows": len(rows),
        "num_shards": math.ceil(len(rows) / shard_size),
        "shard_size": shard_size,
        "source": {"sha256": rows.check_ids(), "context_column": rows.context_column, "id_column": rows.id_column},
        "write": options
        | {
            "weights": _hash_of_writer(model),
            "base_dtype": str(model.dtype).removeprefix("torch."),
            "config": settings,
        },
    }
    return json.loads(json.dumps(facts))


def _hash_of_writer(model: GradMemForCausalLM) -> str:
    """Of all tensors that WRITE uses, but for a base that is known by its name."""
    left_out = set() if model.config.includes_base else checkpoint.base_keys(model)
    return checkpoint.hash_tensors({name: value for name, value in model.state_dict().items() if name not in left_out})


def _begin(directory: Path, facts: dict[str, Any], model: GradMemForCausalLM, rows: _Rows, show_progress: bool) -> None:
    """Make the directory of a new store, having checked that all rows can be written; or check that it is this one's.

    Raises:
        ValueError: the directory holds something else.
    """
    if directory.exists() and not directory.is_dir():
        raise NotADirectoryError(f"{directory} is a file, not a directory.")
    if (directory / FACTS_FILE).is_file():
        before, now = _flat(read_facts(directory)), _flat(facts)
        changed = sorted(name for name in before.keys() | now.keys() if before.get(name) != now.get(name))
        changed = [f"{name} was {before.get(name)} and is {now.get(name)}" for name in changed if name not in _NAMES]
        if changed:
            raise ValueError(
                f"{directory} was begun by another run: {'; '.join(changed)}. Give the same model, source and options, "
                "or another directory."
            )
        return
    if directory.is_dir() and any(not path.name.startswith(".") for path in directory.iterdir()):
        raise ValueError(f"{directory} is not empty, and holds no {FACTS_FILE}. Give a new or an empty directory.")
    _check_contexts(model, rows, show_progress)
    with whole_file(directory / FACTS_FILE) as path:
        path.write_text(json.dumps(facts, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    with whole_file(directory / CARD_FILE) as path:
        path.write_text(_CARD.format(**facts, first_id=rows.read(range(1))[0][0]), encoding="utf-8")


def _flat(facts: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    flat = {}
    for name, value in facts.items():
        flat |= _flat(value, f"{prefix}{name}.") if isinstance(value, dict) else {prefix + name: value}
    return flat


def _check_contexts(model: GradMemForCausalLM, rows: _Rows, show_progress: bool) -> None:
    """Refuse now what would otherwise fail after hours of writing."""
    with tqdm(total=len(rows), desc="Checking", unit="row", disable=not show_progress) as bar:
        for numbers in rows.slices():
            ids, contexts = rows.read(numbers)
            tokenized = model._tokenize(contexts, model.tokenizer)
            try:
                check_fits(model, tokenized)
            except ValueError:
                _name_unfit(model, numbers, ids, tokenized)
                raise
            bar.update(len(numbers))


def _name_unfit(model: GradMemForCausalLM, numbers: range, ids: list[str], contexts: Tokenized) -> None:
    for row, (number, name) in enumerate(zip(numbers, ids, strict=True)):
        try:
            check_fits(model, take(contexts, slice(row, row + 1)))
        except ValueError as error:
            raise ValueError(f"Row {number} (id {name!r}) cannot be written. {error}") from error


def _write_shard(
    model: GradMemForCausalLM,
    rows: _Rows,
    numbers: range,
    path: Path,
    facts: dict[str, Any],
    batch_size: int,
    options: dict[str, Any],
    bar: tqdm,
) -> None:
    ids, contexts = rows.read(numbers)
    try:
        memory = write_alike(
            model,
            model._tokenize(contexts, model.tokenizer),
            batch_size,
            on_batch=bar.update,
            measure_final_loss=True,
            **options,
        )
    except FloatingPointError as error:
        raise FloatingPointError(f"In the shard that begins with row {numbers.start}: {error}") from error
    columns = features(facts["num_memory_tokens"], facts["hidden_size"], facts["dtype"])
    with whole_file(path) as unfinished, without_progress_bars():
        Dataset.from_dict(as_columns(ids, memory), features=columns).to_parquet(unfinished)


__all__ = ["load_source", "processes", "write_dataset"]
