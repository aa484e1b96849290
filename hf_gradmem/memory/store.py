"""Many memories as a data set: Parquet files, and one small JSON file of facts.

memories.json                       whose memories these are, and how they were written
data/train-00000-of-00012.parquet   id, embeddings, write_losses, final_write_loss, segment_lengths, num_context_tokens
README.md                           the card of a data set on the Hub
"""

import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, Literal, Self

from datasets import Dataset, load_dataset
from datasets.exceptions import DatasetGenerationError
from huggingface_hub import CommitInfo, snapshot_download
from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import filter_repo_objects
from tqdm.auto import tqdm

from ..files import literal_paths
from ..hub.cards import address_card, gives_way
from ..hub.client import CARD_FILE, FACTS_FILE, folder_files, prepare_repository, push_files, remote_card
from ..hub.errors import one_line_errors
from ..modeling_gradmem import GradMemForCausalLM
from ..texts.reading import read_text
from .bm25 import WordIndex
from .checks import asked_ids
from .merging import (
    check_joinable,
    facts_of_part,
    finish_stopped_append,
    merged_facts,
    wait_for_append,
    write_appended,
    write_merged,
)
from .search import GENERIC_QUESTIONS, LikelihoodSearch, best_results, check_search, joined
from .shards import KEEPS_TEXT, TEXT, checked_shards, features_of, read_facts, read_row, rows_by_id
from .silence import silent_errors, without_progress_bars
from .written import GradMemMemory

_SEARCH_FOLDER = "search"
PUSHED = [FACTS_FILE, CARD_FILE, "data/train-*.parquet"]


