"""Folders and names in them: made, renamed, removed, held open, and the room on their disk."""

from __future__ import annotations

import contextlib
import errno
import os
import stat
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

from streamshard.disk.held import RELATIVE, Held, Inode, inode, let_go, register
from streamshard.disk.system import NO_LINK, system, writing
from streamshard.errors import OutputError

__all__ = [
    "disk_free",
    "exists",
    "held",
    "inode_of",
    "make_folders",
    "remove_empty",
    "rename",
    "resolved",
    "sync_folder",
]


def exists(path: Path) -> bool:
    """Whether something, be it a broken link, has this name in the place of an output."""
    return inode_of(path) is not None


def resolved(path: Path) -> Path:
    """Where an output is in truth; "." has no name, and what it is called counts here."""
    with writing(path, 0):
        return system.resolve(path)


def make_folders(path: Path) -> list[Path]:
    """Make a folder and those around it; returns what was made, innermost first."""
    missing = []
    while not exists(path) and path != path.parent:
        missing.append(path)
        path = path.parent
    try:
        for folder in reversed(missing):
            with contextlib.suppress(FileExistsError):  # another run was faster
                system.mkdir(folder)
    except OSError:
        remove_empty(missing)
        raise
    return missing


def remove_empty(folders: Iterable[Path]) -> None:
    """Remove those of the folders, innermost first, that are empty and can be removed."""
    for folder in folders:
        with contextlib.suppress(OSError):
            system.rmdir(folder)


def rename(path: Path, other: Path) -> None:
    """Give a file another name in its folder."""
    with writing(path, 0):
        system.rename(path, other)


@contextmanager
def held(path: Path, check: Callable[[os.stat_result], None] | None = None) -> Iterator[Held]:
    """Hold a folder: until the block ends, paths in it lead into this very folder.

    `check` looks at it first. It cannot be a link.
    """
    with writing(path, 0):
        found = system.lstat(path)
        if not stat.S_ISDIR(found.st_mode):
            raise OutputError.at(path, "is no folder any more. Run again.")
        if check is not None:
            check(found)
        descriptor = system.open(path, os.O_RDONLY | NO_LINK) if RELATIVE else None
    try:
        with writing(path, 0):
            if descriptor is not None and inode(system.fstat(descriptor)) != inode(found):
                raise OSError(errno.ESTALE, "something else has been put in its place", str(path))
        folder = Held(str(path), inode(found), descriptor)
        register(folder)
        try:
            yield folder
        finally:
            let_go(folder)
    finally:
        if descriptor is not None:
            with contextlib.suppress(OSError):  # nothing was written
                system.close(descriptor)


def inode_of(path: Path) -> Inode | None:
    """The identity of what has this name, be it a link; None if nothing has it."""
    with writing(path, 0):
        try:
            return inode(system.lstat(path))
        except (FileNotFoundError, NotADirectoryError):
            return None


def disk_free(path: Path) -> int | None:
    """Bytes that may still be written to the disk which holds (or will hold) `path`, if it tells."""
    with writing(path, 0):
        existing = path
        while not exists(existing) and existing != existing.parent:
            existing = existing.parent
        return system.disk_free(existing)


def sync_folder(path: Path) -> None:
    """Wait until the disk has the names in a folder; Windows has no such call."""
    if os.name != "nt":
        with writing(path, 0):
            descriptor = system.open(path, os.O_RDONLY)
            try:
                system.fsync(descriptor)
            finally:
                with contextlib.suppress(OSError):  # what counts is done, or has failed already
                    system.close(descriptor)
