"""Many memories as a data set: Parquet files, and one small JSON file of facts.

memories.json                       whose memories these are, and how they were written
data/train-00000-of-00012.parquet   id, embeddings, write_losses, final_write_loss, segment_lengths, num_context_tokens
README.md                           the card of a data set on the Hub
"""

import json
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Self

import datasets
import torch
from datasets import Array2D, Dataset, Features, List, Value, load_dataset
from huggingface_hub import CommitInfo, HfApi, snapshot_download
from huggingface_hub.errors import HFValidationError

from ..hub.client import CARD_FILE, prepare_repository
from ..hub.errors import one_line_errors
from .written import GradMemMemory

FACTS_FILE = "memories.json"
PUSHED = [FACTS_FILE, CARD_FILE, "data/train-*.parquet"]
FORMAT = "gradmem-memories"
FORMAT_VERSION = 2
_READABLE_VERSIONS = (1, FORMAT_VERSION)  # 1 has a fingerprint of another kind, and no base_name
Tensor = torch.Tensor


def shard_name(index: int, num_shards: int) -> str:
    """Where a shard lies in its directory: the place in which the Hub, too, looks for the files of a data set."""
    return f"data/train-{index:05d}-of-{num_shards:05d}.parquet"


def features(num_memory_tokens: int, hidden_size: int, dtype: str) -> Features:
    """The columns of a data set of memories."""
    return Features(
        {
            "id": Value("string"),
            "embeddings": Array2D((num_memory_tokens, hidden_size), dtype),
            "write_losses": List(Value("float32")),
            "final_write_loss": Value("float32"),
            "segment_lengths": List(Value("int64")),
            "num_context_tokens": Value("int64"),
        }
    )


def as_columns(ids: Sequence[str], memory: GradMemMemory) -> dict[str, list[Any]]:
    """Memories and their ids as the columns of [`features`].

    Raises:
        ValueError: the loss after the last step was not measured.
    """
    if memory.final_write_loss is None:
        raise ValueError("These memories have no final_write_loss. Write them with measure_final_loss=True.")
    lengths = memory.segment_lengths.cpu()
    return {
        "id": list(ids),
        "embeddings": list(memory.embeddings.cpu().numpy()),
        "write_losses": memory.write_losses.cpu().tolist(),
        "final_write_loss": memory.final_write_loss.cpu().tolist(),
        # Without the zeros that stand where another context of the batch had more segments.
        "segment_lengths": [row[row > 0].tolist() for row in lengths],
        "num_context_tokens": lengths.sum(1).tolist(),
    }


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


class MemoryStore:
    """Memories looked up by id, which stay on disk until they are asked for.

        store = MemoryStore.from_pretrained("memories/")
        memory = store["some id"]           # a GradMemMemory of one context
        memory = store[["one id", "another"]]

    Attributes:
        dataset (`datasets.Dataset`): a row for each memory, mapped from disk.
        facts (`dict`): `memories.json`: fingerprint, base_name, model, shape, and how the memories were written.
        directory (`pathlib.Path`, *optional*): where the store lies, unless it came from the Hub.
    """

    def __init__(self, dataset: Dataset, facts: dict[str, Any], directory: Path | None = None) -> None:
        self.dataset = dataset
        self.facts = facts
        self.directory = directory
        self._rows: dict[str, int] | None = None

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
            ValueError: the facts are not those of a store, or some memories have not been written yet.
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
        files = [directory / shard_name(index, facts["num_shards"]) for index in range(facts["num_shards"])]
        missing = [file.name for file in files if not file.is_file()]
        if missing:
            raise ValueError(
                f"{name_or_path} is not finished: {len(missing)} of {len(files)} files are missing, the first "
                f"{missing[0]}. Give the command that began it again."
            )
        dataset = load_dataset("parquet", data_files=list(map(str, files)), split="train")
        return cls(dataset, facts, directory if is_local else None)

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
        """
        names = [name] if isinstance(name, str) else list(name)
        for each in names:
            if each not in self._row_of:
                some = ", ".join(map(repr, list(self._row_of)[:3]))
                raise KeyError(f"There is no memory {each!r} among these {len(self)}. Ids are {some} and so on.")
        if not names:
            raise KeyError("No id was given.")
        tensors = {"columns": ["embeddings"], "output_all_columns": True, "dtype": getattr(torch, self.facts["dtype"])}
        rows = self.dataset.with_format("torch", **tensors)[[self._row_of[each] for each in names]]
        return GradMemMemory.cat([self._memory(rows, index) for index in range(len(names))])

    def _memory(self, rows: dict[str, Any], index: int) -> GradMemMemory:
        return GradMemMemory(
            embeddings=rows["embeddings"][index][None],
            write_losses=torch.tensor([rows["write_losses"][index]]),
            segment_lengths=torch.tensor([rows["segment_lengths"][index]]),
            final_write_loss=torch.tensor([rows["final_write_loss"][index]]),
            fingerprint=self.fingerprint,
            base_name=self.facts.get("base_name"),
        )

    @property
    def _row_of(self) -> dict[str, int]:
        """Ids alone are kept in working memory, from the first look-up on."""
        if self._rows is None:
            self._rows = {name: row for row, name in enumerate(self.dataset.select_columns("id")[:]["id"])}
        return self._rows

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
        with one_line_errors(repo_id, revision):
            return HfApi(token=token).upload_folder(
                repo_id=repo_id,
                folder_path=self.directory,
                repo_type="dataset",
                allow_patterns=PUSHED,
                delete_patterns=PUSHED[-1],  # the files of an earlier push with more, or larger, shards
                commit_message=commit_message,
                revision=revision,
                create_pr=create_pr,
            )


def read_facts(directory: Path) -> dict[str, Any]:
    """The facts of the store in a directory.

    Raises:
        FileNotFoundError: it holds none.
        ValueError: they are not those of a store.
    """
    path = directory / FACTS_FILE
    if not path.is_file():
        raise FileNotFoundError(f"{directory} holds no memories by id: {FACTS_FILE} is missing.")
    return _checked_facts(path)


def _checked_facts(path: Path) -> dict[str, Any]:
    try:
        facts = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is not JSON ({error}).") from error
    found = (facts.get("format"), facts.get("format_version")) if isinstance(facts, dict) else None
    if found not in [(FORMAT, version) for version in _READABLE_VERSIONS]:
        raise ValueError(f"{path} is not of format {(FORMAT, FORMAT_VERSION)}, but {found}.")
    return facts


__all__ = ["MemoryStore"]
