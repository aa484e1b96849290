"""The files of many memories: what lies in them, and what is looked at before anything is taken from them.

The facts, the files and the ids are checked when a store is opened, the numbers of a memory when it is read.
"""

import json
import math
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pyarrow
import torch
from datasets import Array2D, Features, List, Value
from pyarrow import compute, parquet

from ..hub.client import FACTS_FILE
from .checks import broken, check_tensors
from .written import GradMemMemory

# The column of source texts, and the fact that there is one: without it a store has no such column.
TEXT, KEEPS_TEXT = "text", "keeps_text"
FORMAT = "gradmem-memories"
FORMAT_VERSION = 2
_READABLE_VERSIONS = (1, FORMAT_VERSION)  # 1 has a fingerprint of another kind, and no base_name
_COUNTS = ("num_memory_tokens", "hidden_size", "num_rows", "num_shards", "shard_size")
_DTYPES = ("float64", "float32", "float16")
_LARGEST_COUNT = 2**31 - 1
_SHOWN_CHARACTERS = 100  # of what a file says wrongly
_FACTS_REMEDY = "Fetch the store's memories.json again, or write the memories into a new directory."
_SHARD_REMEDY = "Copy it again, or delete it and give the command that wrote the store again."
Tensor = torch.Tensor


def shard_name(index: int, num_shards: int) -> str:
    """Where a shard lies in its directory: the place in which the Hub, too, looks for the files of a data set."""
    return f"data/train-{index:05d}-of-{num_shards:05d}.parquet"


def features(num_memory_tokens: int, hidden_size: int, dtype: str, keeps_text: bool = False) -> Features:
    """The columns of a data set of memories; `text` holds the segments of what was written."""
    return Features(
        {
            "id": Value("string"),
            "embeddings": Array2D((num_memory_tokens, hidden_size), dtype),
            "write_losses": List(Value("float32")),
            "final_write_loss": Value("float32"),
            "segment_lengths": List(Value("int64")),
            "num_context_tokens": Value("int64"),
        }
        | ({TEXT: List(Value("string"))} if keeps_text else {})
    )


def features_of(facts: Mapping[str, Any]) -> Features:
    """The columns of a store with these facts."""
    return features(facts["num_memory_tokens"], facts["hidden_size"], facts["dtype"], bool(facts.get(KEEPS_TEXT)))


def as_columns(
    ids: Sequence[str], memory: GradMemMemory, texts: Sequence[str | list[str]] | None = None
) -> dict[str, list[Any]]:
    """Memories and their ids, and what was written if it is to be kept, as the columns of [`features`].

    Raises:
        ValueError: the loss after the last step was not measured, or the memories hold what could not be read again.
    """
    if memory.final_write_loss is None:
        raise ValueError("These memories have no final_write_loss. Write them with measure_final_loss=True.")
    check_tensors(memory.tensors, f"The memory of {ids[0]!r}, or one of those after it,")
    lengths = memory.segment_lengths.cpu()
    columns: dict[str, list[Any]] = {
        "id": list(ids),
        "embeddings": list(memory.embeddings.cpu().numpy()),
        "write_losses": memory.write_losses.cpu().tolist(),
        "final_write_loss": memory.final_write_loss.cpu().tolist(),
        # Without the zeros that stand where another context of the batch had more segments.
        "segment_lengths": [row[row > 0].tolist() for row in lengths],
        "num_context_tokens": lengths.sum(1).tolist(),
    }
    if texts is not None:
        columns[TEXT] = [[text] if isinstance(text, str) else list(text) for text in texts]
    return columns


# ------------------------------------------------------------------------------------------------ facts


def read_facts(directory: Path) -> dict[str, Any]:
    """The facts of the store in a directory.

    Raises:
        FileNotFoundError: it holds none.
        ValueError: they are not those of a store, or one is missing or out of range; names it and its value.
    """
    path = directory / FACTS_FILE
    if not path.is_file():
        raise FileNotFoundError(f"{directory} holds no memories by id: {FACTS_FILE} is missing.")
    try:
        facts = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is not JSON ({error}). {_FACTS_REMEDY}") from error
    found = (facts.get("format"), facts.get("format_version")) if isinstance(facts, dict) else None
    if found not in [(FORMAT, version) for version in _READABLE_VERSIONS]:
        raise ValueError(f"{path} is not of format {(FORMAT, FORMAT_VERSION)}, but {found}.")
    _check_facts(facts, path)
    return facts


