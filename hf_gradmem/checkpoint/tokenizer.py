"""Tokenizers, opened in one place."""

import os
from typing import Any

from transformers import AutoTokenizer, PreTrainedTokenizerBase


def open_tokenizer(name_or_path: str | os.PathLike, **arguments: Any) -> PreTrainedTokenizerBase:
    """The tokenizer of a directory or Hub repository; its code is run only if `trust_remote_code` is given as True.

    Args:
        name_or_path: directory or Hub repository.
        arguments: of `AutoTokenizer.from_pretrained`.

    Raises:
        OSError: there is none.
        ValueError: its files are not those of a tokenizer, or it needs code of its repository.
    """
    try:
        return AutoTokenizer.from_pretrained(name_or_path, **{"trust_remote_code": False} | arguments)
    except (OSError, ValueError, ImportError):
        raise
    except Exception as error:  # the library beneath raises plain exceptions, KeyErrors and the like
        raise ValueError(
            f"The tokenizer in {name_or_path} cannot be read ({type(error).__name__}: {error}). Are tokenizer.json and "
            "tokenizer_config.json whole?"
        ) from error
