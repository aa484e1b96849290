"""Opening models and memories by name: from the local cache where that suffices, else from the Hub."""

import os
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from huggingface_hub import constants
from safetensors import SafetensorError
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.utils import CONFIG_NAME

from ..base.precision import FASTEST, fastest_dtype
from ..checkpoint.base_model import adapter_dtype
from ..checkpoint.tokenizer import open_tokenizer
from ..configuration_gradmem import GradMemConfig
from ..hub.client import CARD_FILE, FACTS_FILE, MEMORY_FILE, hub_is_reachable
from ..hub.errors import one_line_errors
from ..memory.written import GradMemMemory
from ..modeling_gradmem import GradMemForCausalLM, get_gradmem_model
from .packaged import find_demo_model, needs_copy, packaged_adapter

if TYPE_CHECKING:
    from ..memory.store import MemoryStore

# What writes a short text verbatim into a base that was never trained for it. The paper's two steps of SGD at 0.4 are
# for a trained adapter.
PLAIN_BASE_OPTIONS: dict[str, Any] = {
    "num_memory_tokens": 8,
    "write_optimizer": "adam",
    "write_learning_rate": 0.05,
    "write_steps": 200,
}
# Nats per token: a text of some fifty tokens is then decoded verbatim.
PLAIN_BASE_TOLERANCE = 0.03
_Loaded = TypeVar("_Loaded")


def is_adapter(name: str, *, revision: str | None = None, trust_remote_code: bool = False) -> bool:
    """Whether a directory or Hub repository holds a GradMem model; otherwise it is a base alone.

    Raises:
        OSError: there is no such model.
    """
    return _load_config(name, revision, trust_remote_code).model_type == GradMemConfig.model_type


def checkpoint_files(names: Iterable[str]) -> Iterator[Path]:
    """Configuration, card and weights of those models that are named by their directories."""
    for directory in filter(Path.is_dir, map(Path, names)):
        yield from (directory / CONFIG_NAME, directory / CARD_FILE, *directory.glob("*.safetensors"))


def load_model(
    name: str,
    plain_base_options: dict[str, Any] | None = None,
    *,
    revision: str | None = None,
    seed: int = 0,
    device: str = "auto",
    dtype: str | None = None,
    trust_remote_code: bool = False,
) -> GradMemForCausalLM:
    """Load an adapter with its base, or a base alone, which is then given an untrained memory.

    What the local Hub cache holds is taken from there, and the Hub is not asked whether it has changed since. A base
    that comes in float32 or bfloat16 and was not trained with its adapter is loaded in whichever of them this device
    computes faster in; a memory and its steps are float32 in any case.

    Args:
        name: directory or Hub repository of an adapter or of any decoder, or the name of an adapter of this package.
        plain_base_options: options of [`GradMemConfig`] for a base alone, [`PLAIN_BASE_OPTIONS`] when `None`; an
            adapter has its own.
        revision: branch, tag or commit of the repository.
        seed: of the random start that the memory of a base alone is written from.
        device: `"auto"` is a CUDA device where there is one.
        dtype: precision of the base, as a recipe's `base_dtype`; `"fastest"` when `None`.
        trust_remote_code: whether code of the repository may be run. Nobody is asked.

    Raises:
        OSError: there is no such model.
        TypeError: it is not a decoder that takes memory vectors.
        ValueError: an option is out of range, there is no such device, or the model needs code of its repository.
    """
    place = _checked_device(device)
    config = _load_config(name, revision, trust_remote_code)
    code: dict[str, Any] = {"revision": revision, "trust_remote_code": trust_remote_code}
    if isinstance(config, GradMemConfig):
        packaged = needs_copy(_expanded(name), config)
        model = _load_packaged(name, place, dtype) if packaged else _load_adapter(name, config, place, dtype, **code)
        return model.to(place)  # type: ignore[arg-type] # Transformers wraps it, and its types are lost
    precision = _precision(dtype, config, place)
    base_model, tokenizer = _from_cache_or_hub(name, revision, lambda: _load_base(name, precision, **code))
    options = PLAIN_BASE_OPTIONS if plain_base_options is None else plain_base_options
    torch.manual_seed(seed)
    config = GradMemConfig(base_model_revision=revision, **options)
    model = get_gradmem_model(base_model, config, tokenizer=tokenizer)
    return model.to(place)  # type: ignore[arg-type] # likewise


def _precision(asked: str | None, config: PreTrainedConfig, place: torch.device) -> torch.dtype | str:
    if asked not in (None, FASTEST):
        return getattr(torch, asked)
    return adapter_dtype(config, place) if isinstance(config, GradMemConfig) else fastest_dtype(config, place)


def _load_adapter(
    name: str, config: GradMemConfig, place: torch.device, dtype: str | None, **code: Any
) -> GradMemForCausalLM:
    # An adapter in a directory may name a base on the Hub.
    here = _is_here(name)
    fetched = config.base_model_name_or_path if here else name
    at = config.base_model_revision if here else code["revision"]
    precision = _precision(dtype, config, place)

    def load() -> GradMemForCausalLM:
        model = GradMemForCausalLM.from_pretrained(_expanded(name), dtype=precision, **code)
        model.tokenizer = model.tokenizer  # fetched now, with the base, and not at its first use
        return model

    return _from_cache_or_hub(fetched, at, load)


