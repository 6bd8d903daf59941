"""Folders and files that somebody swaps while a run is at it: nothing of theirs is written to."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from foreign_things import (
    at_the_first_shard,
    left_alone,
    lock,
    make_output,
    old,
    state,
)
from hangs import HANGS
from interrupted_runs import (
    AFTER_A_SHARD,
    MAIN,
    alone,
    partial,
)

from streamshard.disk import held
from streamshard.disk.system import system


@pytest.mark.parametrize("relative", [True, False], ids=["descriptors", "identities"])
@pytest.mark.parametrize("how", ["link to the base", "another folder", "gone"])
@pytest.mark.parametrize("workers", ["1", "2"])
def test_the_staging_folder_is_swapped(how, relative, workers, pair, cli, monkeypatch):
    """As who may write to the folder around it could do at any time."""
    if not relative:
        monkeypatch.setattr("streamshard.disk.folders.RELATIVE", False)
    (pair.base / "inner").mkdir()
    (pair.base / "inner" / "x.txt").write_text("x")
    theirs = pair.root / "theirs"
    shutil.copytree(pair.base, theirs)

    def swap() -> None:
        partial(pair).rename(pair.root / "away")
        if how == "link to the base":
            partial(pair).symlink_to(pair.base)
        elif how == "another folder":
            theirs.rename(partial(pair))

    before = state(pair.base), state(theirs)
    at_the_first_shard(monkeypatch, swap)
    outcome = cli(*pair.command, "--workers", workers)
    # Of a folder that is gone it depends on the call that comes next: a write may just fail.
    assert outcome.code in ({5} if relative and how != "gone" else {5, 6}), outcome.err
    assert str(partial(pair)) in outcome.err
    assert "Traceback" not in outcome.err
    assert state(pair.base) == before[0]
    assert state(partial(pair) if how == "another folder" else theirs) == before[1]
    assert not pair.output.exists()
    assert held._held == ()


def test_an_inner_folder_is_swapped(pair, cli, monkeypatch):
    (pair.base / "inner").mkdir()
    for name in ("x.txt", "y.txt"):
        (pair.base / "inner" / name).write_text(name)
    theirs = pair.root / "theirs"
    theirs.mkdir()
    opened = system.open

    def swapping(path: Any, flags: int) -> int:
        inner = partial(pair) / "inner"
        if Path(path) == inner / "x.txt" and not inner.is_symlink():
            inner.rename(partial(pair) / "moved")
            inner.symlink_to(theirs)
        return opened(path, flags)

    monkeypatch.setattr(system, "open", swapping)
    outcome = cli(*pair.command)
    assert outcome.code == 5
    assert "'moved'" in outcome.err
    assert list(theirs.iterdir()) == []
    assert not pair.output.exists()


def test_the_output_is_swapped_before_the_first_rename(pair, cli, monkeypatch):
    """What is moved away then is put back, and nothing of it is removed."""
    make_output(pair)
    rename = system.rename
    shutil.copytree(pair.base, pair.root / "theirs")
    before = state(pair.root / "theirs")

    def swapping(path: Any, other: Any) -> None:
        if Path(other) == old(pair):
            pair.output.rename(pair.root / "away")
            (pair.root / "theirs").rename(pair.output)
        rename(path, other)

    with monkeypatch.context() as patch:
        patch.setattr(system, "rename", swapping)
        outcome = cli(*pair.command, "--overwrite")
    assert outcome.code == 5
    assert state(pair.output) == before
    assert not old(pair).exists()


def test_what_comes_into_the_staging_folder_meanwhile(pair, cli, monkeypatch):
    at_the_first_shard(monkeypatch, lambda: (partial(pair) / "mine").write_text("mine"))
    outcome = cli(*pair.command, "--workers", "1")
    assert outcome.code == 5
    assert "'mine'" in outcome.err
    assert not pair.output.exists()
    assert (partial(pair) / "mine").read_text() == "mine"
    (partial(pair) / "mine").unlink()
    outcome = cli(*pair.command, "--json")
    assert json.loads(outcome.out)["resumed"] == 2
    assert alone(pair)


def test_what_comes_into_the_old_output_meanwhile(pair, cli, monkeypatch):
    make_output(pair)
    mine = pair.output / "mine"
    at_the_first_shard(monkeypatch, lambda: mine.write_text("mine"))
    outcome = cli(*pair.command, "--overwrite", "--workers", "1")
    assert outcome.code == 5
    assert "'mine'" in outcome.err
    assert mine.read_text() == "mine"
    mine.unlink()
    assert cli(*pair.command, "--overwrite").code == 0
    assert alone(pair)


def test_what_comes_into_the_old_output_after_it_was_moved(pair, cli, monkeypatch):
    make_output(pair)
    rename = system.rename

    def late(path: Any, other: Any) -> None:
        rename(path, other)
        if Path(other) == old(pair):
            (old(pair) / "mine").write_text("mine")

    with monkeypatch.context() as patch:
        patch.setattr(system, "rename", late)
        outcome = cli(*pair.command, "--overwrite")
    assert outcome.code == 5
    assert "is complete" in outcome.err
    assert [path.name for path in old(pair).iterdir()] == ["mine"]
    left_alone(pair, cli, old(pair), "--overwrite", what="'mine'")
    (old(pair) / "mine").unlink()
    assert cli(*pair.command).code == 5
    assert alone(pair)


def test_a_lock_that_is_swapped_is_not_removed(pair, cli, monkeypatch):
    def swap() -> None:
        lock(pair).rename(pair.root / "away")
        lock(pair).write_text("mine")

    at_the_first_shard(monkeypatch, swap)
    assert cli(*pair.command).code == 0
    assert lock(pair).read_text() == "mine"


def test_a_lock_that_never_stays_ends(pair, cli, monkeypatch):
    opened = system.open

    def fleeting(path: Any, flags: int) -> int:
        descriptor = opened(path, flags)
        if Path(path) == lock(pair):
            lock(pair).unlink()
        return descriptor

    monkeypatch.setattr(system, "open", fleeting)
    outcome = cli(*pair.command)
    assert outcome.code == 5
    assert str(lock(pair)) in outcome.err


def test_a_stopped_run_that_is_swapped_is_noticed(pair):
    """In a process of its own, stopped at its first shard."""
    stop = AFTER_A_SHARD.replace("kill()", "os.kill(os.getpid(), signal.SIGSTOP)")
    line = [sys.executable, "-c", "import os, signal\n" + stop + MAIN, *pair.command]
    before = state(pair.base)
    with subprocess.Popen([*line, "--workers", "1"], stderr=subprocess.PIPE, text=True) as run:
        _, status = os.waitpid(run.pid, os.WUNTRACED)
        assert os.WIFSTOPPED(status)
        partial(pair).rename(pair.root / "away")
        partial(pair).symlink_to(pair.base)
        run.send_signal(signal.SIGCONT)
        _, said = run.communicate(timeout=HANGS)
    assert run.returncode == 5, said
    assert str(partial(pair)) in said
    assert state(pair.base) == before
