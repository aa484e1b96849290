"""A memory as prompt embeddings, for serving engines that take them before the prompt."""

import os
from pathlib import Path

from ..files import save_tensors
from .export import StockPrefix

PROMPT_EMBEDS_FILE = "prompt_embeds.safetensors"


def save(prefix: StockPrefix, directory: str | os.PathLike) -> None:
    """Write `prompt_embeds.safetensors` into a directory, which is made if it is missing."""
    save_file(prefix, Path(directory) / PROMPT_EMBEDS_FILE)


def save_file(prefix: StockPrefix, file: str | os.PathLike) -> None:
    """Write a safetensors file with one tensor, `prompt_embeds`, and the base's name in its header."""
    header = {"format": "pt", "base_model_name_or_path": str(prefix.base_model_name_or_path)}
    if prefix.base_model_revision is not None:
        header["base_model_revision"] = prefix.base_model_revision
    save_tensors({"prompt_embeds": prefix.vectors}, file, header)
