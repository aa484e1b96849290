"""A save over an older version: whatever stops it, the directory loads as the old version or as the new one."""

import errno
import itertools
import json
import os
import random
import resource
import shutil
import signal
import subprocess
import time
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from transformers import AutoModel

from hf_gradmem import GradMemMemory
from hf_gradmem.files import system_errors
from tests.support.small_models import PLAIN, named_base, small_tokenizer, with_memory
from tests.support.versions import save_version, versions

KINDS = ["adapter", "full"]
_RENAME, _REPLACE, _UNLINK = Path.rename, Path.replace, Path.unlink


class Killed(BaseException):
    """In place of a signal: nothing that the package catches and survives."""


def contents(directory: Path) -> dict[str, bytes]:
    return {str(path.relative_to(directory)): path.read_bytes() for path in directory.rglob("*") if path.is_file()}


@contextmanager
def killed_before_change(number: int, monkeypatch):
    """The process ends before it moves or removes a file for the so many-th time, and cleans nothing up."""
    left = [number]

    def moving(move):
        def moved(path, *arguments, **options):
            if path.parent.name == "model" or path.parent.name.startswith(".saving-"):
                left[0] -= 1
                if left[0] < 0:
                    raise Killed
            return move(path, *arguments, **options)

        return moved

    with monkeypatch.context() as patched:
        patched.setattr(Path, "rename", moving(_RENAME))
        patched.setattr(Path, "replace", moving(_REPLACE))
        patched.setattr(Path, "unlink", moving(_UNLINK))
        patched.setattr(shutil, "rmtree", lambda *_, **__: None)
        yield


@pytest.mark.parametrize("kind", KINDS)
def test_a_save_that_is_stopped_before_any_of_its_changes_leaves_the_old_version_or_the_new(
    tmp_path, monkeypatch, kind
):
    found = []
    for number in range(80):
        shutil.rmtree(tmp_path / "model", ignore_errors=True)
        save_version(tmp_path, 1, full=kind == "full")
        try:
            with killed_before_change(number, monkeypatch):
                save_version(tmp_path, 2, full=kind == "full")
        except Killed:
            found.append(versions(tmp_path))
            assert versions(tmp_path) == found[-1]  # and again, after the first to open it has finished the save
            save_version(tmp_path, 3, full=kind == "full")
            assert versions(tmp_path) == {3}
            assert not any(path.name.startswith(".") for path in (tmp_path / "model").iterdir())
        else:
            break
    old, new = found.count({1}), found.count({2})
    assert found == [{1}] * old + [{2}] * new
    assert min(old, new) > 2
    assert versions(tmp_path) == {2}


def test_a_stopped_save_is_finished_by_every_way_to_open_the_directory(tmp_path, monkeypatch):
    save_version(tmp_path, 1)
    with monkeypatch.context() as stopped:
        stopped.setattr("hf_gradmem.checkpoint.whole_save.finish_save", lambda _: None)
        save_version(tmp_path, 2)
    assert any((tmp_path / "model").glob(".saving-*"))
    model = AutoModel.from_pretrained(tmp_path / "model")
    assert (model.config.num_memory_tokens, model.memory_init.unique().tolist()) == (3, [2.0])
    assert "<version2>" in model.tokenizer.get_vocab()


def test_files_of_the_users_own_stay_and_weights_of_the_version_before_go(tmp_path):
    save_version(tmp_path, 1, full=True)
    own = {"README.md": b"My own card.\n", "notes.txt": b"mine", "checkpoint-5/model.safetensors": b"a run's"}
    for name, content in own.items():
        (tmp_path / "model" / name).parent.mkdir(exist_ok=True)
        (tmp_path / "model" / name).write_bytes(content)
    assert len(list((tmp_path / "model").glob("model-*-of-*.safetensors"))) > 1
    save_version(tmp_path, 2, full=True)
    assert not list((tmp_path / "model").glob("model-*"))
    assert not (tmp_path / "model" / "model.safetensors.index.json").exists()
    save_version(tmp_path, 3, full=True)
    assert not (tmp_path / "model" / "model.safetensors").exists()
    assert versions(tmp_path) == {3}
    save_version(tmp_path, 2)
    assert not (tmp_path / "model" / "generation_config.json").exists()
    assert own.items() <= contents(tmp_path / "model").items()


def test_a_tokenizer_takes_the_place_of_the_one_before_it(tmp_path):
    save_version(tmp_path, 1)
    model = AutoModel.from_pretrained(tmp_path / "model")
    model.tokenizer = small_tokenizer()
    model.tokenizer.chat_template = {"default": "{{ messages[0]['content'] }}", "other": "{{ messages }}"}
    model.save_pretrained(tmp_path / "model")
    assert (tmp_path / "model" / "additional_chat_templates" / "other.jinja").exists()
    model.tokenizer = small_tokenizer()
    model.save_pretrained(tmp_path / "model")
    assert AutoModel.from_pretrained(tmp_path / "model").tokenizer.chat_template is None
    assert not list((tmp_path / "model").rglob("*.jinja"))
    # Of a model that has none, one that lies there stays: it may have been put there by itself.
    with_memory(named_base(tmp_path / "base"), **PLAIN).save_pretrained(tmp_path / "model")
    assert (tmp_path / "model" / "tokenizer.json").exists()


