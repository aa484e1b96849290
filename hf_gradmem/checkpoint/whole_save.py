"""The files of a checkpoint change together: whatever stops a save, its directory loads as the old version or the new.

A save goes into a folder of its own within the directory. The new version takes the place of the old in one moment,
when its config.json is renamed into place: that names the save, hence the folder in which the rest still lies. The rest
is then moved, and whatever opens a directory first moves what a save that was stopped in between has left.
"""

import hashlib
import json
import os
import secrets
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from transformers.utils import CHAT_TEMPLATE_DIR, CONFIG_NAME, GENERATION_CONFIG_NAME

from ..configuration_gradmem import SAVE_ID
from ..files import only_writer, system_errors
from ..hub.client import superseded

_FOLDER = ".saving-"
_LIST = ".files.json"  # in the folder: what belongs to the version, wherever each file lies by now


@contextmanager
def whole_save(directory: str | os.PathLike) -> Iterator[Path]:
    """A folder to save a checkpoint into, whose files take their places in `directory` when the block is done.

    Other files in the directory stay. If the block raises, or the process is killed in it, the directory is as before.

    Raises:
        OSError: the directory cannot be written to, or not all of it.
    """
    directory = Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    with only_writer(directory, wait=True):
        finish_save(directory)
        for left_behind in directory.glob(f"{_FOLDER}*"):  # by a save that was killed
            shutil.rmtree(left_behind, ignore_errors=True)
        folder = directory / f"{_FOLDER}{secrets.token_hex(8)}"
        try:
            with system_errors(directory):
                folder.mkdir()
                yield folder
                folder = _sealed(folder)
            (folder / CONFIG_NAME).replace(directory / CONFIG_NAME)
        except BaseException:
            shutil.rmtree(folder, ignore_errors=True)
            raise
        finish_save(directory)


def check_apart(base: str | os.PathLike | None, directory: str | os.PathLike) -> None:
    """Refuse to save over the base that the files name: neither it nor what is saved could be opened again.

    Raises:
        ValueError: the directory is that of the base.
    """
    if base is not None and Path(base).is_dir() and Path(base).resolve() == Path(directory).resolve():
        raise ValueError(f"{directory} is where the base lies, whose files would be lost. Give another directory.")


def finish_save(directory: str | os.PathLike) -> None:
    """Move into their places the files of a save that has taken effect, if it was stopped before they all were.

    Raises:
        OSError: the directory cannot be written to.
    """
    directory = Path(directory)
    if not any(directory.glob(f"{_FOLDER}*")):
        return
    folder = directory / f"{_FOLDER}{_save_id(directory / CONFIG_NAME)}"
    try:
        names = json.loads((folder / _LIST).read_text(encoding="utf-8"))
    except FileNotFoundError:  # a save that has not taken effect, or that another process has finished
        return
    for name in names:
        (directory / name).parent.mkdir(parents=True, exist_ok=True)
        with suppress(FileNotFoundError):  # it was moved before
            (folder / name).replace(directory / name)
    found = (*directory.iterdir(), *directory.glob(f"{CHAT_TEMPLATE_DIR}/*"))
    there = [path.relative_to(directory).as_posix() for path in found if path.is_file()]
    for name in superseded(there, names) | ({GENERATION_CONFIG_NAME} - set(names)):
        (directory / name).unlink(missing_ok=True)
    (folder / _LIST).unlink(missing_ok=True)
    shutil.rmtree(folder, ignore_errors=True)


def _sealed(folder: Path) -> Path:
    """Name the save by what it holds, in its configuration and in the name of its folder, which is returned."""
    paths = sorted(path for path in folder.rglob("*") if path.is_file())
    mode = (folder / CONFIG_NAME).stat().st_mode
    for path in paths:  # safetensors' own are for their owner alone
        path.chmod(mode)
    names = [path.relative_to(folder).as_posix() for path in paths]
    for name in names:
        if (folder.parent / name).is_dir():
            raise IsADirectoryError(f"{folder.parent / name} is a directory, where a file is to be saved.")
    config = json.loads((folder / CONFIG_NAME).read_text(encoding="utf-8"))
    save_id = config[SAVE_ID] = _hash_of(paths)
    (folder / CONFIG_NAME).write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")
    (folder / _LIST).write_text(json.dumps([name for name in names if name != CONFIG_NAME]), encoding="utf-8")
    return folder.rename(folder.with_name(f"{_FOLDER}{save_id}"))


def _hash_of(paths: list[Path]) -> str:
    whole = hashlib.sha256()
    for path in paths:
        with path.open("rb") as file:
            whole.update(path.name.encode() + hashlib.file_digest(file, "sha256").digest())
    return whole.hexdigest()[:32]


def _save_id(config: Path) -> str | None:
    """The save that a configuration belongs to; none for one that is not there or not JSON, which others refuse."""
    try:
        values = json.loads(config.read_text(encoding="utf-8"))
    except (FileNotFoundError, ValueError):
        return None
    return values.get(SAVE_ID) if isinstance(values, dict) else None
