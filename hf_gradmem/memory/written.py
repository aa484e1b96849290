"""A written memory: a value that can be sliced, joined, saved and shared."""

import json
import os
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import MISSING, dataclass, fields, replace
from numbers import Integral
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import CommitInfo, ModelCard, hf_hub_download
from huggingface_hub.errors import HFValidationError
from safetensors import SafetensorError, safe_open
from torch.nn import functional

from ..files import save_tensors
from ..hub.client import CARD_FILE, MEMORY_FILE, prepare_repository, push_files, remote_card
from ..hub.errors import one_line_errors
from .card import is_memory_card, memory_card
from .checks import broken, check_tensors

_FORMAT = "gradmem-memory"
_FORMAT_VERSION = "2"
_READABLE_VERSIONS = ("1", _FORMAT_VERSION)  # "1" has a fingerprint of another kind, and no name beside it
_SHOWN_CHARACTERS = 100  # of what a file says wrongly
Tensor = torch.Tensor


@dataclass(eq=False, repr=False)
class GradMemMemory:
    """Contexts as WRITE left them. Indexing gives a memory again; a single index gives a batch of one.

    `==` answers with a bool, on whatever devices the two are: whether all tensors and the fingerprint are equal. As a
    value that can be changed a memory has no hash: keep memories by a name in a dict, not in a set.

    Attributes:
        embeddings (`torch.Tensor` of shape `(batch, num_memory_tokens, hidden_size)`):
            M_K, before the memory projection. Float32, or float64 on a float64 base.
        write_losses (`torch.Tensor` of shape `(batch, steps)`):
            Reconstruction loss before each step, in nats per token; NaN once a sample had stopped.
        segment_lengths (`torch.Tensor` of shape `(batch, segments)`):
            Tokens in each segment written, 0 where a sample has fewer segments. One segment is a whole context.
        final_write_loss (`torch.Tensor` of shape `(batch,)`, *optional*):
            Loss after the last step, if it was measured.
        fingerprint (`str`, *optional*):
            Of what wrote the memory, by content: the base's weights and what WRITE uses beside them. Models with the
            same fingerprint read it. `None` while a training step is still differentiating through it.
        base_name (`str`, *optional*):
            The base's name for people to read; nothing depends on it.
    """

    embeddings: Tensor
    write_losses: Tensor
    segment_lengths: Tensor
    final_write_loss: Tensor | None = None
    fingerprint: str | None = None
    base_name: str | None = None

    @property
    def num_context_tokens(self) -> Tensor:
        """Tokens written into each memory, `(batch,)`."""
        return self.segment_lengths.sum(1)

    @property
    def is_segmented(self) -> Tensor:
        """Whether each memory was written in more than one piece, `(batch,)`."""
        return (self.segment_lengths > 0).sum(1) > 1

    @property
    def shape(self) -> torch.Size:
        """That of `embeddings`, `(batch, num_memory_tokens, hidden_size)`."""
        return self.embeddings.shape

    def __repr__(self) -> str:
        count, num_memory_tokens, width = self.shape
        lengths = self.num_context_tokens
        tokens = "" if lengths.is_meta or not count else f", from {_range(lengths)} tokens"
        name = f" on {self.base_name}" if self.base_name else ""
        where = f"{str(self.embeddings.dtype).removeprefix('torch.')} on {self.embeddings.device}"
        return (
            f"GradMemMemory({count} context{'s' * (count != 1)}{tokens}, each in {num_memory_tokens} positions of "
            f"width {width}, {where}, written by {self.fingerprint}{name})"
        )

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, GradMemMemory):
            return NotImplemented
        ours, theirs = self.tensors, other.tensors
        return (
            self.fingerprint == other.fingerprint
            and ours.keys() == theirs.keys()
            and all(_equal(ours[name], theirs[name]) for name in ours)
        )

    __hash__ = None  # type: ignore[assignment] # it can be changed

    def __len__(self) -> int:
        return self.embeddings.shape[0]

    def __getitem__(self, index: int | slice | Sequence[int] | Tensor) -> "GradMemMemory":
        rows = index if isinstance(index, slice) else _numbers_of(index, len(self))
        return self._map(lambda tensor: tensor[rows])

    def to(self, device: torch.device | str) -> "GradMemMemory":
        """The same memory on another device. Its precision is the writing model's and stays."""
        if isinstance(device, torch.dtype):
            raise TypeError(f"A memory keeps the precision it was written in, got {device}. Give a device.")
        device = torch.device(device)
        return self._map(lambda tensor: tensor.to(device))

    def cpu(self) -> "GradMemMemory":
        """The same memory in the working memory of the CPU."""
        return self.to("cpu")

    def relabelled(self, fingerprint: str | None) -> "GradMemMemory":
        """The same memory under another fingerprint: on your word that the model which has it reads these numbers.

        For weights that differ and are known to do the same, such as a base in float16 or a quantised copy of it, and
        for files that were saved before a fingerprint was a hash of the writer.

        Args:
            fingerprint: `model.fingerprint()` of the model that is to read it.
        """
        return replace(self, fingerprint=fingerprint)

    def _map(self, function: Callable[[Tensor], Tensor]) -> "GradMemMemory":
        mapped: dict[str, Any] = {name: function(tensor) for name, tensor in self.tensors.items()}
        return replace(self, **mapped)

    @property
    def tensors(self) -> dict[str, Tensor]:
        """Its tensors by name, without a loss after the last step where none was measured."""
        values = {
            "embeddings": self.embeddings,
            "write_losses": self.write_losses,
            "segment_lengths": self.segment_lengths,
            "final_write_loss": self.final_write_loss,
        }
        return {name: tensor for name, tensor in values.items() if tensor is not None}

    @classmethod
    def cat(cls, memories: Sequence["GradMemMemory"], *, keep_measured: bool = False) -> "GradMemMemory":
        """Join memories along the batch.

        Args:
            memories: of one model.
            keep_measured: where the loss after the last step was measured for some of them alone, keep it for these,
                with NaN for the others. Such a memory cannot be saved. Otherwise there is none for any of them.

        Raises:
            ValueError: none are given, or they belong to different models or differ in shape.
        """
        memories = list(memories)
        if not memories:
            raise ValueError("GradMemMemory.cat needs at least one memory, got none.")
        for memory in memories:
            if not isinstance(memory, GradMemMemory):
                raise TypeError(f"GradMemMemory.cat joins memories, got {memory!r}.")
        for name, facts in (
            ("fingerprints", {memory.fingerprint for memory in memories}),
            ("shapes (num_memory_tokens, hidden_size)", {tuple(memory.embeddings.shape[1:]) for memory in memories}),
        ):
            if len(facts) > 1:
                raise ValueError(f"Memories with different {name} cannot be joined: {sorted(map(str, facts))}.")
        final = [memory.final_write_loss for memory in memories]
        if keep_measured and any(loss is not None for loss in final):
            unknown = [memory.embeddings.new_full((len(memory),), torch.nan) for memory in memories]
            final = [none if loss is None else loss for loss, none in zip(final, unknown, strict=True)]
        measured = [loss for loss in final if loss is not None]
        return cls(
            embeddings=torch.cat([memory.embeddings for memory in memories]),
            write_losses=_cat_ragged([memory.write_losses for memory in memories], torch.nan),
            segment_lengths=_cat_ragged([memory.segment_lengths for memory in memories], 0),
            final_write_loss=torch.cat(measured) if len(measured) == len(memories) else None,
            fingerprint=memories[0].fingerprint,
            base_name=memories[0].base_name,
        )

    @classmethod
    def side_by_side(cls, memories: Sequence["GradMemMemory"]) -> "GradMemMemory":
        """Several memories as one that is read as a whole: their positions in this order, one behind the other.

        Only READ takes such a memory, `(batch, memories · num_memory_tokens, hidden_size)`. Its losses are those of the
        memories, step by step and after the last one, each the mean over the memories.

        Args:
            memories: as many contexts in each.

        Raises:
            TypeError: one is no memory.
            ValueError: none are given, or they are of different models, or of different numbers of contexts.
        """
        memories = list(memories)
        for memory in memories:
            if not isinstance(memory, cls):
                raise TypeError(
                    f"memory must be a GradMemMemory, or a list of them, got a {type(memory).__name__} in it."
                )
        if len({len(memory) for memory in memories}) > 1:
            raise ValueError(
                f"Memories that are read together need as many contexts each, got {[len(each) for each in memories]}."
            )
        joined, count = cls.cat(memories), len(memories)

        def mean(values: Tensor) -> Tensor:
            return values.unflatten(0, (count, -1)).nanmean(0)

        parts = torch.stack([memory.embeddings for memory in memories], dim=1)
        final = joined.final_write_loss
        return replace(
            joined,
            embeddings=parts.flatten(1, 2),
            write_losses=mean(joined.write_losses),
            segment_lengths=joined.segment_lengths.unflatten(0, (count, -1)).transpose(0, 1).flatten(1),
            final_write_loss=None if final is None else mean(final),
        )

    def save_pretrained(self, save_directory: str | os.PathLike) -> None:
        """Write `memory.safetensors`, the tensors with the facts in its header, into a directory.

        Raises:
            OSError: the file cannot be written there.
            ValueError: it could not be read again: shapes that do not match, or numbers that are not finite.
        """
        check_tensors(self.tensors, "The memory to save")
        facts = {name: json.dumps(getattr(self, name)) for name in ("fingerprint", "base_name")}
        header = {"format": _FORMAT, "format_version": _FORMAT_VERSION} | facts
        save_tensors(self.tensors, Path(save_directory) / MEMORY_FILE, header)

    @classmethod
    def from_pretrained(
        cls,
        name_or_path: str | os.PathLike,
        *,
        revision: str | None = None,
        token: str | bool | None = None,
        cache_dir: str | os.PathLike | None = None,
        local_files_only: bool = False,
    ) -> "GradMemMemory":
        """Load a memory from a directory, its file, or a Hub repository.

        Args:
            name_or_path: the directory, file or repository.
            revision, token, cache_dir, local_files_only: of a Hub repository, as in `huggingface_hub.hf_hub_download`.

        Raises:
            OSError: there is no such directory or repository, it holds no memory, or the Hub refused or is out of
                reach; one line says which.
            ValueError: the file is truncated, is not a memory, or holds what no memory can: one line names the file,
                the value, what was expected and what to do.
        """
        path = Path(name_or_path)
        if path.is_dir():
            path = path / MEMORY_FILE
            if not path.is_file():
                raise FileNotFoundError(f"{path.parent} holds no memory: {MEMORY_FILE} is missing.")
        elif not path.is_file():
            try:
                with one_line_errors(name_or_path, revision):
                    path = Path(
                        hf_hub_download(
                            str(name_or_path),
                            MEMORY_FILE,
                            revision=revision,
                            token=token,
                            cache_dir=None if cache_dir is None else os.fspath(cache_dir),
                            local_files_only=local_files_only,
                        )
                    )
            except HFValidationError as error:
                raise FileNotFoundError(
                    f"There is no directory or file {str(name_or_path)!r}, nor can it be a Hub repository: {error}"
                ) from error
        return cls._load(path)

    @classmethod
    def _load(cls, path: Path) -> "GradMemMemory":
        try:
            with safe_open(path, framework="pt") as file:
                header = file.metadata() or {}
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  # not a dict
        except SafetensorError as error:
            raise ValueError(f"{path} is not a readable safetensors file ({error}). Was it copied whole?") from error
        if header.get("format") != _FORMAT or header.get("format_version") not in _READABLE_VERSIONS:
            raise ValueError(
                f"{path} is not a memory of format {_FORMAT} {_FORMAT_VERSION}: its header says {header or 'nothing'}."
            )
        known = {field.name: field.default for field in fields(cls) if field.name not in ("fingerprint", "base_name")}
        missing = [name for name, default in known.items() if default is MISSING and name not in tensors]
        unknown = sorted(tensors.keys() - known.keys())
        if missing or unknown or "fingerprint" not in header:
            missing += [] if "fingerprint" in header else ["the fingerprint in its header"]
            raise ValueError(
                f"{path} is not a whole memory: it lacks {', '.join(missing) or 'nothing'} and has "
                f"{', '.join(unknown) or 'nothing'} too many."
            )
        check_tensors(tensors, path)
        facts = {name: _text_or_null(path, name, header.get(name, "null")) for name in ("fingerprint", "base_name")}
        return cls(**tensors, fingerprint=facts["fingerprint"], base_name=facts["base_name"])

    def push_to_hub(
        self,
        repo_id: str,
        *,
        private: bool | None = None,
        token: str | bool | None = None,
        commit_message: str = "Upload GradMem memory",
        revision: str | None = None,
        create_pr: bool = False,
    ) -> CommitInfo:
        """Upload the memory, and a card if the repository has none, in one commit.

        Args:
            repo_id: a Hub model repository, made if it is missing; in the user's namespace if it names none.
            private: whether a repository that is made is private.
            token, commit_message, revision, create_pr: as in `huggingface_hub.HfApi.create_commit`; a branch that is
                missing is made.

        Raises:
            OSError: the Hub refused or is out of reach; one line says which.
        """
        repo_id = prepare_repository(repo_id, revision=revision, private=private, token=token)
        with tempfile.TemporaryDirectory() as directory:
            self.save_pretrained(directory)
            files: dict[str, Path | bytes] = {MEMORY_FILE: Path(directory) / MEMORY_FILE}
            card = remote_card(repo_id, revision=revision, token=token)
            if card is None or is_memory_card(card):
                files[CARD_FILE] = str(self._card(repo_id)).encode()
            return push_files(
                files, repo_id, token=token, commit_message=commit_message, revision=revision, create_pr=create_pr
            )

    def _card(self, repo_id: str) -> ModelCard:
        num_bytes = self.embeddings.numel() * self.embeddings.element_size()
        lengths = self.num_context_tokens.tolist()
        return memory_card(self.embeddings.shape, num_bytes, lengths, self.fingerprint, self.base_name, repo_id)


