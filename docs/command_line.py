"""The page of the command line, from its own help."""

import re

import typer.cli
from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from typer.testing import CliRunner


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the page before the others are looked at."""
    arguments = ["hf_gradmem_cli", "utils", "docs", "--name", "hf-gradmem", "--title", "Command line"]
    result = CliRunner().invoke(typer.cli.app, arguments)
    if result.exit_code:
        raise RuntimeError(f"The help of hf-gradmem cannot be written: {result.output}")
    page = re.sub(r"\[cyan\](.*?)\[/\]", r"`\1`", result.stdout)  # colours of the terminal's help
    files.append(File.generated(config, "cli.md", content=page))
    return files
