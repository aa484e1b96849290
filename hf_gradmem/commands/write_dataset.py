"""Writing the contexts of a data set into a store of memories: shard by shard, so that a killed run goes on."""

import json
import math
import os
import shutil
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from accelerate.utils import broadcast_object_list, parse_flag_from_env
from datasets import Dataset
from tqdm.auto import tqdm

from ..base.weights import hash_tensors
from ..checkpoint.write_settings import OF_TRAINING, write_settings
from ..configuration_gradmem import GradMemConfig
from ..files import check_directory, only_writer, whole_file
from ..hub.cards import local_id
from ..hub.client import CARD_FILE, FACTS_FILE
from ..memory.card import store_card
from ..memory.fingerprint import Identity
from ..memory.shards import (
    FORMAT,
    FORMAT_VERSION,
    KEEPS_TEXT,
    as_columns,
    check_shard,
    count_segments,
    features_of,
    read_facts,
    shard_name,
)
from ..memory.silence import without_progress_bars
from ..modeling_gradmem import GradMemForCausalLM
from ..writing.contexts import Contexts
from ..writing.fitting import fit_contexts
from ..writing.write import write_contexts
from .dataset_rows import CONTEXT_COLUMN, DatasetRows
from .json_lines import JsonArray, JsonLines
from .rows import Rows
from .text_folder import TextFolder

# Processes wait for each other at the start and at the end, where one may have hours more to do than another.
_PATIENCE = timedelta(days=30)
# Facts that may differ between a run and the one that goes on with it: names, which say where things lie, not what, and
# what is of training alone.
_MAY_DIFFER = {"model", "source.name", "base_name", *(f"write.config.{name}" for name in OF_TRAINING)}


def processes(cpu: bool | None = None) -> PartialState:
    """The processes of a launch, of which this is one; a process that was not launched is alone.

    Args:
        cpu: whether they compute on CPUs. By default where `accelerate launch --cpu` says so, or there is nothing else.
    """
    if cpu is None:
        cpu = parse_flag_from_env("ACCELERATE_USE_CPU") or not torch.accelerator.is_available()
    return PartialState(cpu=cpu, timeout=_PATIENCE)


