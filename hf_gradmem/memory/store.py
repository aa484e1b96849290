"""Many memories as a data set: Parquet files, and one small JSON file of facts.

memories.json                       whose memories these are, and how they were written
data/train-00000-of-00012.parquet   id, embeddings, write_losses, final_write_loss, segment_lengths, num_context_tokens
README.md                           the card of a data set on the Hub
"""

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Self

import datasets
from datasets import Dataset, load_dataset
from datasets.exceptions import DatasetGenerationError
from huggingface_hub import CommitInfo, snapshot_download
from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import filter_repo_objects

from ..hub.cards import address_card
from ..hub.client import CARD_FILE, folder_files, prepare_repository, push_files
from ..hub.errors import one_line_errors
from .shards import FACTS_FILE, checked_shards, features, read_facts, read_row, rows_by_id
from .written import GradMemMemory

PUSHED = [FACTS_FILE, CARD_FILE, "data/train-*.parquet"]


@contextmanager
def without_progress_bars() -> Iterator[None]:
    """Silence the progress bars of `datasets` for a span."""
    if datasets.are_progress_bars_disabled():
        yield
        return
    datasets.disable_progress_bars()
    try:
        yield
    finally:
        datasets.enable_progress_bars()


@contextmanager
def silent_errors() -> Iterator[None]:
    """Silence the log of `datasets` for a span: it logs the errors that it raises."""
    verbosity = datasets.logging.get_verbosity()
    datasets.logging.set_verbosity(datasets.logging.CRITICAL)
    try:
        yield
    finally:
        datasets.logging.set_verbosity(verbosity)


class MemoryStore:
    """Memories looked up by id, which stay on disk until they are asked for.

        store = MemoryStore.from_pretrained("memories/")
        memory = store["some id"]           # a GradMemMemory of one context
        memory = store[["one id", "another"]]

    Attributes:
        dataset (`datasets.Dataset`): a row for each memory, mapped from disk.
        facts (`dict`): `memories.json`: fingerprint, base_name, model, shape, and how the memories were written.
        directory (`pathlib.Path`, *optional*): where the store lies, unless it came from the Hub.
        name (`str`, *optional*): how messages call it.

    Raises:
        ValueError: an id comes twice, or a row has none.
    """

    def __init__(
        self, dataset: Dataset, facts: dict[str, Any], directory: Path | None = None, name: str | None = None
    ) -> None:
        self.dataset = dataset
        self.facts = facts
        self.directory = directory
        self.name = name or str(directory or "The store")
        # Ids alone are kept in working memory.
        self._row_of = rows_by_id(dataset.with_format(None).select_columns("id")[:]["id"], self.name, facts)

    @classmethod
    def from_pretrained(
        cls,
        name_or_path: str | os.PathLike,
        *,
        revision: str | None = None,
        token: str | bool | None = None,
        local_files_only: bool = False,
    ) -> Self:
        """Open a directory that `hf-gradmem write-dataset` wrote, or a data set on the Hub.

        When a store is first opened, `datasets` keeps a copy of it in its cache, from which single rows can be read.

        Args:
            name_or_path: the directory, or the Hub repository.
            revision, token, local_files_only: of a Hub repository.

        Raises:
            OSError: there is no such directory or repository, it holds no memories, or the Hub refused or is out of
                reach; one line says which.
            ValueError: the facts are not those of a store, some memories have not been written yet, a file is not the
                store's or has other rows or columns, or an id comes twice; one line names the file, the value, what
                was expected and what to do.
        """
        directory = Path(name_or_path).expanduser()
        is_local = directory.is_dir()
        if not is_local:
            try:
                with one_line_errors(name_or_path, revision):
                    snapshot = snapshot_download(
                        str(name_or_path),
                        repo_type="dataset",
                        revision=revision,
                        token=token,
                        local_files_only=local_files_only,
                        allow_patterns=PUSHED,
                    )
            except HFValidationError as error:
                raise FileNotFoundError(
                    f"There is no directory {str(name_or_path)!r}, nor can it be a Hub repository: {error}"
                ) from error
            directory = Path(snapshot)
        facts = read_facts(directory)
        dataset = _load(checked_shards(directory, facts), facts)
        return cls(dataset, facts, directory if is_local else None, str(name_or_path))

    def __len__(self) -> int:
        return len(self.dataset)

    def __contains__(self, name: object) -> bool:
        return name in self._row_of

    @property
    def ids(self) -> list[str]:
        """The ids of all memories, in the order they were written in."""
        return list(self._row_of)

    @property
    def fingerprint(self) -> str:
        """Of what wrote the memories, by content: [`GradMemMemory.fingerprint`] of each."""
        return self.facts["fingerprint"]

    def __getitem__(self, name: str | Sequence[str]) -> GradMemMemory:
        """One memory, or, for a list of ids, all of them in that order.

        Raises:
            KeyError: there is no such id.
            ValueError: a number in its row is missing or out of range; one line says which.
        """
        names = [name] if isinstance(name, str) else list(name)
        for each in names:
            if each not in self._row_of:
                some = ", ".join(map(repr, list(self._row_of)[:3]))
                raise KeyError(f"There is no memory {each!r} among these {len(self)}. Ids are {some} and so on.")
        if not names:
            raise KeyError("No id was given.")
        table = self.dataset.with_format("arrow")[[self._row_of[each] for each in names]]
        return GradMemMemory.cat(
            [read_row(table, row, self.facts, f"The memory {each!r} of {self.name}") for row, each in enumerate(names)]
        )

    def push_to_hub(
        self,
        repo_id: str,
        *,
        private: bool | None = None,
        token: str | bool | None = None,
        commit_message: str = "Upload GradMem memories",
        revision: str | None = None,
        create_pr: bool = False,
    ) -> CommitInfo:
        """Upload the directory to a Hub data set, made if it is missing, in one commit.

        Raises:
            OSError: the Hub refused or is out of reach; one line says which.
            ValueError: the store came from the Hub itself.
        """
        if self.directory is None:
            raise ValueError("This store was opened from the Hub. Only a store in a directory can be pushed.")
        repo_id = prepare_repository(repo_id, revision=revision, private=private, token=token, repo_type="dataset")
        present = folder_files(self.directory)
        files: dict[str, Path | bytes] = {
            name: present[name] for name in filter_repo_objects(present, allow_patterns=PUSHED)
        }
        if CARD_FILE in present:
            card = present[CARD_FILE].read_text(encoding="utf-8")
            files[CARD_FILE] = address_card(card, repo_id, self.directory).encode()
        return push_files(
            files,
            repo_id,
            token=token,
            commit_message=commit_message,
            revision=revision,
            create_pr=create_pr,
            repo_type="dataset",
            replaced=PUSHED[-1:],  # the files of an earlier push with more, or larger, shards
        )


def _load(files: list[Path], facts: dict[str, Any]) -> Dataset:
    columns = features(facts["num_memory_tokens"], facts["hidden_size"], facts["dtype"])
    with silent_errors():
        try:
            return load_dataset("parquet", data_files=list(map(str, files)), split="train", features=columns)
        except DatasetGenerationError as error:
            raise ValueError(
                f"{files[0].parent} cannot be read as Parquet files of memories: {error.__cause__ or error}. Copy them "
                "again, or delete them and give the command that wrote the store again."
            ) from error


__all__ = ["MemoryStore"]