def _check_facts(facts: dict[str, Any], path: Path) -> None:
    def refuse(name: str, expected: str) -> None:
        held = f"{name} is {json.dumps(facts[name])[:_SHOWN_CHARACTERS]}" if name in facts else f"it has no {name}"
        raise broken(path, held, expected, _FACTS_REMEDY)

    for name in _COUNTS:
        if type(facts.get(name)) is not int or not 1 <= facts[name] <= _LARGEST_COUNT:
            refuse(name, f"a whole number, 1 to {_LARGEST_COUNT:,},")
    if facts.get("dtype") not in _DTYPES:
        refuse("dtype", " or ".join(_DTYPES))
    if not isinstance(facts.get("fingerprint"), str):
        refuse("fingerprint", "a text")
    if not isinstance(facts.get("base_name"), str | None):
        refuse("base_name", "a text or null")
    if not isinstance(facts.get(KEEPS_TEXT), bool | None):
        refuse(KEEPS_TEXT, "true or false")
    parts = facts.get("parts") or []
    counted = isinstance(parts, list) and all(isinstance(of, dict) and type(of.get("num_rows")) is int for of in parts)
    if not counted:
        refuse("parts", "a list of objects that have num_rows")
    num_shards = math.ceil(facts["num_rows"] / facts["shard_size"])
    if facts["num_shards"] != num_shards:
        refuse("num_shards", f"{num_shards}, for {facts['num_rows']} rows at {facts['shard_size']} in a shard,")


# ------------------------------------------------------------------------------------------------ files


def checked_shards(directory: Path, facts: dict[str, Any]) -> list[Path]:
    """The files of a store, each of which is there, once, with its rows and columns.

    Raises:
        ValueError: one is missing, is not the store's, cannot be read, or has other rows or columns.
    """
    num_shards = facts["num_shards"]
    present = {path.name for path in (directory / "data").glob("train-*.parquet") if path.is_file()}
    own = {name for name in present if _is_shard(name, num_shards)}
    if len(own) < num_shards:
        names = (Path(shard_name(index, num_shards)).name for index in range(num_shards))
        raise ValueError(
            f"{directory} is not finished: {num_shards - len(own)} of {num_shards} files are missing, the first "
            f"{next(name for name in names if name not in own)}. Give the command that began it again."
        )
    if present != own:
        raise broken(
            directory,
            f"data/ also holds {min(present - own)}",
            f"one file for each of the {num_shards} shards",
            "Remove the file, or move it to where it comes from.",
        )
    paths = [directory / shard_name(index, num_shards) for index in range(num_shards)]
    for index, path in enumerate(paths):
        check_shard(path, min(facts["shard_size"], facts["num_rows"] - index * facts["shard_size"]), facts)
    return paths


def _is_shard(name: str, num_shards: int) -> bool:
    match = re.fullmatch(r"train-(\d+)-of-\d+\.parquet", name)
    return match is not None and int(match[1]) < num_shards and f"data/{name}" == shard_name(int(match[1]), num_shards)


def check_shard(path: Path, num_rows: int, facts: dict[str, Any]) -> None:
    """Refuse a file that cannot be read, or has other rows or columns than the facts say.

    Raises:
        ValueError: names the file, what it has, what was expected and what to do.
    """
    try:
        with parquet.ParquetFile(path) as file:
            found, schema = file.metadata.num_rows, file.schema_arrow
    except Exception as error:  # of many kinds: pyarrow's own, and those of what a file has it load
        if isinstance(error, OSError) and error.errno is not None:  # the system's, who says which file
            raise
        raise ValueError(f"{path} is not a readable Parquet file ({_one_line(error)}). {_SHARD_REMEDY}") from error
    if found != num_rows:
        raise broken(path, f"it has {found} rows", f"{num_rows} by {FACTS_FILE}", _SHARD_REMEDY)
    columns = features_of(facts).arrow_schema
    if sorted(schema.names) != sorted(columns.names):
        raise broken(path, f"its columns are {', '.join(schema.names)}", ", ".join(columns.names), _SHARD_REMEDY)
    for name in columns.names:
        kind, expected = (_storage(of.field(name).type) for of in (schema, columns))
        if kind != expected:
            raise broken(path, f"column {name} is of {kind}", str(expected), _SHARD_REMEDY)


