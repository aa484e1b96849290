"""Commands run in this process or in one of their own, on a tiny base over bytes."""

import os
import subprocess
import sys
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast
from typer.testing import CliRunner, Result

from hf_gradmem_cli import app
from tests.support.small_models import small_llama

TEXT = "Gate 7 opens at 06:45."


def save_base(directory: Path, seed: int) -> None:
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    bytes_only = Tokenizer(models.BPE(vocab={symbol: index for index, symbol in enumerate(alphabet)}, merges=[]))
    bytes_only.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    bytes_only.decoder = decoders.ByteLevel()
    PreTrainedTokenizerFast(tokenizer_object=bytes_only).save_pretrained(directory)
    torch.manual_seed(seed)
    small_llama(256, num_key_value_heads=2, max_position_embeddings=256).save_pretrained(directory)


def run(*arguments: object, stdin: str | bytes | None = None, env: dict[str, str | None] | None = None) -> Result:
    return CliRunner().invoke(app, [str(argument) for argument in arguments], input=stdin, env=env)


def run_process(*arguments: object, stdin: str = "", **environment: str) -> subprocess.CompletedProcess:
    command = [sys.executable, "-m", "hf_gradmem_cli", *map(str, arguments)]
    return subprocess.run(
        command, input=stdin, capture_output=True, text=True, env=os.environ | environment, check=False
    )


def mistake(result: Result) -> str:
    """The message of a mistake: exit code 2, one line on stderr, nothing on stdout."""
    assert result.exit_code == 2, result.output
    assert result.stdout == ""
    (line,) = result.stderr.splitlines()
    return line
