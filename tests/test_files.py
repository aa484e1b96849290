"""Places that are looked at before anything is written to them."""

import os
import stat
from pathlib import Path

import pytest
import torch

from hf_gradmem.files import check_directory, check_writable, save_tensors, whole_file
from tests.support.small_models import nameless_base, with_memory


def listed(directory: Path) -> list[str]:
    return sorted(str(path.relative_to(directory)) for path in directory.rglob("*"))


@pytest.mark.parametrize("check", [check_writable, check_directory])
def test_a_place_that_can_be_written_is_left_as_it_was(tmp_path, check):
    (tmp_path / "there").mkdir()
    for place in (tmp_path / "new", tmp_path / "there" / "new", tmp_path / "none" / "yet" / "new"):
        check(place)
    assert listed(tmp_path) == ["there"]


def test_a_file_may_be_written_anew_and_a_directory_written_into(tmp_path):
    (tmp_path / "file").write_text("old", encoding="utf-8")
    check_writable(tmp_path / "file")
    check_directory(tmp_path)
    assert (tmp_path / "file").read_text(encoding="utf-8") == "old"
    assert listed(tmp_path) == ["file"]


def places_that_cannot_be_written(directory: Path) -> list[Path]:
    (directory / "file").touch()
    (directory / "link").symlink_to(directory / "nowhere")
    places = [directory / "file" / "new", directory / "link" / "new", directory / ("n" * 300)]
    if Path("/proc/self").is_dir():  # a file system of the kernel's, in which nobody makes files
        places += [Path("/proc/new"), Path("/proc/new/below")]
    if os.name != "nt" and os.geteuid() != 0:  # whom no mode keeps out
        (directory / "sealed").mkdir(mode=0o500)
        places.append(directory / "sealed" / "new")
    return places


@pytest.mark.parametrize("check", [check_writable, check_directory])
def test_a_place_that_cannot_be_written_is_found_out(tmp_path, check):
    for place in places_that_cannot_be_written(tmp_path):
        with pytest.raises(OSError, match=place.name):
            check(place)


def test_a_file_is_not_a_directory_nor_a_directory_or_a_device_a_file(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(NotADirectoryError):
        check_directory(tmp_path / "file")
    with pytest.raises(IsADirectoryError):
        check_writable(tmp_path)
    with pytest.raises(OSError, match=os.devnull), whole_file(os.devnull):
        pass
    assert not Path(os.devnull).is_file()


@pytest.mark.skipif(not Path("/proc/self/fd").is_dir(), reason="the kernel shows no open files")
def test_a_stream_that_is_a_file_for_now_is_not_replaced(tmp_path):
    (tmp_path / "stdout").symlink_to("link")
    with (tmp_path / "file").open("w") as open_file:
        (tmp_path / "link").symlink_to(f"/proc/self/fd/{open_file.fileno()}")
        with pytest.raises(OSError, match="stdout is not a file that can be written anew"):
            check_writable(tmp_path / "stdout")


@pytest.mark.skipif(os.name == "nt", reason="links need a right there")
def test_a_link_is_replaced_and_not_what_it_points_to(tmp_path):
    (tmp_path / "file").write_text("old", encoding="utf-8")
    (tmp_path / "link").symlink_to("file")
    with whole_file(tmp_path / "link") as unfinished:
        unfinished.write_text("new", encoding="utf-8")
    assert [(tmp_path / name).read_text(encoding="utf-8") for name in ("file", "link")] == ["old", "new"]


@pytest.mark.skipif(os.name == "nt", reason="files have no such modes there")
def test_others_may_read_a_file_as_they_may_any_new_one_or_the_one_it_replaces(tmp_path):
    """safetensors' own files are for their owner alone."""
    (tmp_path / "plain").touch()
    save_tensors({"a": torch.zeros(1)}, tmp_path / "a.safetensors", {})
    new = (tmp_path / "plain").stat().st_mode
    assert (tmp_path / "a.safetensors").stat().st_mode == new
    (tmp_path / "a.safetensors").chmod(0o640)
    save_tensors({"a": torch.ones(1)}, tmp_path / "a.safetensors", {})
    assert stat.S_IMODE((tmp_path / "a.safetensors").stat().st_mode) == 0o640
    with_memory(nameless_base(), num_memory_tokens=2).save_pretrained(tmp_path / "model")
    assert {path.stat().st_mode for path in (tmp_path / "model").iterdir()} == {new}