def _load_packaged(name: str, place: torch.device, dtype: str | None) -> GradMemForCausalLM:
    """On the copy of the base that it was trained on, where that is at hand, as for the demo: it needs no network."""
    copy = find_demo_model()
    base_model, tokenizer = _load_base(copy, _precision(dtype, _load_config(copy, None, False), place))
    return get_gradmem_model(base_model, _expanded(name), tokenizer=tokenizer)


def _load_base(name: str, dtype: torch.dtype | str, **code: Any) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    try:
        base_model = AutoModelForCausalLM.from_pretrained(_expanded(name), dtype=dtype, **code)
    except SafetensorError as error:
        raise ValueError(
            f"The weights of {name} are no readable safetensors file ({error}). Were they copied whole?"
        ) from error
    return base_model, open_tokenizer(_expanded(name), **code)


def load_reader(
    name: str,
    memory: GradMemMemory | None,
    *,
    revision: str | None = None,
    seed: int = 0,
    device: str = "auto",
    trust_remote_code: bool = False,
) -> GradMemForCausalLM:
    """Load the model that reads `memory`, if there is one; a base alone is given the size and the start that wrote it.

    Args:
        seed: that the base alone wrote the memory with.
        name, revision, device, trust_remote_code: as in [`load_model`].
    """
    size = {} if memory is None else {"num_memory_tokens": memory.embeddings.shape[1]}
    options = PLAIN_BASE_OPTIONS | size
    return load_model(name, options, revision=revision, seed=seed, device=device, trust_remote_code=trust_remote_code)


def load_memory(name: str, *, revision: str | None = None) -> GradMemMemory:
    """Load a memory from a directory, its file, or a Hub repository.

    Raises:
        OSError: there is none.
        ValueError: the file is not a memory.
    """
    _check_name(name, MEMORY_FILE, "memory", revision)
    return _from_cache_or_hub(name, revision, lambda: GradMemMemory.from_pretrained(_expanded(name), revision=revision))


def load_store(name: str, *, revision: str | None = None) -> "MemoryStore":
    """Open many memories: a directory that `write-dataset` wrote, or a data set on the Hub.

    Raises:
        OSError: there is none.
        ValueError: it is not finished, or holds something else.
    """
    from ..memory.silence import without_progress_bars
    from ..memory.store import MemoryStore

    _check_name(name, FACTS_FILE, "memories by id", revision)
    with without_progress_bars():  # of the copy that `datasets` makes at the first opening
        return _from_cache_or_hub(
            name, revision, lambda: MemoryStore.from_pretrained(_expanded(name), revision=revision)
        )


def _from_cache_or_hub(name: str | None, revision: str | None, load: Callable[[], _Loaded]) -> _Loaded:
    """Call `load` with the local cache alone, then, unless that sufficed, with the Hub.

    Out of reach, the Hub is not asked at all: its client would retry for half a minute.

    Raises:
        FileNotFoundError: it is not in the cache, and the Hub is out of reach.
        HubError: the Hub refused.
    """
    if name is None or _is_here(name):
        return load()
    switched_off = constants.HF_HUB_OFFLINE
    try:
        with _offline():
            return load()
    except (OSError, ValueError) as error:
        if hub_is_reachable():
            with one_line_errors(name, revision):
                return load()
        if isinstance(error, ValueError):
            raise
        hub = f"the Hugging Face Hub ({constants.ENDPOINT})"
        raise FileNotFoundError(
            f"There is no directory {name!r} and no complete copy of a repository of that name in the local Hub cache, "
            f"and {hub} " + ("is switched off by HF_HUB_OFFLINE." if switched_off else "cannot be reached.")
        ) from error


def _is_here(name: str) -> bool:
    return os.path.exists(_expanded(name))


@contextmanager
def _offline() -> Iterator[None]:
    before, constants.HF_HUB_OFFLINE = constants.HF_HUB_OFFLINE, True
    try:
        yield
    finally:
        constants.HF_HUB_OFFLINE = before


def _load_config(name: str, revision: str | None, trusted: bool) -> PreTrainedConfig:
    _check_name(name, "config.json", "model", revision)

    def load() -> PreTrainedConfig:
        return AutoConfig.from_pretrained(_expanded(name), revision=revision, trust_remote_code=trusted)

    return _from_cache_or_hub(name, revision, load)


def _check_name(name: str, needed_file: str, kind: str, revision: str | None) -> None:
    """Refuse what can be neither a directory (or file) of this kind nor a Hub repository, which alone has revisions."""
    if not name:
        raise ValueError(f"The name of the {kind} is empty.")
    path = Path(_expanded(name))
    if revision is not None and path.exists():
        raise ValueError(f"{name} lies here and has no revision {revision!r}: leave it out.")
    if path.is_dir() and not (path / needed_file).is_file():
        raise FileNotFoundError(f"{name} holds no {kind}: {needed_file} is missing.")
    if not path.exists() and (name.startswith((".", "~", os.sep)) or name.count("/") > 1):
        raise FileNotFoundError(f"There is no directory {name!r}.")


def _expanded(name: str) -> str:
    return str(packaged_adapter(name) or os.path.expanduser(name))


def _checked_device(device: str) -> torch.device:
    """The device by its name, if this machine has it: asked before minutes go into loading."""
    if device == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        return torch.empty(0, device=device).device
    except (AssertionError, RuntimeError) as error:  # torch raises either, with a stack for a message
        raise ValueError(f"There is no device {device!r} here: {str(error).splitlines()[0]}") from error
