"""Opening models and memories by name: quickly and quietly when there is no network."""

import functools
import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from huggingface_hub import constants, get_session
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedConfig

from .configuration_gradmem import GradMemConfig
from .hub import HubError, one_line_errors
from .memory import MEMORY_FILE, GradMemMemory
from .modeling_gradmem import GradMemForCausalLM, get_gradmem_model

if TYPE_CHECKING:
    from .memory_store import MemoryStore

# What writes a short text verbatim into a base that was never trained for it. The paper's two steps of SGD at 0.4 are
# for a trained adapter.
PLAIN_BASE_OPTIONS = {
    "num_memory_tokens": 8,
    "write_optimizer": "adam",
    "write_learning_rate": 0.02,
    "write_steps": 200,
}
# Nats per token: a text of some fifty tokens is then decoded verbatim.
PLAIN_BASE_TOLERANCE = 0.03
_HUB_TIMEOUT = 3.0  # seconds


def is_adapter(name: str) -> bool:
    """Whether a directory or Hub repository holds a GradMem model; otherwise it is a base alone.

    Raises:
        OSError: there is no such model.
    """
    return _load_config(name).model_type == GradMemConfig.model_type


def load_model(
    name: str, plain_base_options: dict[str, object] | None = None, *, seed: int = 0, device: str = "auto"
) -> GradMemForCausalLM:
    """Load an adapter with its base, or a base alone, which is then given an untrained memory.

    Args:
        name: directory or Hub repository of an adapter or of any decoder.
        plain_base_options: options of [`GradMemConfig`] for a base alone, over [`PLAIN_BASE_OPTIONS`]; an adapter has
            its own.
        seed: of the random start that the memory of a base alone is written from.
        device: `"auto"` is a CUDA device where there is one.

    Raises:
        OSError: there is no such model.
        TypeError: it is not a decoder that takes memory vectors.
        ValueError: an option is out of range, or there is no such device.
    """
    place = _checked_device(device)
    config = _load_config(name)
    if config.model_type == GradMemConfig.model_type:
        with _hub_span(name), _hub_span(config.base_model_name_or_path):
            model = GradMemForCausalLM.from_pretrained(_expanded(name))
            model.tokenizer  # noqa: B018  # fetched with the base, not at its first use
        return model.to(place)
    with _hub_span(name):
        tokenizer = AutoTokenizer.from_pretrained(_expanded(name))
        base_model = AutoModelForCausalLM.from_pretrained(_expanded(name))
    options = PLAIN_BASE_OPTIONS | (plain_base_options or {})
    torch.manual_seed(seed)
    return get_gradmem_model(base_model, GradMemConfig(**options), tokenizer=tokenizer).to(place)


def load_reader(name: str, memory: GradMemMemory, *, device: str = "auto") -> GradMemForCausalLM:
    """Load the model that reads `memory`. Of what a base alone was given to write it, READ needs only the size."""
    return load_model(name, {"num_memory_tokens": memory.embeddings.shape[1]}, device=device)


def load_memory(name: str) -> GradMemMemory:
    """Load a memory from a directory, its file, or a Hub repository.

    Raises:
        OSError: there is none.
        ValueError: the file is not a memory.
    """
    _check_name(name, MEMORY_FILE, "memory")
    with _hub_span(name):
        return GradMemMemory.from_pretrained(_expanded(name))


def check_hub() -> None:
    """Refuse at once what needs the Hub while it is out of reach.

    Raises:
        HubError: it is.
    """
    if not hub_is_reachable():
        state = "is switched off by HF_HUB_OFFLINE" if constants.HF_HUB_OFFLINE else "cannot be reached"
        raise HubError(f"The Hub ({constants.ENDPOINT}) {state}.")


def load_store(name: str) -> "MemoryStore":
    """Open many memories: a directory that `write-dataset` wrote, or a data set on the Hub.

    Raises:
        OSError: there is none.
        ValueError: it is not finished, or holds something else.
    """
    from .memory_store import FACTS_FILE, MemoryStore

    _check_name(name, FACTS_FILE, "memories by id")
    with _hub_span(name):
        return MemoryStore.from_pretrained(_expanded(name))


def hub_is_reachable() -> bool:
    """Whether the Hub answers within a few seconds; it is not asked where offline mode is set."""
    return not constants.HF_HUB_OFFLINE and _answers(constants.ENDPOINT)


@functools.cache
def _answers(endpoint: str) -> bool:
    answered = threading.Event()

    def ask() -> None:
        try:
            get_session().head(endpoint, timeout=_HUB_TIMEOUT)
        except Exception:  # whatever the network does, the answer is no
            return
        answered.set()

    # In a thread, since no time-out covers a name server that does not answer.
    thread = threading.Thread(target=ask, daemon=True)
    thread.start()
    thread.join(_HUB_TIMEOUT)
    return answered.is_set()


@contextmanager
def _hub_span(name: str | None) -> Iterator[None]:
    """Load `name` from the local cache alone where the Hub is out of reach; its client would retry for half a minute.

    Raises:
        FileNotFoundError: it is not in the cache either.
        HubError: the Hub refused.
    """
    if name is None or os.path.exists(_expanded(name)):
        yield
        return
    if hub_is_reachable():
        with one_line_errors(name):
            yield
        return
    before, constants.HF_HUB_OFFLINE = constants.HF_HUB_OFFLINE, True
    try:
        yield
    except OSError as error:
        hub = f"the Hugging Face Hub ({constants.ENDPOINT})"
        raise FileNotFoundError(
            f"There is no directory {name!r} and no complete copy of a repository of that name in the local Hub cache, "
            f"and {hub} " + ("is switched off by HF_HUB_OFFLINE." if before else "cannot be reached.")
        ) from error
    finally:
        constants.HF_HUB_OFFLINE = before


def _load_config(name: str) -> PreTrainedConfig:
    _check_name(name, "config.json", "model")
    with _hub_span(name):
        return AutoConfig.from_pretrained(_expanded(name))


def _check_name(name: str, needed_file: str, kind: str) -> None:
    """Refuse what can be neither a directory (or file) of this kind nor a Hub repository."""
    path = Path(_expanded(name))
    if path.is_dir() and not (path / needed_file).is_file():
        raise FileNotFoundError(f"{name} holds no {kind}: {needed_file} is missing.")
    if not path.exists() and (name.startswith((".", "~", os.sep)) or name.count("/") > 1):
        raise FileNotFoundError(f"There is no directory {name!r}.")


def _expanded(name: str) -> str:
    return os.path.expanduser(name)


def _checked_device(device: str) -> torch.device:
    """The device by its name, if this machine has it: asked before minutes go into loading."""
    if device == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        return torch.empty(0, device=device).device
    except (AssertionError, RuntimeError) as error:  # torch raises either, with a stack for a message
        raise ValueError(f"There is no device {device!r} here: {str(error).splitlines()[0]}") from error
