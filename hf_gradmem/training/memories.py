"""Training READ on memories that were written once: no WRITE in the loop, so a step costs what a LoRA's step costs.

The memories of a recipe lie in one folder: a store for the training part of the task, and one for each evaluation set,
each with a memory for each row. What is missing there is written first, so a run that was interrupted goes on; a store
of another writer, task or setting is refused before anything is trained.
"""

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from datasets import Dataset, IterableDataset
from torch.utils.data import Dataset as TorchDataset
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from ..commands.write_dataset import write_dataset
from ..memory.silence import without_progress_bars
from ..memory.store import MemoryStore
from ..memory.written import GradMemMemory
from ..modeling_gradmem import GradMemForCausalLM
from ..tasks import check_row, columns_of
from ..tasks.collator import targets_of
from ..tasks.rows import context_numbers, context_text, ends_of
from ..template import get_template, leading_tokens

_SHARD_SIZE = 64  # memories that a killed run loses, at most


class WrittenRows(TorchDataset):
    """The questions on contexts that were written before, one at a time: `{"memory", "queries", "targets"}`.

    Args:
        rows: of a task.
        store: a memory for each row, by the row's number.
        distractors: how many memories of other contexts stand beside each question's own, which has a random place.

    Attributes:
        epoch: they are drawn anew in each, and the same ones whenever a question is asked for in it. Worker processes
            that outlive an epoch see it change.
    """

    # What a data set of rows says of itself; the model card's example is made from it.
    column_names = ("context", "queries", "targets")

    def __init__(self, rows: Dataset, store: MemoryStore, distractors: int = 0) -> None:
        self.rows, self.store, self.distractors = rows, store, distractors
        self._epoch = torch.zeros((), dtype=torch.long).share_memory_()
        self._contexts = context_numbers(rows)
        self._first_rows = np.unique(self._contexts, return_index=True)[1].tolist()  # of each context
        self._places = [(number, query) for number, row in enumerate(rows) for query in range(len(row["queries"]))]

    @property
    def epoch(self) -> int:
        return int(self._epoch)

    @epoch.setter
    def epoch(self, epoch: int) -> None:
        self._epoch.fill_(epoch)

    def __len__(self) -> int:
        return len(self._places)

    def __getitem__(self, index: int) -> dict[str, Any]:
        return self.__getitems__([index])[0]

    def __getitems__(self, indices: Sequence[int]) -> list[dict[str, Any]]:
        places = [self._places[index] for index in indices]
        read = [self._read_for(index, number) for index, (number, _) in zip(indices, places, strict=True)]
        memories = self.store[[str(number) for numbers in read for number in numbers]]
        found = []
        for place, (number, query) in enumerate(places):
            row, first = self.rows[number], place * (1 + self.distractors)
            asked = {name: [row[name][query]] for name in ("queries", "targets", "quotes") if name in row}
            beside = [memories[first + other] for other in range(1 + self.distractors)]
            memory = beside[0] if len(beside) == 1 else GradMemMemory.side_by_side(beside)
            whole = {name: row[name] for name in ("context", "add_end_token") if name in row}
            found.append(whole | {"memory": memory, **asked})
        return found

    def _read_for(self, index: int, number: int) -> list[int]:
        """The rows whose memories a question reads, its own among them, in their order."""
        rng = np.random.default_rng([1, index, self.epoch])
        others = rng.choice(len(self._first_rows) - 1, self.distractors, replace=False)
        numbers = [self._first_rows[int(other) + (other >= self._contexts[number])] for other in others]
        numbers.insert(int(rng.integers(1 + self.distractors)), number)
        return numbers


class DrawnEachEpoch(TrainerCallback):
    """Has rows draw anew in each epoch that they are trained on, so that a run that goes on draws as it would have."""

    def __init__(self, rows: WrittenRows) -> None:
        self._rows = rows

    def on_epoch_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self._rows.epoch = int(state.epoch or 0)  # a fraction where a run goes on within one


