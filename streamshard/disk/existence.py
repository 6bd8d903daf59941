"""What there is under a name: a file, a folder, a link, nothing; and which names a folder has.

Errors are those of the system, for `reading` or `writing` to tell; what only says that nothing has the
name is an answer.
"""

from __future__ import annotations

import errno
import os
import stat
from collections.abc import Iterator
from pathlib import Path

from streamshard.disk.system import AnyPath, system

__all__ = [
    "found",
    "has_name",
    "is_file",
    "is_folder",
    "is_link",
    "is_mount",
    "is_there",
    "names_in",
    "same",
    "walked",
]


_NOTHING = (errno.ENOENT, errno.ENOTDIR, errno.EBADF, errno.ELOOP)


def found(path: AnyPath) -> os.stat_result | None:
    """What the system says of what has this name, also through links; None if that leads to nothing."""
    try:
        return system.stat(path)
    except OSError as error:
        if error.errno not in _NOTHING:
            raise
    return None


def is_there(path: AnyPath) -> bool:
    """Whether something has this name, and is no link to nothing."""
    return found(path) is not None


def is_file(path: AnyPath) -> bool:
    """Whether it is a regular file, also through links."""
    there = found(path)
    return there is not None and stat.S_ISREG(there.st_mode)


def is_folder(path: AnyPath) -> bool:
    """Whether it is a folder, also through links."""
    there = found(path)
    return there is not None and stat.S_ISDIR(there.st_mode)


def is_link(path: AnyPath) -> bool:
    """Whether it is a link."""
    try:
        return stat.S_ISLNK(system.lstat(path).st_mode)
    except OSError as error:
        if error.errno not in _NOTHING:
            raise
    return False


def has_name(path: AnyPath) -> bool:
    """Whether something, be it a link to nothing, can be seen to have this name."""
    try:
        system.lstat(path)
    except (OSError, ValueError):  # ValueError: no file can have it
        return False
    return True


def same(path: AnyPath, other: os.stat_result | None) -> bool:
    """Whether what has this name is what something else was found to be."""
    there = found(path) if other is not None else None
    return there is not None and other is not None and os.path.samestat(there, other)


def is_mount(path: Path) -> bool:
    """Whether a disk is mounted at this folder."""
    there = found(path)
    if there is None or not stat.S_ISDIR(there.st_mode):
        return False
    around = found(path.parent)
    return around is not None and (there.st_dev != around.st_dev or os.path.samestat(there, around))


def names_in(folder: AnyPath) -> list[str]:
    """The names in a folder, sorted."""
    return sorted(system.listdir(folder))


def walked(folder: Path, *, strict: bool = True) -> Iterator[tuple[Path, list[str], list[str]]]:
    """A folder and those in it: each with the folders in it, links among them, and what else is there.

    Folders that the caller takes out of the list are not entered, nor are links. Unless `strict`, nor
    is what cannot be listed.
    """
    todo = [folder]
    while todo:  # no recursion: folders may be thousands of levels deep
        current = todo.pop()
        folders: list[str] = []
        others: list[str] = []
        try:
            entries = system.scandir(current)
        except OSError:
            if strict:
                raise
            continue
        for entry in entries:
            (folders if _leads_to_folder(entry) else others).append(entry.name)
        yield current, folders, others
        todo += [current / name for name in reversed(folders) if not is_link(current / name)]


def _leads_to_folder(entry: os.DirEntry[str]) -> bool:
    try:
        return entry.is_dir()
    except OSError:  # a link that leads nowhere
        return False
