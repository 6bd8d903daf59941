"""What is not ours where a run writes, and whether it is left alone."""

from __future__ import annotations

import os
import stat
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from interrupted_runs import (
    AFTER_A_SHARD,
    FIRST,
    content,
    killed,
)
from pairs import Outcome, Pair

import streamshard
from streamshard.engine.beside_output import places_beside
from streamshard.engine.journal import Journal

needs_root = pytest.mark.skipif(os.geteuid() != 0, reason="only root gives files away")

State = dict[str, Any]
Cli = Callable[..., Outcome]


def state(folder: Path) -> State:
    """All there is in a folder: kind, mode, inode, owner, number of names, and content."""
    found: State = {}
    for path in [folder, *sorted(folder.rglob("*"))]:
        entry = path.lstat()
        data: Any = None
        if stat.S_ISREG(entry.st_mode):
            data = path.read_bytes()
        elif stat.S_ISLNK(entry.st_mode):
            data = path.readlink()
        kept = (entry.st_mode, entry.st_ino, entry.st_uid, entry.st_nlink, data)
        found[str(path.relative_to(folder))] = kept
    return found


def left_alone(pair: Pair, cli: Cli, where: Path, *more: str, what: str = "") -> None:
    """A run that is refused with exit code 5, names a path, and touches nothing at all."""
    before = state(pair.root)
    outcome = cli(*pair.command, *more)
    assert outcome.code == 5, outcome
    assert "Traceback" not in outcome.err
    assert str(where) in outcome.err
    assert what in outcome.err
    assert outcome.out == ""
    assert state(pair.root) == before


def lock(pair: Pair) -> Path:
    return places_beside(pair.output)["lock"]


def old(pair: Pair) -> Path:
    return places_beside(pair.output)["old"]


def interrupt(pair: Pair) -> None:
    """Leave what a run leaves that is killed at its first shard; its lock alone would go in any case."""
    killed(AFTER_A_SHARD, [*pair.command, "--workers", "1"])
    lock(pair).unlink()


def make_output(pair: Pair) -> dict[str, Any]:
    streamshard.merge_lora(base=pair.base, adapter=pair.adapter, output=pair.output, weight=[0.5])
    return content(pair.output)


def foreign(path: Path, how: str, pair: Pair) -> str:
    """Put something that is not ours at a path; returns what a message must say."""
    config = pair.base / FIRST
    if how == "link":
        path.symlink_to(config)
        return "symbolic link"
    if how == "dangling link":
        (pair.root / "writable").mkdir(exist_ok=True)
        path.symlink_to(pair.root / "writable" / "new")
        return "symbolic link"
    if how == "link to itself":
        path.symlink_to(path.name)
        return "symbolic link"
    if how == "hard link":
        os.link(config, path)
        return "2 names (hard links)"
    if how == "folder":
        path.mkdir()
        return "a folder where a file"
    if how == "pipe":
        os.mkfifo(path)
        return "a pipe"
    path.touch()
    if how == "owner":
        os.chown(path, 65533, -1)
        return "user 65533"
    assert how == "mode"
    path.chmod(0o666)
    return "mode is 0666"


FOREIGN = [
    "link",
    "dangling link",
    "link to itself",
    "hard link",
    "folder",
    "pipe",
    pytest.param("owner", marks=needs_root),
    "mode",
]
MORE = [[], ["--overwrite"]]


def at_the_first_shard(monkeypatch: pytest.MonkeyPatch, act: Callable[[], Any]) -> None:
    add, done = Journal.add, []

    def acting(journal: Journal, shard: Any) -> None:
        add(journal, shard)
        if not done:
            done.append(True)
            act()

    monkeypatch.setattr(Journal, "add", acting)
