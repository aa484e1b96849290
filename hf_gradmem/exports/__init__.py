"""Memories in formats that others read: adapters of stock PEFT, and prompt embeddings for serving engines.

Each holds what READ puts before a query, `[r_start; P(M_K); r_end]`, so that the reader needs the base and nothing
else. A format is one file with `save(stock_prefix, directory)`, and one line in [`EXPORTS`].
"""

import os
from collections.abc import Callable

from . import cartridge, prompt_embeds, prompt_tuning
from .export import StockPrefix

# By the names that the command line gives them; each writes into a directory, which is made if it is missing.
EXPORTS: dict[str, Callable[[StockPrefix, str | os.PathLike], None]] = {
    "prompt-tuning": prompt_tuning.save,
    "cartridge": cartridge.save,
    "prompt-embeds": prompt_embeds.save,
}

__all__ = ["EXPORTS", "StockPrefix"]