def written_rows(
    model: GradMemForCausalLM,
    rows: Dataset,
    directory: str | os.PathLike,
    *,
    batch_size: int,
    source_name: str,
    distractors: int = 0,
    write_steps: int | None = None,
    show_progress: bool = False,
) -> WrittenRows:
    """The rows with their memories, which are written where they are missing.

    Args:
        model: the writer, and the reader that is to be trained.
        rows: of a task, that [`check_rows`] let pass.
        directory: of the store.
        batch_size: contexts written at a time.
        source_name: how to call the rows in the facts of the store.
        distractors: as in [`WrittenRows`].
        write_steps: steps of WRITE; the configuration's by default.
        show_progress: show a progress bar over the contexts.

    Raises:
        OSError: the directory cannot be written to.
        ValueError: the directory holds memories of another writer, of other rows, or that were written in another way.
    """
    own = Dataset.from_dict({"id": [str(number) for number in range(len(rows))], "context": list(rows["context"])})
    write_dataset(
        model,
        own,
        directory,
        batch_size=batch_size,
        shard_size=_SHARD_SIZE,
        write_steps=write_steps,
        source_name=source_name,
        show_progress=show_progress,
    )
    with without_progress_bars():
        store = MemoryStore.from_pretrained(Path(directory))
    return WrittenRows(rows.select_columns(columns_of(rows)), store, distractors)


def check_rows(
    model: GradMemForCausalLM,
    rows: Dataset | IterableDataset,
    name: str,
    distractors: int = 0,
    longest: int | None = None,
    longest_context: int | None = None,
) -> None:
    """Refuse, before hours of writing, what could not be trained on or measured afterwards.

    Args:
        model: the reader.
        rows: of a task.
        name: what to call them.
        distractors: as in [`WrittenRows`].
        longest: tokens of query and answer, to which a collator cuts the query; none when `None`.
        longest_context: of a context, likewise, where it stands in a teacher's prompt.

    Raises:
        ValueError: the rows are a stream without end or too few, a row has no answers, or a question does not fit into
            the base's window, behind its memory or, for `distillation_loss_weight`, behind its context.
    """
    if isinstance(rows, IterableDataset):
        raise ValueError(f"Memories are written for a table of rows, not for a stream as {name}.")
    beside = distractors * model.form.num_memory_tokens
    words, window = get_template(model.config.template, model.tokenizer), model.decoder.window
    for number, row in enumerate(rows):
        check_row(row, f"row {number} of {name}")
        prompt = _prompt_length(model, row, longest_context)
        for query, target in zip(row["queries"], targets_of(row, words), strict=True):
            asked = words.question(query, context_text(row["context"])) + target
            tokens = model.tokenizer(asked, add_special_tokens=False).input_ids
            read = len(tokens) + (ends_of(row) is not False)
            read = read if longest is None else min(read, longest)
            needed = max(model.read_phase.prefix_length + beside, prompt) + read
            if window is not None and needed > window:
                raise ValueError(
                    f"A question of row {number} of {name} needs {needed} positions with its memory or its context and "
                    f"the answer, but the window of the base is {window}. Shorten or leave out {query[:60]!r}."
                )
    others = len(set(context_numbers(rows))) - 1
    if distractors > others:
        raise ValueError(
            f"distractors is {distractors}, and there are {others} other contexts beside each of {name}. Give fewer, "
            "or more rows."
        )


def _prompt_length(model: GradMemForCausalLM, row: dict[str, Any], longest: int | None) -> int:
    """Tokens before a question in the prompt that the teacher of distillation reads; 0 where nothing is taught."""
    if not model.config.distillation_loss_weight:
        return 0
    before = model.read_phase.header_ids or leading_tokens(model.tokenizer)
    tokens = model.tokenizer(context_text(row["context"]), add_special_tokens=False).input_ids
    return len(before) + len(tokens[:longest])


def train_reading_alone(model: GradMemForCausalLM) -> None:
    """Freeze the base and all that the memories depend on: what READ has of its own trains, and nothing else.

    Raises:
        ValueError: READ has nothing of its own.
    """
    model.requires_grad_(False)
    own = list(model.read_phase.extra_tensors().values())
    if not own:
        raise ValueError(
            "Memories were written once and READ has nothing of its own to train. Give the recipe's gradmem a "
            "read_lora, or num_control_tokens."
        )
    for tensor in own:
        tensor.requires_grad_(True)
