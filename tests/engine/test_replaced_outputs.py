"""Outputs that are replaced: what is told apart at the last moment, and what other users own."""

from __future__ import annotations

import contextlib
import os
import shutil
import tempfile
from pathlib import Path
from typing import Any

import pytest
from foreign_things import (
    left_alone,
    lock,
    make_output,
    needs_root,
    old,
    state,
)
from interrupted_runs import AFTER_A_SHARD, alone, killed, partial
from pairs import new_pair

from streamshard.disk import held
from streamshard.disk.system import system
from streamshard.engine.lock import Lock


@pytest.fixture
def shared():
    """A base and an adapter where every user can be, and not below what pytest keeps for one."""
    root = Path(tempfile.mkdtemp(prefix="streamshard-shared-"))
    root.chmod(0o755)
    pair = new_pair(root)
    for file in root.rglob("*.*"):
        file.chmod(0o644)
    yield pair
    shutil.rmtree(root)


@contextlib.contextmanager
def as_user(number: int):
    groups = os.getgroups()
    os.setgroups([])
    os.setegid(number)
    os.seteuid(number)
    try:
        yield
    finally:
        os.seteuid(0)
        os.setegid(0)
        os.setgroups(groups)


@needs_root
@pytest.mark.parametrize("dry", [[], ["--dry-run"]], ids=["run", "dry run"])
@pytest.mark.parametrize(
    "where", ["output", "inner folder", "sticky output", "sticky parent", "nowhere"]
)
def test_an_output_of_another_user_in_a_shared_folder(where, dry, shared, cli):
    """It could be moved away and then not be emptied, and no later run could do anything."""
    pair = shared
    (pair.base / "inner").mkdir()
    (pair.base / "inner" / "x.txt").write_text("x")
    make_output(pair)
    inner = pair.output / "inner"
    pair.output.parent.chmod(0o1777 if where == "sticky parent" else 0o777)
    for folder in (pair.output, inner):
        folder.chmod(0o777)
    if where in {"output", "inner folder"}:
        (pair.output if where == "output" else inner).chmod(0o755)
    elif where == "sticky output":
        pair.output.chmod(0o1777)
    with as_user(65533):
        if where == "nowhere":
            assert cli(*pair.command, "--overwrite", *dry).code == 0
            return
        refused_at = {"inner folder": inner, "sticky parent": pair.output.parent}
        said = f"is in {refused_at.get(where, pair.output)}. Nothing"
        left_alone(pair, cli, pair.output, "--overwrite", *dry, what=said)


def test_the_output_is_held_until_it_is_moved(pair, cli, monkeypatch):
    """So that its inode number cannot become that of a folder that somebody else puts there."""
    make_output(pair)
    rename, seen = system.rename, []

    def looking(path: Any, other: Any) -> None:
        if Path(other) == old(pair):
            kept = held.holder(str(pair.output), itself=True)
            assert os.path.samestat(os.fstat(kept.descriptor), pair.output.stat())
            seen.append(kept)
        rename(path, other)

    monkeypatch.setattr(system, "rename", looking)
    assert cli(*pair.command, "--overwrite").code == 0
    assert len(seen) == 1
    assert held._held == ()


def test_what_comes_into_the_output_right_before_it_is_moved(pair, cli, monkeypatch):
    make_output(pair)
    mine = pair.output / "mine"
    note = Lock.note

    def late(*arguments: Any) -> None:
        note(*arguments)
        mine.write_text("mine")

    with monkeypatch.context() as patch:
        patch.setattr(Lock, "note", late)
        outcome = cli(*pair.command, "--overwrite")
    assert outcome.code == 5
    assert "'mine'" in outcome.err
    assert "is complete" not in outcome.err
    assert mine.read_text() == "mine"
    mine.unlink()
    assert cli(*pair.command, "--overwrite").code == 0
    assert alone(pair)


@pytest.mark.parametrize("exists", [False, True])
@pytest.mark.parametrize("how", ["folder", "link"])
def test_the_staging_folder_is_swapped_before_the_last_rename(how, exists, pair, cli, monkeypatch):
    """What was renamed in its place gets its own name back, and so does the old output."""
    if exists:
        make_output(pair)
    rename = system.rename
    theirs = pair.root / "theirs"
    if how == "folder":
        shutil.copytree(pair.base, theirs)
    else:
        theirs.symlink_to(pair.base)
    before = state(theirs)
    there = state(pair.output) if exists else None

    def swapping(path: Any, other: Any) -> None:
        if Path(path) == partial(pair):
            rename(partial(pair), pair.root / "away")
            rename(theirs, partial(pair))
        rename(path, other)

    with monkeypatch.context() as patch:
        patch.setattr(system, "rename", swapping)
        outcome = cli(*pair.command, "--overwrite")
    assert outcome.code == 5
    assert "puts back" not in outcome.err
    assert state(partial(pair)) == before
    assert pair.output.exists() == exists
    assert there is None or state(pair.output) == there
    assert not old(pair).exists()


def test_nothing_is_said_of_an_old_output_that_is_not_what_was_moved(pair, cli, monkeypatch):
    make_output(pair)
    note = Lock.note

    def late(*arguments: Any) -> None:
        note(*arguments)
        old(pair).mkdir()

    with monkeypatch.context() as patch:
        patch.setattr(Lock, "note", late)
        outcome = cli(*pair.command, "--overwrite")
    assert outcome.code == 5
    assert str(old(pair)) in outcome.err
    assert "puts back" not in outcome.err
    assert pair.output.exists()


@pytest.mark.parametrize("umask", [0o002, 0o000])
def test_a_stricter_umask_than_at_the_beginning(umask, pair, cli):
    """What others could write to meanwhile is not continued, and what to do is said."""
    killed(f"import os\nos.umask({umask})\n" + AFTER_A_SHARD, [*pair.command, "--workers", "1"])
    lock(pair).unlink(missing_ok=True)
    said = f"mode is {0o777 & ~umask:04o}), more than the umask (0022)"
    left_alone(pair, cli, partial(pair), what=said)
    left_alone(pair, cli, partial(pair), what="run again under that one, or remove the folder")
