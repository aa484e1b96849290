"""A base and a memory for the commands."""

import pytest

from tests.support.command_line import TEXT, run, save_base


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Directory of a tiny random Llama over bytes."""
    directory = tmp_path_factory.mktemp("base")
    save_base(directory, seed=0)
    return str(directory)


@pytest.fixture(scope="module")
def memory(base: str, tmp_path_factory: pytest.TempPathFactory) -> str:
    """Directory of a memory that `write` made, with the plain base's defaults but fewer steps."""
    directory = tmp_path_factory.mktemp("memory")
    result = run("write", TEXT, "--model", base, "--output", directory, "--steps", 3)
    assert result.exit_code == 0, result.output
    return str(directory)