def _equal(one: Tensor, other: Tensor) -> bool:
    """Whether two tensors are the same numbers in the same precision; a number that is missing, NaN, equals another."""
    if one.dtype != other.dtype or one.shape != other.shape or one.is_meta or other.is_meta:
        return one is other
    return torch.allclose(one.detach().cpu(), other.detach().cpu(), rtol=0, atol=0, equal_nan=True)


def _numbers_of(index: Any, count: int) -> list[int]:
    """The numbers of contexts that are meant by one, by several, or by true and false for each of `count` contexts."""
    listed = index.tolist() if hasattr(index, "tolist") else index  # of PyTorch or NumPy
    several = isinstance(listed, Sequence) and not isinstance(listed, str)
    values = [value.item() if hasattr(value, "item") else value for value in (listed if several else [listed])]
    if several and len(values) == count and all(isinstance(value, bool) for value in values):
        return [number for number, chosen in enumerate(values) if chosen]
    for value in values:
        if isinstance(value, bool) or not isinstance(value, Integral):
            raise TypeError(f"A memory is indexed by the numbers of contexts: one, a slice, or a list; got {index!r}.")
        if not -count <= int(value) < count:
            raise IndexError(f"index {value} is out of range for a memory of {count} contexts")
    return [int(value) for value in values]


def _range(numbers: Tensor) -> str:
    smallest, largest = int(numbers.min()), int(numbers.max())
    return f"{smallest}" if smallest == largest else f"{smallest} to {largest}"


def _text_or_null(path: Path, name: str, written: str) -> str | None:
    """A fact of the header."""
    try:
        fact = json.loads(written)
    except (ValueError, RecursionError):  # the latter for brackets within brackets by the thousand
        fact = ...
    if not (fact is None or isinstance(fact, str)):
        raise broken(path, f"{name} in its header is {written[:_SHOWN_CHARACTERS]}", 'a "text" or null')
    return fact


def _cat_ragged(tensors: list[Tensor], fill: float) -> Tensor:
    """Join `(rows, columns)` tensors, filling the narrower ones on the right."""
    width = max(tensor.shape[1] for tensor in tensors)
    return torch.cat([functional.pad(tensor, (0, width - tensor.shape[1]), value=fill) for tensor in tensors])


Memories = GradMemMemory | list[GradMemMemory] | tuple[GradMemMemory, ...]
"""What is read: a memory, or a list of memories that are read together, side by side."""

__all__ = ["GradMemMemory", "Memories"]