def test_a_save_of_the_same_model_is_the_same_to_the_byte_and_its_configuration_holds_nothing_of_the_save(tmp_path):
    save_version(tmp_path, 1)
    before = contents(tmp_path / "model")
    model = AutoModel.from_pretrained(tmp_path / "model")
    assert not hasattr(model.config, "save_id")
    save_version(tmp_path, 1)
    assert contents(tmp_path / "model") == before
    save_version(tmp_path, 2)
    ids = [json.loads(values["config.json"])["save_id"] for values in (before, contents(tmp_path / "model"))]
    assert ids[0] != ids[1]


# ------------------------------------------------------------------------------------------------ disks that are full


@contextmanager
def no_file_longer_than(num_bytes: int):
    """The system refuses to write on, as it does on a full disk."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (num_bytes, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def refusal(save) -> int | None:
    """The number of the system's error that a save ends with."""
    try:
        save()
    except OSError as error:
        return error.errno
    return None


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("num_bytes", [100, 300, 1000, 2500, 20000])
def test_a_save_that_the_disk_has_no_room_for_is_an_oserror_and_leaves_the_old_version(tmp_path, kind, num_bytes):
    save_version(tmp_path, 1, full=kind == "full")
    before = contents(tmp_path / "model")
    longest = max(map(len, before.values()))
    with no_file_longer_than(num_bytes):
        refused = refusal(lambda: save_version(tmp_path, 2, full=kind == "full"))
    assert refused in (None, errno.EFBIG)
    if refused is not None:
        assert contents(tmp_path / "model") == before
    else:
        assert num_bytes > longest / 2
    assert versions(tmp_path) == ({2} if refused is None else {1})


def test_a_memory_that_the_disk_has_no_room_for_is_an_oserror_and_leaves_the_old_one(tmp_path):
    zeros, ones = (
        GradMemMemory(torch.full((1, 9, 99), value), torch.zeros(1, 1), torch.ones(1, 1, dtype=torch.long))
        for value in (0.0, 1.0)
    )
    zeros.save_pretrained(tmp_path)
    with no_file_longer_than(2000), pytest.raises(OSError, match=r"memory\.safetensors") as caught:
        ones.save_pretrained(tmp_path)
    assert caught.value.errno == errno.EFBIG
    assert torch.equal(GradMemMemory.from_pretrained(tmp_path).embeddings, zeros.embeddings)
    assert os.listdir(tmp_path) == ["memory.safetensors"]


def test_a_tokenizer_that_the_disk_has_no_room_for_is_an_oserror(tmp_path):
    with no_file_longer_than(50), pytest.raises(OSError, match="too large"), system_errors(tmp_path):
        small_tokenizer().save_pretrained(tmp_path)


@pytest.mark.slow
@pytest.mark.skipif(os.name == "nt" or os.geteuid() != 0, reason="mounts a small disk")
@pytest.mark.parametrize("kind", KINDS)
def test_a_full_disk_leaves_the_old_version_however_little_room_there_is(tmp_path, kind):
    disk = tmp_path / "disk"
    disk.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=2m", "tmpfs", disk], check=False).returncode:
        pytest.skip("no disk can be mounted here")
    refused = 0
    try:
        save_version(disk, 1, full=kind == "full")
        for kilobytes in [*range(0, 48, 4), *range(48, 260, 24)]:
            filler = disk / "filler"
            free = os.statvfs(disk).f_bavail * os.statvfs(disk).f_frsize
            filler.write_bytes(bytes(free - 1024 * kilobytes))
            error = refusal(lambda: save_version(disk, 2, full=kind == "full"))
            filler.unlink()
            assert error in (None, errno.ENOSPC)
            assert versions(disk) == ({2} if error is None else {1})
            refused += error is not None
            save_version(disk, 1, full=kind == "full")
    finally:
        subprocess.run(["umount", "--lazy", disk], check=True)  # weights that were read are still mapped
    print(f"{refused} saves refused")
    assert refused >= 5


# ------------------------------------------------------------------------------------------------ kills


def killed_while_saving(directory: Path, full: bool, seconds: float, first: int) -> None:
    """Save version after version in a process of its own, and kill it after so long."""
    process = os.fork()
    if process == 0:
        try:
            for version in itertools.count(first):
                save_version(directory, version, full=full)
        finally:
            os._exit(1)
    time.sleep(seconds)
    os.kill(process, signal.SIGKILL)
    _, status = os.waitpid(process, 0)
    assert os.waitstatus_to_exitcode(status) == -signal.SIGKILL


@pytest.mark.slow
@pytest.mark.skipif(os.name == "nt", reason="forks, and sends SIGKILL")
@pytest.mark.parametrize("kind", KINDS)
def test_sixty_kills_at_random_moments_leave_one_whole_version_each(tmp_path, kind):
    moments, found, stopped_within = random.Random(0), [], 0
    save_version(tmp_path, 0, full=kind == "full")
    for number in range(60):  # each begins with another version: a slow machine saves only one or two
        killed_while_saving(tmp_path, kind == "full", moments.uniform(0, 0.5), first=number + 1)
        stopped_within += any((tmp_path / "model").glob(".saving-*"))
        found.append(versions(tmp_path))
    print(f"{sum(len(each) == 1 for each in found)} of {len(found)} whole, {stopped_within} stopped within a save")
    assert all(len(each) == 1 for each in found), found
    assert len(set.union(*found)) > 2
    assert stopped_within > 10
