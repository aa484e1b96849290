"""Stores put together: into a new directory, or one behind another in its own. Whatever stops it, nothing is lost.

A new store is made in a directory beside its place, which is renamed when it is whole. Behind a store, new files lie in
a folder of their own, `data/.append-N`, until memories.json says N rows: from then on they belong to the store, and
whatever opens it moves them into their places, if that was stopped.
"""

import json
import math
import os
import shutil
import time
from bisect import bisect_right
from collections import Counter
from collections.abc import Mapping, Sequence
from contextlib import suppress
from itertools import accumulate
from pathlib import Path
from typing import Any

from datasets import Dataset, concatenate_datasets

from ..files import check_directory, only_writer, whole_file
from ..hub.cards import local_id
from ..hub.client import CARD_FILE, FACTS_FILE
from .card import store_card
from .shards import KEEPS_TEXT, TEXT, features_of, read_facts, shard_name
from .silence import without_progress_bars

_MOVING = 5.0  # seconds at most that the moves of an append take
_SAME = ("fingerprint", "num_memory_tokens", "hidden_size", "dtype")


def check_joinable(facts: Sequence[Mapping[str, Any]], names: Sequence[str], ids: Sequence[Sequence[str]]) -> None:
    """Refuse stores that do not go together.

    Args:
        facts, names, ids: of each store.

    Raises:
        ValueError: they are of different writers, or of another size or precision, or have an id in common.
    """
    for fact in _SAME:
        for index in range(1, len(facts)):
            if facts[index][fact] != facts[0][fact]:
                raise ValueError(
                    f"{names[index]} has {fact} {facts[index][fact]} and {names[0]} has {facts[0][fact]}: only "
                    "memories of one writer go into one store. Write the contexts of one of them again, by the model "
                    "that wrote the other."
                )
    owner: dict[str, str] = {}
    for name, own in zip(names, ids, strict=True):
        for each in own:
            if each in owner:
                raise ValueError(
                    f"The id {each!r} is in {owner[each]} and in {name}: an id stands for one memory. Leave it out of "
                    "one of them by store.filter, or write that store with other ids."
                )
            owner[each] = name


def write_merged(parts: Sequence[Dataset], facts: dict[str, Any], directory: Path) -> None:
    """Write a new store.

    Args:
        parts: the rows, store by store.
        facts: of the whole.
        directory: its place: new, or empty.

    Raises:
        OSError: the directory cannot be written to.
        ValueError: it holds something.
    """
    check_directory(directory)
    if directory.is_dir() and any(directory.iterdir()):
        raise ValueError(f"{directory} is not empty. Give a new or an empty directory.")
    unfinished = directory.with_name(f".merging-{directory.name}")
    shutil.rmtree(unfinished, ignore_errors=True)  # of a merge that was killed
    try:
        _write_shards(_joined(parts, facts), facts, 0, unfinished / "data")
        _write_facts(facts, unfinished)
        _write_card(_card(parts[0], facts, directory), unfinished)
        if directory.is_dir() and directory.samefile(os.curdir):  # is filled: replaced, it would be gone from under us
            for name in ("data", CARD_FILE, FACTS_FILE):
                (unfinished / name).rename(directory / name)
            return
        with suppress(FileNotFoundError):
            directory.rmdir()
        unfinished.rename(directory)
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)


