"""Training READ on memories that were written once: no WRITE in the loop, so a step costs what a LoRA's step costs.

The memories of a recipe lie in one folder: a store for the training part of the task, and one for each evaluation set,
each with a memory for each row. What is missing there is written first, so a run that was interrupted goes on; a store
of another writer, task or setting is refused before anything is trained.
"""

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from datasets import Dataset, IterableDataset
from torch.utils.data import Dataset as TorchDataset

from ..commands.write_dataset import write_dataset
from ..memory.silence import without_progress_bars
from ..memory.store import MemoryStore
from ..modeling_gradmem import GradMemForCausalLM
from ..tasks import FEATURES, check_row
from ..template import get_template

_SHARD_SIZE = 64  # memories that a killed run loses, at most


class WrittenRows(TorchDataset):
    """The questions on contexts that were written before, one at a time: `{"memory", "queries", "targets"}`.

    Args:
        rows: of a task.
        store: a memory for each row, by the row's number.
    """

    # What a data set of rows says of itself; the model card's example is made from it.
    column_names = ("context", "queries", "targets")

    def __init__(self, rows: Dataset, store: MemoryStore) -> None:
        self.rows, self.store = rows, store
        self._places = [(number, query) for number, row in enumerate(rows) for query in range(len(row["queries"]))]

    def __len__(self) -> int:
        return len(self._places)

    def __getitem__(self, index: int) -> dict[str, Any]:
        return self.__getitems__([index])[0]

    def __getitems__(self, indices: Sequence[int]) -> list[dict[str, Any]]:
        places = [self._places[index] for index in indices]
        memories = self.store[[str(number) for number, _ in places]]
        found = []
        for place, (number, query) in enumerate(places):
            row = self.rows[number]
            asked = {name: [row[name][query]] for name in ("queries", "targets")}
            found.append({"context": row["context"], "memory": memories[place], **asked})
        return found


def written_rows(
    model: GradMemForCausalLM,
    rows: Dataset | IterableDataset,
    directory: str | os.PathLike,
    *,
    batch_size: int,
    source_name: str,
    show_progress: bool = False,
) -> WrittenRows:
    """The rows with their memories, which are written where they are missing.

    Args:
        model: the writer, and the reader that is to be trained.
        rows: of a task.
        directory: of the store.
        batch_size: contexts written at a time.
        source_name: how to call the rows in the facts of the store.
        show_progress: show a progress bar over the contexts.

    Raises:
        OSError: the directory cannot be written to.
        ValueError: the rows are a stream without end, a row has no answers, a question does not fit into the base's
            window, or the directory holds memories of another writer, of other rows,
            or that were written in another way.
    """
    if isinstance(rows, IterableDataset):
        raise ValueError("Memories are written for a table of rows, not for a stream.")
    _check_questions(model, rows)
    own = Dataset.from_dict({"id": [str(number) for number in range(len(rows))], "context": list(rows["context"])})
    write_dataset(
        model,
        own,
        directory,
        batch_size=batch_size,
        shard_size=_SHARD_SIZE,
        source_name=source_name,
        show_progress=show_progress,
    )
    with without_progress_bars():
        store = MemoryStore.from_pretrained(Path(directory))
    return WrittenRows(rows.select_columns(list(FEATURES)), store)


def _check_questions(model: GradMemForCausalLM, rows: Dataset) -> None:
    """Refuse, before hours of writing, what could not be trained on afterwards."""
    words, window = get_template(model.config.template, model.tokenizer), model.decoder.window
    for number, row in enumerate(rows):
        check_row(row, f"row {number}")
        for query, target in zip(row["queries"], row["targets"], strict=True):
            asked = words.question(query) + words.target(target)
            tokens = model.tokenizer(asked, add_special_tokens=False).input_ids
            needed = model.read_phase.prefix_length + len(tokens) + 1
            if window is not None and needed > window:
                raise ValueError(
                    f"A question of row {number} needs {needed} positions with memory and answer, but the window "
                    f"of the base is {window}. Shorten or leave out {query[:60]!r}."
                )


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