def _storage(kind: pyarrow.DataType) -> pyarrow.DataType:
    return kind.storage_type if isinstance(kind, pyarrow.BaseExtensionType) else kind


def _one_line(error: Exception) -> str:
    return str(error).strip().partition("\n")[0] or type(error).__name__


def rows_by_id(ids: Sequence[str | None], directory: Any, facts: dict[str, Any]) -> dict[str, int]:
    """The row of each id.

    Raises:
        ValueError: an id comes twice, or a row has none; names the files.
    """
    rows: dict[str, int] = {}
    for row, name in enumerate(ids):
        if name is None:
            raise broken(directory, f"row {row} in {_shard_of(row, facts)} has no id", "a text", _SHARD_REMEDY)
        if name in rows:
            places = " and ".join(f"row {each} in {_shard_of(each, facts)}" for each in (rows[name], row))
            raise broken(directory, f"{places} have the same id {name!r}", "an id of its own", _SHARD_REMEDY)
        rows[name] = row
    return rows


def _shard_of(row: int, facts: dict[str, Any]) -> str:
    return shard_name(row // facts["shard_size"], facts["num_shards"])


def count_segments(directory: Path, num_shards: int) -> dict[str, int]:
    """Into how many segments the contexts of a finished store were cut.

    Returns:
        `total`, of all contexts; `most`, of the one that has the most; `contexts`, how many have several.
    """
    counts: list[int] = []
    for index in range(num_shards):
        column = parquet.read_table(directory / shard_name(index, num_shards), columns=["segment_lengths"])
        counts += compute.list_value_length(column["segment_lengths"]).to_pylist()
    return {"total": sum(counts), "most": max(counts), "contexts": sum(count > 1 for count in counts)}


# ------------------------------------------------------------------------------------------------ rows


def read_row(table: pyarrow.Table, row: int, facts: dict[str, Any], where: str) -> GradMemMemory:
    """The memory in a row of a table with the columns of [`features`], in Arrow's types.

    Raises:
        ValueError: a number is missing or out of range, or there are too few or too many; says which.
    """
    values = {name: table[name][row] for name in table.column_names}
    tensors = {
        "embeddings": _vectors(values["embeddings"], facts, where),
        "write_losses": _list(values["write_losses"], "write_losses", where),
        "segment_lengths": _list(values["segment_lengths"], "segment_lengths", where),
        "final_write_loss": _whole(pyarrow.array([values["final_write_loss"]]), "final_write_loss", where),
    }
    check_tensors(tensors, where)
    tokens, recorded = int(tensors["segment_lengths"].sum()), values["num_context_tokens"].as_py()
    if tokens != recorded:
        raise broken(where, f"num_context_tokens is {recorded}", f"{tokens}, the sum of segment_lengths,")
    return GradMemMemory(**tensors, fingerprint=facts["fingerprint"], base_name=facts.get("base_name"))


def _vectors(value: Any, facts: dict[str, Any], where: str) -> Tensor:
    """`(1, num_memory_tokens, hidden_size)`: Arrow's lists may have any lengths."""
    shape = facts["num_memory_tokens"], facts["hidden_size"]
    vectors = value.value.values if value.is_valid else pyarrow.array([], type=pyarrow.list_(pyarrow.float32()))
    widths = vectors.value_lengths().unique().to_pylist()  # null for a vector that is missing
    if len(vectors) != shape[0] or widths != [shape[1]]:
        found = f"{len(vectors)} vectors of width {' and '.join(map(str, widths[:3])) or 0}"
        raise broken(where, f"embeddings are {found}", f"{shape[0]} of width {shape[1]}")
    return _whole(vectors.flatten(), "embeddings", where).reshape(shape)[None]


def _list(value: Any, name: str, where: str) -> Tensor:
    if not value.is_valid:
        raise broken(where, f"{name} is null", "a list")
    return _whole(value.values, name, where)[None]


def _whole(values: pyarrow.Array, name: str, where: str) -> Tensor:
    if values.null_count:
        raise broken(where, f"{name} holds null", "a number")
    return torch.from_numpy(values.to_numpy(zero_copy_only=False).copy())
