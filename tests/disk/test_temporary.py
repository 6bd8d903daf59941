"""Folders of commands among temporary files: none stays, whoever is killed, and none of others goes."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pytest

from streamshard.disk import temporary
from streamshard.disk.temporary import PREFIX, temporary_folder

HOLDS = """
import sys
from streamshard.disk.temporary import temporary_folder
with temporary_folder() as path:
    (path / "0" / "org").mkdir(parents=True)
    (path / "0" / "org" / "file").write_bytes(b"x")
    print(path, flush=True)
    sys.stdin.read()
"""


@pytest.fixture
def around(tmp_path, monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    return tmp_path


@pytest.fixture
def other(around):
    """Another process that holds a folder."""
    env = os.environ | {"TMPDIR": str(around)}
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
    with subprocess.Popen([sys.executable, "-c", HOLDS], text=True, env=env, **pipes) as process:
        process.path = Path(process.stdout.readline().strip())
        yield process
        process.kill()


def grow_old(*paths):
    for path in paths:
        os.utime(path, (time.time() - 3600,) * 2)


def test_it_goes_at_the_end(around):
    with temporary_folder() as path:
        (path / "more").mkdir()
        assert path.stat().st_mode & 0o777 == 0o700
        assert [*around.iterdir()] == [path]
    assert not [*around.iterdir()]
    with pytest.raises(KeyError), temporary_folder():
        raise KeyError
    assert not [*around.iterdir()]


@pytest.mark.skipif(sys.platform == "win32", reason="folders cannot be locked there")
def test_what_a_killed_process_has_left_goes_with_the_next_one(around, other):
    grow_old(other.path)
    with temporary_folder() as own:
        assert {*around.iterdir()} == {own, other.path}  # it is at work
    other.send_signal(signal.SIGKILL)
    other.wait()
    with temporary_folder() as own:
        assert {*around.iterdir()} == {own}


@pytest.mark.skipif(sys.platform == "win32", reason="folders cannot be locked there")
def test_only_what_is_ours_and_old_goes(around, monkeypatch):
    names = ["new_0000", "linked00", "old_0000", "file0000"]
    new, linked, old, file = (around / f"{PREFIX}{name}" for name in names)
    elsewhere = around / "elsewhere"
    for path in (new, old, elsewhere, around / "streamshard-hub-", around / f"{PREFIX}more-than-8"):
        path.mkdir()
        (path / "kept").write_text("kept")
    linked.symlink_to(elsewhere)
    file.write_text("kept")
    (old / "link").symlink_to(elsewhere)
    grow_old(*(path for path in around.iterdir() if path != new))
    os.utime(new, (time.time() + 3600,) * 2)  # as if it were just made, however long this takes
    with temporary_folder():
        assert not old.exists()
    assert all((path / "kept").exists() for path in (new, elsewhere, linked))
    assert file.exists()
    assert len([*around.iterdir()]) == 6
    grow_old(new)
    monkeypatch.setattr(os, "geteuid", lambda: 12345)  # then it is another user's
    with temporary_folder():
        assert new.exists()


def test_where_others_could_put_things_in_its_place_nothing_goes(around):
    left = around / f"{PREFIX}old_0000"
    left.mkdir()
    grow_old(left)
    around.chmod(0o777)
    with temporary_folder():
        assert left.exists()
    around.chmod(0o1777)
    if sys.platform != "win32":
        with temporary_folder():
            assert not left.exists()


def test_nobody_is_disturbed_where_nothing_can_be_locked(around, monkeypatch):
    def refuse(descriptor):
        raise OSError(95, "Operation not supported")

    monkeypatch.setattr(temporary.system, "lock", refuse)
    left = around / f"{PREFIX}old_0000"
    left.mkdir()
    grow_old(left)
    with temporary_folder() as path:
        assert path.exists()
        assert left.exists()
    assert not path.exists()