class MemoryStore:
    """Memories looked up by id, which stay on disk until they are asked for.

        store = MemoryStore.from_pretrained("memories/")
        memory = store["some id"]           # a GradMemMemory of one context
        memory = store[["one id", "another"]]
        found = store.search(model, "When does gate 7 open?")

    Iterating gives the ids, as of a mapping; `items` and `batches` also give the memories.

    Attributes:
        dataset (`datasets.Dataset`): a row for each memory, mapped from disk.
        facts (`dict`): `memories.json`: fingerprint, base_name, model, shape, and how the memories were written.
        directory (`pathlib.Path`, *optional*): where the store lies, unless it came from the Hub or is a part of one.
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
        self._search_folder = None if directory is None else directory / _SEARCH_FOLDER
        self._search: LikelihoodSearch | None = None
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
        directory = Path(os.path.expanduser(name_or_path))
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
        try:
            facts, dataset = _opened(directory)
        except (OSError, ValueError):
            wait_for_append(directory)  # its files may have been moved while they were looked at
            facts, dataset = _opened(directory)
        return cls(dataset, facts, directory if is_local else None, str(name_or_path))

    def __len__(self) -> int:
        return len(self.dataset)

    def __contains__(self, name: object) -> bool:
        return isinstance(name, str) and name in self._row_of

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
            KeyError: there is no such id, or none was given.
            TypeError: it is no id.
            ValueError: a number in its row is missing or out of range; one line says which.
        """
        names = asked_ids(name)
        for each in names:
            if each not in self._row_of:
                raise KeyError(f"There is no memory {each!r} among these {len(self)}. Ids are {self.ids[:3]}, ...")
        return self._read([self._row_of[each] for each in names], names)

    def _read(self, rows: list[int] | slice, names: Sequence[str]) -> GradMemMemory:
        table = self.dataset.with_format("arrow")[rows]
        return GradMemMemory.cat(
            [read_row(table, row, self.facts, f"The memory {each!r} of {self.name}") for row, each in enumerate(names)]
        )

    # ------------------------------------------------------------------------------------------------ going through

    def __iter__(self) -> Iterator[str]:
        return iter(self._row_of)

    def items(self) -> Iterator[tuple[str, GradMemMemory]]:
        """Each id with its memory, read from disk as they are asked for."""
        for ids, memories in self.batches():
            yield from ((name, memories[row]) for row, name in enumerate(ids))

    def batches(self, batch_size: int = 64) -> Iterator[tuple[list[str], GradMemMemory]]:
        """Ids and memories in the order they were written in, read from disk so many at a time.

        Raises:
            ValueError: `batch_size` is below 1, or a number in a row is missing or out of range.
        """
        if batch_size < 1:
            raise ValueError(f"batch_size must be at least 1, got {batch_size}.")
        ids = self.ids
        for start in range(0, len(ids), batch_size):
            part = ids[start : start + batch_size]
            yield part, self._read(slice(start, start + len(part)), part)

    def filter(self, keep: Iterable[str] | Callable[[dict[str, Any]], bool]) -> "MemoryStore":
        """A part of the store, on the same files, in the store's order.

        Args:
            keep: the ids to keep; or a function of a row's facts that says whether to: `id`, `num_context_tokens`,
                `final_write_loss`, `write_losses`, `segment_lengths`, and `text`, the segments that were written, where
                the store keeps them.

        Raises:
            KeyError: there is no such id.
            TypeError: an id was given by itself; ids come in a list.
            ValueError: nothing is left.
        """
        if callable(keep):
            names = [name for name in self.dataset.column_names if name != "embeddings"]
            facts = self.dataset.with_format(None).select_columns(names)
            rows = [number for number, row in enumerate(facts) if keep(row)]
        elif isinstance(keep, str):
            raise TypeError(f"Give the ids to keep in a list, or a function of a row's facts, got {keep!r}.")
        else:
            keep = list(keep)
            for name in keep:
                if name not in self:
                    raise KeyError(f"There is no memory {name!r} among these {len(self)}.")
            rows = sorted({self._row_of[name] for name in keep})
        if not rows:
            raise ValueError(f"No memory of {self.name} is left: none of {len(self)} was to be kept.")
        own = facts_of_part(self.facts, rows)
        part = type(self)(self.dataset.select(rows), own, None, f"A part of {self.name}")
        part._search_folder = self._search_folder
        return part

    @classmethod
    def merge(
        cls, stores: Iterable["MemoryStore"], directory: str | os.PathLike, *, shard_size: int | None = None
    ) -> Self:
        """Put stores, or parts of stores, together in a new directory, and open it.

        It appears whole or not at all. Texts are kept where any of the stores keeps them.

        Args:
            stores: of one writer, with no id in common.
            directory: new, or empty.
            shard_size: memories in a file; that of the first store by default.

        Raises:
            OSError: the directory cannot be written to.
            ValueError: no store was given, they are of different writers or have an id in common, or the directory
                holds something.
        """
        stores = list(stores)
        if not stores:
            raise ValueError("MemoryStore.merge needs at least one store, got none.")
        if not all(isinstance(store, MemoryStore) for store in stores):
            raise TypeError(f"MemoryStore.merge takes a list of stores, got {stores[0]!r} in it.")
        facts = [store.facts for store in stores]
        check_joinable(facts, [store.name for store in stores], [store.ids for store in stores])
        size = facts[0]["shard_size"] if shard_size is None else shard_size
        if size < 1:
            raise ValueError(f"shard_size must be at least 1, got {size}.")
        place = Path(os.path.expanduser(directory)).resolve()
        whole = merged_facts(facts, list(map(len, stores)), size)
        write_merged([store.dataset for store in stores], whole, place)
        with without_progress_bars():
            return cls.from_pretrained(place)

    def append(self, other: "MemoryStore") -> None:
        """Put the memories of another store behind these, in this store's directory.

        Files that are full stay as they are. Whatever stops it, the directory opens with the memories of before, or
        with all.

        Args:
            other: a store, or a part of one, of the same writer, with no id in common.

        Raises:
            BlockingIOError: another process writes to this store.
            OSError: the directory cannot be written to.
            ValueError: the stores do not go together, this one has no directory of its own, it has changed since it was
                opened, or it keeps no texts and the other does.
        """
        if self.directory is None:
            raise ValueError(f"{self.name} is no store in a directory of its own. Put both together by merge.")
        check_joinable([self.facts, other.facts], [self.name, other.name], [self.ids, other.ids])
        if other.facts.get(KEEPS_TEXT) and not self.facts.get(KEEPS_TEXT):
            raise ValueError(f"{self.name} keeps no texts, and {other.name} does. Put both together by merge.")
        whole = merged_facts([self.facts, other.facts], [len(self), len(other)], self.facts["shard_size"])
        write_appended(self.dataset, other.dataset, whole, self.directory)
        with without_progress_bars():
            opened = type(self).from_pretrained(self.directory)
        self.__dict__ = opened.__dict__  # nothing that was kept of the store as it was before

    # ------------------------------------------------------------------------------------------------ searching

    @property
    def keeps_text(self) -> bool:
        """Whether the texts that were written lie beside their memories."""
        return bool(self.facts.get(KEEPS_TEXT))

    @cached_property
    def _words(self) -> WordIndex:
        if not self.keeps_text:
            raise ValueError(
                f"{self.name} keeps no texts: words cannot be looked for. Write the memories with --keep-text "
                "(keep_text=True), or search by likelihood without a shortlist."
            )
        texts = self.dataset.with_format(None).select_columns(TEXT)
        return WordIndex(self.ids, [row[TEXT] or () for row in texts])

    def search(
        self,
        model: GradMemForCausalLM | None,
        question: str | Sequence[str],
        k: int = 5,
        *,
        method: Literal["likelihood", "joint", "bm25"] = "likelihood",
        shortlist: int | None = None,
        calibration: Sequence[str] = GENERIC_QUESTIONS,
        batch_size: int = 64,
        show_progress: bool = False,
    ) -> list[Any]:
        """Find the memories that a question is about, best first.

        Memories are read from disk a batch at a time. What the calibration needs is computed at the first search, a
        dozen questions for each memory, and kept beside the store.

        Args:
            model: the reader; not needed for `"bm25"`.
            question: a question, or a list of several.
            k: how many to give at most.
            method: `"likelihood"` of the question under each memory; `"bm25"`, of its words in the texts; or
                `"joint"`, the sum of both, each standardised over the memories.
            shortlist: rank the best so many by BM25 alone; all, where fewer share a word with the question.
            calibration: the questions that are compared with; `()` for plain log-probabilities.
            batch_size: memories at a time.
            show_progress: show a progress bar over the memories.

        Returns:
            A list of at most `k` [`SearchResult`]; for a list of questions, a list of these.

        Raises:
            ImportError: the package for search by words is not installed.
            ValueError: a question is empty, a number is below 1, there is no such method, the store keeps no texts, or
                the memories are not the model's.
        """
        questions = [question] if isinstance(question, str) else list(question)
        check_search(questions, method, calibration, k=k, batch_size=batch_size, shortlist=shortlist)
        if method == "bm25":
            found = [self._words.best(each, min(k, shortlist or k)) for each in questions]
        elif model is None:
            raise ValueError("A search by likelihood needs the model that reads the memories.")
        else:
            joint = method == "joint"
            words = [self._words.shortlist(each, shortlist) if joint or shortlist else [] for each in questions]
            parts = [self.filter([of.id for of in each]) if 0 < len(each) < len(self) else self for each in words]
            likelihood = self._likelihood(model, tuple(calibration))
            with tqdm(total=sum(map(len, parts)), desc="Searching", unit="memory", disable=not show_progress) as bar:
                found = []
                for each, part, of_words in zip(questions, parts, words, strict=True):
                    scores = likelihood.scores(each, part.batches(batch_size), bar)
                    found.append(best_results(joined(scores, of_words) if joint else scores, k))
        return found[0] if isinstance(question, str) else found

    def _likelihood(self, model: GradMemForCausalLM, calibration: tuple[str, ...]) -> LikelihoodSearch:
        """A search whose means are kept for the next one."""
        search = LikelihoodSearch(model, calibration, self._search_folder)
        kept = self._search
        if kept is None or kept.model is not model or kept.identity != search.identity:
            kept = self._search = search
        return kept

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
            ValueError: the store came from the Hub itself, or its card is not UTF-8.
        """
        if self.directory is None:
            raise ValueError(
                "This store was opened from the Hub, or is a part of one. Only a store in a directory can be pushed; "
                "MemoryStore.merge([store], directory) makes one of a part."
            )
        present = folder_files(self.directory)
        own_card = read_text(present[CARD_FILE]) if CARD_FILE in present else None
        repo_id = prepare_repository(repo_id, revision=revision, private=private, token=token, repo_type="dataset")
        files: dict[str, Path | bytes] = {
            name: present[name] for name in filter_repo_objects(present, allow_patterns=PUSHED)
        }
        if own_card is not None:
            card = address_card(own_card, repo_id, self.directory)
            files[CARD_FILE] = card.encode()
            if gives_way(card, remote_card(repo_id, revision=revision, token=token, repo_type="dataset")):
                del files[CARD_FILE]
        return push_files(
            files,
            repo_id,
            token=token,
            commit_message=commit_message,
            revision=revision,
            create_pr=create_pr,
            repo_type="dataset",
            replaced=(PUSHED[-1:],),  # the files of an earlier push with more, or larger, shards
        )


def _opened(directory: Path) -> tuple[dict[str, Any], Dataset]:
    """The facts of a store and its rows, checked."""
    finish_stopped_append(directory)
    facts = read_facts(directory)
    return facts, _load(checked_shards(directory, facts), facts)


def _load(files: list[Path], facts: dict[str, Any]) -> Dataset:
    with silent_errors():
        try:
            return load_dataset("parquet", data_files=literal_paths(files), split="train", features=features_of(facts))
        except DatasetGenerationError as error:
            raise ValueError(
                f"{files[0].parent} cannot be read as Parquet files of memories: {error.__cause__ or error}. Copy them "
                "again, or delete them and give the command that wrote the store again."
            ) from error


__all__ = ["MemoryStore"]
