"""What there is under a name, against what `pathlib` and `os` say."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import pytest

from streamshard.disk import existence
from streamshard.disk.files import InputFile, open_source
from streamshard.disk.sources import Source
from streamshard.disk.system import system


@pytest.fixture
def place(tmp_path: Path) -> Path:
    """One of each kind."""
    (tmp_path / "folder" / "inner").mkdir(parents=True)
    (tmp_path / "folder" / "inner" / "deep").write_bytes(b"")
    (tmp_path / "file").write_bytes(b"x")
    os.mkfifo(tmp_path / "pipe")
    for name, target in [
        ("to file", "file"),
        ("to folder", "folder"),
        ("to nothing", "none"),
        ("loop", "loop"),
    ]:
        (tmp_path / name).symlink_to(target)
    return tmp_path


NAMES = [
    "folder",
    "file",
    "pipe",
    "to file",
    "to folder",
    "to nothing",
    "loop",
    "none",
    "file/x",
    ".",
]


@pytest.mark.parametrize("name", NAMES)
def test_it_is_what_pathlib_says(name, place):
    path = place / name
    assert existence.is_there(path) == path.exists()
    assert existence.is_file(path) == path.is_file()
    assert existence.is_folder(path) == path.is_dir()
    assert existence.is_link(path) == path.is_symlink()
    assert existence.has_name(path) == os.path.lexists(path)
    assert existence.is_mount(path) == path.is_mount()
    for other in NAMES:
        there = existence.found(place / other)
        if path.exists() and there is not None:
            assert existence.same(path, there) == path.samefile(place / other)
        else:
            assert not existence.same(path, there)


def test_a_mount():
    assert existence.is_mount(Path("/"))
    assert existence.is_mount(Path("/proc")) == Path("/proc").is_mount()


def test_folders_are_walked_as_os_does_it(place):
    expected = [(Path(at), sorted(inner), sorted(names)) for at, inner, names in os.walk(place)]
    found = [(at, sorted(inner), sorted(names)) for at, inner, names in existence.walked(place)]
    assert sorted(found) == sorted(expected)
    entered = []
    for at, inner, _ in existence.walked(place):
        entered.append(at)
        inner[:] = [name for name in inner if name != "inner"]
    assert entered == [place, place / "folder"]
    assert existence.names_in(place) == sorted(os.listdir(place))


@pytest.mark.parametrize("call", ["is_there", "is_file", "is_folder", "is_link"])
def test_what_cannot_be_told_is_an_error(call, place, monkeypatch):
    def fail(path: Path) -> None:
        raise OSError(errno.EIO, "broken", str(path))

    monkeypatch.setattr(system, "stat", fail)
    monkeypatch.setattr(system, "lstat", fail)
    with pytest.raises(OSError, match="broken"):
        getattr(existence, call)(place / "file")


def test_a_local_file_is_a_source(place):
    source: Source = open_source(place / "file")
    with source:
        assert isinstance(source, InputFile)
        assert source.read(0, 9) == b"x"
        assert source.abilities.ranges
        assert source.abilities.local == place / "file"
