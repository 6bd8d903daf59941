"""One run writes one output."""

from __future__ import annotations

import errno
import json
import os
import subprocess
import sys
import threading

import pytest
from interrupted_runs import AFTER_A_SHARD, KILL, MAIN, alone, content, partial, report_of

from streamshard.disk.system import system
from streamshard.engine import lock
from streamshard.engine.beside_output import places_beside
from streamshard.errors import OutputError


def test_of_two_runs_one_wins(pair, clean, refused, cli):
    """The first is stopped while it holds the lock; when it is killed, the second may go on."""
    stop = AFTER_A_SHARD.replace("kill()", "os.kill(os.getpid(), signal.SIGSTOP)")
    line = [sys.executable, "-c", KILL + stop + MAIN, *pair.command, "--workers", "1"]
    with subprocess.Popen(line) as first:
        try:
            _, status = os.waitpid(first.pid, os.WUNTRACED)
            assert os.WIFSTOPPED(status)
            for more in ([], ["--overwrite"], ["--weight", "0.5"]):
                refused(5, f"process {first.pid}", "another run", str(pair.output), more=more)
        finally:
            first.kill()
    assert cli(*pair.command).code == 0
    assert content(pair.output) == clean
    # The signal may come to another thread, and this one do a little more.
    assert report_of(pair.output)["resumed"] >= 1
    assert alone(pair)


def test_of_two_runs_at_once_one_wins(pair, clean):
    command = [sys.executable, "-m", "streamshard", *pair.command]
    runs = [
        subprocess.Popen(command, stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL)
        for _ in range(4)
    ]
    codes = sorted(run.wait() for run in runs)
    assert codes == [0, 5, 5, 5]
    assert content(pair.output) == clean
    assert alone(pair)


def test_threads_of_one_process_exclude_each_other(tmp_path):
    path, inside = tmp_path / "lock", threading.Event()
    errors: list[BaseException] = []

    def second() -> None:
        try:
            with lock.locked(path, tmp_path / "out"):
                inside.set()
        except OutputError as error:
            errors.append(error)

    with lock.locked(path, tmp_path / "out"):
        thread = threading.Thread(target=second)
        thread.start()
        thread.join()
    assert len(errors) == 1
    assert not inside.is_set()
    assert not path.exists()
    second()
    assert inside.is_set()


@pytest.mark.parametrize(
    ("record", "free"),
    [
        ({"pid": os.getppid()}, False),
        ({"pid": 2**22 + 1}, True),  # no such process
        ({"pid": os.getppid(), "boot": "an earlier one"}, True),
        ({"host": "elsewhere"}, False),
        (None, True),
    ],
    ids=["alive", "dead", "rebooted", "elsewhere", "unreadable"],
)
def test_where_a_disk_knows_no_locks_the_record_decides(record, free, tmp_path, monkeypatch):
    def unsupported(_: int) -> None:
        raise OSError(errno.ENOLCK, "no locks")

    monkeypatch.setattr(system, "lock", unsupported)
    path = tmp_path / "lock"
    with lock.locked(path, tmp_path / "out"):
        mine = json.loads(path.read_text())
    assert mine["pid"] == os.getpid()
    path.write_text("{" if record is None else json.dumps(mine | record))
    if free:
        with lock.locked(path, tmp_path / "out"):
            pass
        assert not path.exists()
    else:
        with pytest.raises(OutputError, match="remove"), lock.locked(path, tmp_path / "out"):
            pass
        assert path.exists()


def test_a_link_in_the_place_of_the_partial_output(pair, refused):
    (pair.root / "elsewhere").mkdir()
    (pair.root / "elsewhere" / "precious").write_text("x")
    partial(pair).symlink_to(pair.root / "elsewhere")
    refused(5, "symbolic link")


@pytest.mark.parametrize("beside", ["partial", "old"])
def test_inputs_are_never_taken_for_leftovers(beside, pair, refused):
    place = places_beside(pair.output)[beside]
    pair.base.rename(place)
    refused(5, "input", command=[p.replace(str(pair.base), str(place)) for p in pair.command])


@pytest.mark.parametrize(
    "record",
    [
        {"pid": 1 << 70, "host": "here", "boot": ""},
        {"pid": -5, "host": "here", "boot": ""},
        {"pid": True, "host": "here", "boot": ""},
        {"pid": 1, "host": [1], "boot": ""},
        {"pid": 1, "host": "here", "boot": {}},
    ],
    ids=str,
)
def test_a_record_of_odd_types_is_none(record):
    assert lock._record(json.dumps(record).encode()) == {}


@pytest.mark.parametrize("text", [b"[" * 511, b'{"old": true, "new": 5}', b'{"new": 5.5}', b"5"])
def test_a_note_of_odd_types_is_none(text):
    assert lock._note(bytes(lock.BLOCK) + text) is None