@dataclass(frozen=True)
class _Job:
    """What is written, by which model, where to and how: the same in all processes.

    Attributes:
        options: those of [`write_contexts`].
    """

    model: GradMemForCausalLM
    rows: Rows
    directory: Path
    options: dict[str, Any]
    segment_length: int | None
    batch_size: int
    shard_size: int
    show_progress: bool
    keep_text: bool

    def __post_init__(self) -> None:
        for name in ("batch_size", "shard_size"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}.")

    @contextmanager
    def begun(self, model_name: str | None, source_name: str | None) -> Iterator[None]:
        """Write to the store for a span, alone: a new one, all of whose rows can be written, or one that is ours.

        Raises:
            BlockingIOError: another process writes to it.
            OSError: the directory cannot be written to.
            ValueError: the directory holds something else, or a row cannot be written.
        """
        facts = self._facts(model_name, source_name)
        check_directory(self.directory)
        if self._is_new():
            self._check_contexts()
            self.directory.mkdir(parents=True, exist_ok=True)
        with only_writer(self.directory, wait=False):
            self._begin(facts)
            yield

    def _is_new(self) -> bool:
        directory = self.directory
        if (directory / FACTS_FILE).is_file():
            return False
        if directory.is_dir() and any(not path.name.startswith(".") for path in directory.iterdir()):
            raise ValueError(f"{directory} is not empty, and holds no {FACTS_FILE}. Give a new or an empty directory.")
        return True

    def _begin(self, facts: dict[str, Any]) -> None:
        """Write the facts and the card, or what is missing of them; refuse the facts of another run."""
        directory = self.directory
        if self._is_new():
            with whole_file(directory / FACTS_FILE) as path:
                path.write_text(json.dumps(facts, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
        _check_same(directory, read_facts(directory), facts)
        if not (directory / CARD_FILE).exists():
            with whole_file(directory / CARD_FILE) as path:
                (first_id,), _ = self.rows.read(range(1))
                path.write_text(store_card(facts, first_id, local_id(directory)), encoding="utf-8")

    def _facts(self, model_name: str | None, source_name: str | None) -> dict[str, Any]:
        """Whose memories these are, and all that they depend on; in the form that JSON gives back."""
        model, rows = self.model, self.rows
        num_memory_tokens, width = model.form.shape
        fingerprint, base_name = model.identity()
        rates = model.write_log_learning_rate
        source = {"sha256": rows.check_ids(), "context_column": rows.context_column, "id_column": rows.id_column}
        facts = {
            "format": FORMAT,
            "format_version": FORMAT_VERSION,
            "fingerprint": fingerprint,
            "base_name": base_name,
            "num_memory_tokens": num_memory_tokens,
            "hidden_size": width,
            "dtype": str(model.memory_init.dtype).removeprefix("torch."),
            "num_rows": len(rows),
            "num_shards": math.ceil(len(rows) / self.shard_size),
            "shard_size": self.shard_size,
            "source": source | {"name": source_name},
            "write": self.options
            | {
                "segment_length": self.segment_length,
                "learned_step_sizes": None if rates is None else hash_tensors({"write_log_learning_rate": rates}),
                "base_dtype": str(model.dtype).removeprefix("torch."),
                "config": write_settings(model.config),
            },
            "model": model_name,
        }
        if self.keep_text:
            facts[KEEPS_TEXT] = True
        return json.loads(json.dumps(facts))

    def _check_contexts(self) -> None:
        """Refuse now what would otherwise fail after hours of writing."""
        with tqdm(total=len(self.rows), desc="Checking", unit="row", disable=not self.show_progress) as bar:
            for numbers in self.rows.slices():
                ids, _, contexts = self._read(numbers)
                try:
                    _check_fits(self.model, contexts)
                except ValueError:
                    _name_unfit(self.model, numbers, ids, contexts)
                    raise
                bar.update(len(numbers))

    def _read(self, numbers: range) -> tuple[list[str], list[str | list[str]], Contexts]:
        """Ids of some rows, their texts, and these as contexts, cut where they have to be."""
        ids, texts = self.rows.read(numbers)
        fitting = fit_contexts(self.model.writer, self.model.tokenizer, texts, self.segment_length)
        return ids, texts, self.model.tokenize(fitting)

    def missing(self, facts: dict[str, Any]) -> list[tuple[Path, range]]:
        """The files that are not there yet, and the rows whose memories belong into each.

        Raises:
            ValueError: one that is there is not whole.
        """
        num_shards = facts["num_shards"]
        found = []
        for index, first in enumerate(range(0, len(self.rows), self.shard_size)):
            path = self.directory / shard_name(index, num_shards)
            numbers = range(first, min(first + self.shard_size, len(self.rows)))
            if path.is_file():
                check_shard(path, len(numbers), facts)
            else:
                found.append((path, numbers))
        return found

    def write_shard(self, path: Path, numbers: range, facts: dict[str, Any], bar: tqdm) -> None:
        """Write the memories of these rows, and then their file, whole or not at all."""
        ids, texts, contexts = self._read(numbers)
        try:
            memory = write_contexts(
                self.model.writer,
                contexts,
                identity=Identity(facts["fingerprint"], facts["base_name"]),
                batch_size=self.batch_size,
                on_batch=bar.update,
                measure_final_loss=True,
                **self.options,
            )
        except FloatingPointError as error:
            raise FloatingPointError(f"In the shard that begins with row {numbers.start}: {error}") from error
        columns = as_columns(ids, memory, texts if self.keep_text else None)
        with whole_file(path) as unfinished, without_progress_bars():
            Dataset.from_dict(columns, features=features_of(facts)).to_parquet(unfinished)


def write_dataset(
    model: GradMemForCausalLM,
    source: Dataset | JsonLines | JsonArray | TextFolder,
    directory: str | os.PathLike,
    *,
    context_column: str = CONTEXT_COLUMN,
    id_column: str | None = None,
    batch_size: int = 8,
    shard_size: int = 1000,
    write_steps: int | None = None,
    write_learning_rate: float | None = None,
    tolerance: float | None = None,
    segment_length: int | None = None,
    model_name: str | None = None,
    source_name: str | None = None,
    show_progress: bool = False,
    keep_text: bool = False,
) -> dict[str, Any]:
    """Write a memory for each row, and keep them where [`MemoryStore`] finds them by id.

    A shard is done if, and only if, its file is there; a call on a directory in which an earlier one was interrupted
    writes what is missing. Under `accelerate launch` or `torchrun` the processes share the shards.

    Args:
        model: the writer, with a tokenizer.
        source: rows with a context, which is a text or a list of texts, its segments; or a folder of text files, each a
            context under its path. Files that cannot be read are skipped with a warning.
        directory: where the store is to be; new, empty, or begun by the same call.
        context_column: where the contexts are; by default also `"segments"`, in rows without a `"context"`.
        id_column: where the ids are; `"id"` where there is such a column, else the row's number is its id.
        batch_size: how many contexts are written at a time. Within a shard, those of similar length are.
        shard_size: how many memories a file holds: what is lost, at most, if the process is killed, and held in
            working memory at a time.
        write_steps, write_learning_rate, tolerance: as in [`GradMemForCausalLM.write`].
        segment_length: cut every context into segments of at most so many tokens. By default those that are longer
            than the base's window are cut, at paragraphs and sentences, into segments that fit.
        model_name, source_name: how to call them in the facts.
        show_progress: show a progress bar over this process's share.
        keep_text: keep the contexts beside their memories, so that [`MemoryStore.search`] can look for words in them.

    Returns:
        The facts of the store; and `written`, how many memories this process wrote in this call, `segments`, how many
            segments all contexts, the one with the most, and how many contexts were written in several, and `skipped`,
            why files of a folder were left out.

    Raises:
        OSError: the directory cannot be written to, or another call is writing to it.
        ValueError: a column is missing; an id comes twice; a context is empty; a segment length does not fit into the
            base's window; the directory lies in the folder that is written, or holds something else, a file that is not
            whole, or memories of another model, source or setting.
        FloatingPointError: a loss became NaN or infinite; what was written before is kept.
    """
    place = Path(os.path.expanduser(directory))
    rows = _rows_of(source, context_column, id_column, place)
    options = {"write_steps": write_steps, "write_learning_rate": write_learning_rate, "tolerance": tolerance}
    job = _Job(model, rows, place, options, segment_length, batch_size, shard_size, show_progress, keep_text)
    return _carry_out(job, model_name, source_name)


def _rows_of(
    source: Dataset | JsonLines | JsonArray | TextFolder, context_column: str, id_column: str | None, directory: Path
) -> Rows:
    if not isinstance(source, TextFolder):
        return DatasetRows(source, context_column, id_column)
    if id_column is not None or context_column != CONTEXT_COLUMN:
        raise ValueError(f"{source.path} is a folder of text files, which has no columns: leave their names out.")
    if directory.resolve().is_relative_to(source.path.resolve()):
        raise ValueError(
            f"{directory} lies in {source.path}, the folder that is written: its own files would be among the texts. "
            "Give a directory beside it."
        )
    return source


def _carry_out(job: _Job, model_name: str | None, source_name: str | None) -> dict[str, Any]:
    """Do this process's share; returns what [`write_dataset`] does."""
    state = processes(cpu=job.model.device.type == "cpu")
    mistake: Exception | None = None
    with ExitStack() as held:
        if state.is_main_process:
            try:
                held.enter_context(job.begun(model_name, source_name))
            except (ValueError, OSError) as error:
                mistake = error
            else:
                job.rows.warn_of_skipped()
        _stop_all(mistake)
        return _write_share(job, state)


def _write_share(job: _Job, state: PartialState) -> dict[str, Any]:
    """Write this process's share of what is missing."""
    facts = read_facts(job.directory)
    missing = job.missing(facts)
    state.wait_for_everyone()  # so that all share the same list
    own = missing[state.process_index :: state.num_processes]
    with tqdm(
        total=sum(len(numbers) for _, numbers in own),
        desc="Writing" if state.num_processes == 1 else f"Writing, 1 of {state.num_processes} processes",
        unit="memory",
        disable=not (job.show_progress and state.is_main_process),
    ) as bar:
        for path, numbers in own:
            job.write_shard(path, numbers, facts, bar)
    state.wait_for_everyone()
    if state.is_main_process:
        for left_behind in (job.directory / "data").glob(".*"):  # by a run that was killed
            if left_behind.is_dir():  # of an append
                shutil.rmtree(left_behind, ignore_errors=True)
            else:
                left_behind.unlink(missing_ok=True)
    counts = {"written": sum(len(numbers) for _, numbers in own), "skipped": dict(job.rows.skipped)}
    return facts | counts | {"segments": count_segments(job.directory, facts["num_shards"])}


def _stop_all(mistake: Exception | None) -> None:
    """Raise the main process's mistake, if it made one, in all processes: they would wait for it in vain."""
    message = broadcast_object_list([None if mistake is None else str(mistake)])[0]
    if mistake is not None:
        raise mistake
    if message is not None:
        raise ValueError(message)


def _check_same(directory: Path, before: dict[str, Any], now: dict[str, Any]) -> None:
    """Refuse to go on with a store that another model, source or setting began."""
    if before.get("parts"):
        raise ValueError(
            f"{directory} was put together of several stores. Write into another directory, and append that to it."
        )
    if "config" in before.get("write", {}):  # what there was no option for was as it now is by default
        write = before["write"]
        before = before | {"write": write | {"config": write_settings(GradMemConfig()) | write["config"]}}
    before, now = _flat(json.loads(json.dumps(before))), _flat(now)
    changed = sorted(name for name in before.keys() | now.keys() if before.get(name) != now.get(name))
    changed = [f"{name} was {before.get(name)} and is {now.get(name)}" for name in changed if name not in _MAY_DIFFER]
    if changed:
        raise ValueError(
            f"{directory} was begun by another run: {'; '.join(changed)}. Give the same model, source and options, "
            "or another directory."
        )


def _flat(facts: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for name, value in facts.items():
        flat |= _flat(value, f"{prefix}{name}.") if isinstance(value, dict) else {prefix + name: value}
    return flat


def _check_fits(model: GradMemForCausalLM, contexts: Contexts) -> None:
    """Raise a `ValueError` if one of the contexts has no tokens or is longer than the window of the base."""
    model.writer.rows(contexts.checked(torch.device("cpu")))


def _name_unfit(model: GradMemForCausalLM, numbers: range, ids: list[str], contexts: Contexts) -> None:
    for row, (number, name) in enumerate(zip(numbers, ids, strict=True)):
        try:
            _check_fits(model, contexts.take(slice(row, row + 1)))
        except ValueError as error:
            raise ValueError(f"Row {number} (id {name!r}) cannot be written. {error}") from error


__all__ = ["processes", "write_dataset"]
