"""A folder among temporary files that is a command's own, and goes when that ends, however it ends.

A command that is killed leaves its folder behind, for the next one: each holds a lock on its own, which
ends with the process, so that nobody need know which processes there are.
"""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import stat
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

from streamshard.disk.system import system

__all__ = ["PREFIX", "temporary_folder"]

PREFIX = "streamshard-hub-"
YOUNG_SECONDS = 60.0
"""Whoever has just made a folder may not have locked it yet."""
_OURS = re.compile(rf"{PREFIX}[a-z0-9_]{{8}}")


@contextlib.contextmanager
def temporary_folder() -> Iterator[Path]:
    """A new folder until the block ends; those of killed processes are removed before."""
    around = Path(tempfile.gettempdir())
    _remove_left(around)
    path = Path(tempfile.mkdtemp(prefix=PREFIX, dir=around)).resolve()
    lock = _locked(path)
    try:
        yield path
    finally:
        system.remove_tree(path)
        if lock is not None:
            system.close(lock)


def _remove_left(around: Path) -> None:
    """Remove the folders that killed processes of this user have left, where that is safe."""
    if not hasattr(os, "geteuid") or not shutil.rmtree.avoids_symlink_attacks:
        return
    with contextlib.suppress(OSError):
        mode = system.stat(around).st_mode
        if mode & (stat.S_IWGRP | stat.S_IWOTH) and not mode & stat.S_ISVTX:
            return  # others could put a folder of ours in its place
        for entry in system.scandir(around):
            if _OURS.fullmatch(entry.name):
                with contextlib.suppress(OSError):
                    _remove_if_left(Path(entry.path))


def _remove_if_left(path: Path) -> None:
    found = system.lstat(path)
    if not (
        stat.S_ISDIR(found.st_mode)
        and found.st_uid == os.geteuid()
        and time.time() - found.st_mtime > YOUNG_SECONDS
    ):
        return
    lock = _locked(path)
    if lock is None:
        return
    try:
        there = system.fstat(lock)
        if (there.st_dev, there.st_ino) == (found.st_dev, found.st_ino):
            system.remove_tree(path)
    finally:
        system.close(lock)


def _locked(path: Path) -> int | None:
    """The folder, open and locked; None if somebody else has locked it, or folders cannot be."""
    if not hasattr(os, "O_DIRECTORY"):
        return None
    try:
        descriptor = system.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
    except OSError:
        return None
    try:
        system.lock(descriptor)
    except OSError:
        system.close(descriptor)
        return None
    return descriptor
