"""Disks without room, and folders without permission."""

from __future__ import annotations

import errno
import os
import shutil
import stat
import subprocess
import sys
from typing import Any

import pytest
import reference
from marks import slow
from shards_of_pair import FIRST, SECOND, merge

from streamshard import merge_lora
from streamshard.errors import ReadError

pytestmark = slow


def test_too_little_space_is_found_before_writing(pair, refused, monkeypatch):
    usage = shutil.disk_usage(pair.root)._replace(free=10_000)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
    refused(6, "10.00 KB are free", str(pair.output))


@pytest.mark.parametrize("when", ["allocating", "writing"])
def test_a_disk_that_fills_while_writing(when, pair, refused, monkeypatch):
    import streamshard.disk.system

    def full(*_: Any) -> int:
        raise OSError(28, os.strerror(28))

    if when == "allocating":
        monkeypatch.setattr(os, "posix_fallocate", full)
    else:
        monkeypatch.setattr(streamshard.disk.system, "_pwrite", full)
    refused(6, "no space left", "model-0000" if when == "allocating" else ".merged")


def test_a_disk_that_is_full(pair):
    """The real thing: a small disk of our own, where the system lets us mount one."""
    disk = pair.root / "disk"
    disk.mkdir()
    (pair.base / "notes.txt").write_bytes(bytes(60_000))
    mount = f"mount -t tmpfs -o size=40k none '{disk}' 2>/dev/null || exit 99; "
    command = [sys.executable, "-m", "streamshard", *merge(pair, disk / "out")]
    told = "types.SimpleNamespace(free=10**9, total=10**9)"
    lie = f"import shutil, types; shutil.disk_usage = lambda p: {told}; "
    for fake in ("", lie):
        if fake:
            code = f"import sys; {fake}from streamshard.cli import main; main()"
            command[1:3] = ["-c", code]
        line = " ".join(f"'{part}'" for part in command)
        script = f"{mount}{line}; code=$?; ls -A '{disk}'; exit $code"
        done = subprocess.run(
            ["unshare", "-m", "sh", "-c", script], capture_output=True, text=True, check=False
        )
        if "unshare" in done.stderr or done.returncode == 99:
            pytest.skip("cannot mount a file system")
        assert done.returncode == 6, done.stderr
        assert "Free some space" in done.stderr
        # Weights that are finished stay for the next run.
        assert done.stdout.split() == ([".out.partial"] if fake else [])
        assert ("run the same command again" in done.stderr) == bool(fake)


@pytest.mark.parametrize("place", ["closed/out", "closed/a/out", "file/out", "file/a/out"])
def test_an_output_that_cannot_be_written(place, pair):
    (pair.root / "file").write_text("")
    (pair.root / "closed").mkdir()
    (pair.root / "closed").chmod(stat.S_IRUSR | stat.S_IXUSR)
    command = [sys.executable, "-m", "streamshard", *merge(pair, pair.root / place)]
    if os.geteuid() == 0:  # root may write anywhere, unless it gives up that power
        if shutil.which("setpriv") is None:
            pytest.skip("root, and no setpriv to give up its power")
        command = ["setpriv", "--bounding-set=-all", "--inh-caps=-all", *command]
    before = reference.digests(pair.root)
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    (pair.root / "closed").chmod(stat.S_IRWXU)
    assert done.returncode == 6, done.stderr
    assert str(pair.root / place.split("/", maxsplit=1)[0]) in done.stderr
    assert "Traceback" not in done.stderr
    assert reference.digests(pair.root) == before


@pytest.mark.parametrize("place", ["base", f"base/{FIRST}", "adapter/adapter_config.json"])
def test_an_input_that_cannot_be_read(place, pair):
    command = [sys.executable, "-m", "streamshard", *pair.command]
    if os.geteuid() == 0:
        if shutil.which("setpriv") is None:
            pytest.skip("root, and no setpriv to give up its power")
        command = ["setpriv", "--bounding-set=-all", "--inh-caps=-all", *command]
    before = reference.digests(pair.root)
    mode = (pair.root / place).stat().st_mode
    (pair.root / place).chmod(0)
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    (pair.root / place).chmod(mode)
    assert done.returncode in (3, 7), done.stderr
    assert str(pair.root / place) in done.stderr
    assert "Traceback" not in done.stderr
    assert reference.digests(pair.root) == before


def test_a_base_that_shrinks_after_planning(pair):
    shard = pair.base / SECOND
    nbytes = shard.stat().st_size
    with pytest.raises(ReadError, match=f"{nbytes - 10:,} bytes now") as raised:
        merge_lora(
            base=pair.base,
            adapter=pair.adapter,
            output=pair.output,
            on_plan=lambda plan: os.truncate(shard, nbytes - 10),
        )
    assert raised.value.exit_code == 7
    assert SECOND in str(raised.value)
    assert not pair.output.exists()
    # Kept for another run if the other worker had finished its file by then, and said so.
    left = [path.name for path in pair.output.parent.iterdir()]
    assert left in ([], [f".{pair.output.name}.partial"])
    assert bool(left) == ("run the same command again" in str(raised.value))


@pytest.mark.parametrize("number", [errno.EACCES, errno.EROFS])
def test_the_folder_is_named_in_which_nothing_may_be_made(number, pair, refused, monkeypatch):
    """And not only the hidden file that would have been made there."""
    opened = os.open

    def closed(path: Any, flags: int, *more: Any, **how: Any) -> int:
        if flags & os.O_CREAT:
            raise OSError(number, os.strerror(number), path)
        return opened(path, flags, *more, **how)

    monkeypatch.setattr(os, "open", closed)
    text = refused(6, f": cannot be written: {os.strerror(number)}. Check permissions,")
    assert f"those of the folder {pair.output.parent} first." in text