def write_appended(own: Dataset, added: Dataset, facts: dict[str, Any], directory: Path) -> None:
    """Write rows behind those of a store. Files that are full stay as they are.

    Args:
        own, added: the rows.
        facts: of the whole.
        directory: of the store.

    Raises:
        BlockingIOError: another process writes to the store.
        OSError: the directory cannot be written to.
        ValueError: the store has changed since it was opened.
    """
    with only_writer(directory, wait=False):
        finish_append(directory)
        if read_facts(directory)["num_rows"] != len(own):
            raise ValueError(f"{directory} has changed since it was opened. Open it again, and append then.")
        for left_behind in (directory / "data").glob(".append-*"):  # by a call that was killed
            shutil.rmtree(left_behind, ignore_errors=True)
        before = _card(own, read_facts(directory), directory)
        staged = _staged(directory, facts)
        try:
            _write_shards(_joined([own, added], facts), facts, len(own) // facts["shard_size"], staged)
        except BaseException:
            shutil.rmtree(staged, ignore_errors=True)
            raise
        _write_facts(facts, directory)
        finish_append(directory)
        card = directory / CARD_FILE
        if card.is_file() and card.read_text(encoding="utf-8", errors="replace") == before:  # nobody has changed it
            _write_card(_card(own, facts, directory), directory)


def finish_append(directory: Path) -> None:
    """Move into their places the files of an append that has taken effect, if it was stopped before they all were.

    Args:
        directory: of the store, which no other process writes to meanwhile.

    Raises:
        OSError: the directory cannot be written to.
    """
    if not any((directory / "data").glob(".append-*")):
        return
    facts = read_facts(directory)
    staged = _staged(directory, facts)
    if not staged.is_dir():  # of an append that has not taken effect
        return
    places = [directory / shard_name(index, facts["num_shards"]) for index in range(facts["num_shards"])]
    for index, place in enumerate(places):
        with suppress(FileNotFoundError):  # where there are no locks, another process may have moved it
            if (staged / place.name).exists():
                (staged / place.name).replace(place)
            elif not place.exists():
                for before in place.parent.glob(f"train-{index:05d}-of-*.parquet"):
                    before.rename(place)
    for path in (directory / "data").glob("train-*.parquet"):
        if path not in places:
            path.unlink(missing_ok=True)
    with suppress(FileNotFoundError):
        staged.rmdir()


def finish_stopped_append(directory: Path) -> None:
    """[`finish_append`] for one who opens a store: what a process is about is left to it."""
    if any((directory / "data").glob(".append-*")):
        with suppress(BlockingIOError), only_writer(directory, wait=False):
            finish_append(directory)


def wait_for_append(directory: Path) -> None:
    """Let another process move the files of an append that has taken effect, which takes it a moment."""
    end = time.monotonic() + _MOVING
    while time.monotonic() < end and _staged(directory, read_facts(directory)).is_dir():
        time.sleep(0.02)


def merged_facts(facts: Sequence[Mapping[str, Any]], sizes: Sequence[int], shard_size: int) -> dict[str, Any]:
    """The facts of stores put together: those that they share, and the sources and settings of each."""
    num_rows = sum(sizes)
    whole = {name: value for name, value in facts[0].items() if all(of.get(name) == value for of in facts)}
    whole |= {"num_rows": num_rows, "shard_size": shard_size, "num_shards": math.ceil(num_rows / shard_size)}
    whole |= {name: facts[0].get(name) for name in ("format", "format_version", "base_name")}
    whole.pop(KEEPS_TEXT, None)
    if any(of.get(KEEPS_TEXT) for of in facts):
        whole[KEEPS_TEXT] = True
    told = ("source", "write", "model")
    parts: list[Any] = []
    for of, size in zip(facts, sizes, strict=True):
        parts += of.get("parts") or [{"num_rows": size} | {name: of[name] for name in told if name in of}]
    for name in told:
        whole.pop(name, None)
    return whole | {"parts": parts}


def facts_of_part(facts: dict[str, Any], rows: Sequence[int]) -> dict[str, Any]:
    """The facts of some rows of a store; of one that was put together, with how many are of each of its parts."""
    size = len(rows)
    facts = facts | {"num_rows": size, "num_shards": math.ceil(size / facts["shard_size"])}
    if not facts.get("parts"):
        return facts
    ends = list(accumulate(part["num_rows"] for part in facts["parts"]))
    kept = Counter(bisect_right(ends, row) for row in rows)
    return facts | {"parts": [of | {"num_rows": kept[each]} for each, of in enumerate(facts["parts"]) if kept[each]]}


def _staged(directory: Path, facts: Mapping[str, Any]) -> Path:
    return directory / "data" / f".append-{facts['num_rows']}"


def _joined(parts: Sequence[Dataset], facts: Mapping[str, Any]) -> Dataset:
    """The rows of all parts, with an empty text where a store kept none and another did."""
    columns = features_of(facts)
    with_text = [
        part.add_column(TEXT, [None] * len(part), feature=columns[TEXT])
        if TEXT in columns and TEXT not in part.column_names
        else part
        for part in parts
    ]
    return concatenate_datasets([part.select_columns(list(columns)) for part in with_text])


def _write_shards(rows: Dataset, facts: Mapping[str, Any], first: int, folder: Path) -> None:
    """The files from number `first` on."""
    folder.mkdir(parents=True)
    size, count = facts["shard_size"], facts["num_shards"]
    for index in range(first, count):
        part = rows.select(range(index * size, min((index + 1) * size, len(rows))))
        with whole_file(folder / Path(shard_name(index, count)).name) as path, without_progress_bars():
            part.to_parquet(path)


def _write_facts(facts: Mapping[str, Any], directory: Path) -> None:
    with whole_file(directory / FACTS_FILE) as path:
        path.write_text(json.dumps(facts, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def _card(rows: Dataset, facts: Mapping[str, Any], directory: Path) -> str:
    """The card of the store whose rows begin with these."""
    return store_card(facts, rows.with_format(None).select_columns("id")[0]["id"], local_id(directory))


def _write_card(text: str, directory: Path) -> None:
    with whole_file(directory / CARD_FILE) as path:
        path.write_text(text, encoding="utf-8")
