"""Is this ours? The one place that decides whether what lies where we write was made by a run of ours.

A file or folder is ours if it is one and no link to one, belongs to the user that we act for (root is no
exception), is not to be written to by others (beyond what the umask grants to new files), and, for
files, has no second name by which it would be somewhere else as well. Anything else is refused by
name and left as it is.

Some disks cannot say: FAT, CIFS and the like show one owner and mode for everything, and servers
may map users. So what does not fit is compared with a file made just then, in the same place.
"""

from __future__ import annotations

import os
import stat
from pathlib import Path

from streamshard.disk.existence import is_there
from streamshard.disk.system import PRIVATE, system, writing
from streamshard.errors import OutputError, WriteError, printable

__all__ = ["Ours", "kind_of"]


_NEW = os.O_RDWR | os.O_CREAT | os.O_EXCL
_WIDER = "can be written to by others"
_OTHERS_WRITE = stat.S_IWGRP | stat.S_IWOTH


class Ours:
    """Decides for what lies in a folder, or in folders in it."""

    def __init__(self, around: Path) -> None:
        self._around = around
        self._made: dict[int, os.stat_result | None] = {}

    def check(self, found: os.stat_result, path: Path, *, folder: bool = False) -> None:
        """Raise `OutputError` unless what was found at `path` is a file (or `folder`) of ours."""
        wrong = _kind_is_wrong(found, folder=folder) or self._is_foreign(found, folder=folder)
        if wrong is not None and wrong.startswith(_WIDER):
            raise OutputError(
                f"{printable(str(path))}: {wrong}, more than the umask ({_umask():04o}) lets new ones "
                "be. It was left alone, and nothing was written. If a run of yours has made it under "
                "another umask, run again under that one, or remove the folder in which that run was "
                "building; else move or remove it, or choose another output."
            )
        if wrong:
            raise OutputError(
                f"{printable(str(path))}: {wrong}, so no run of this user has made it as it is. It was "
                "left alone, and nothing was written: move or remove it, or choose another output."
            )

    def check_file(self, path: Path) -> None:
        """The like for a file by its path."""
        self.check(_looked_at(path), path)

    def check_folder(self, path: Path) -> None:
        """The like for a folder by its path."""
        self.check(_looked_at(path), path, folder=True)

    def is_private(self, found: os.stat_result) -> bool:
        """Whether a file has the mode with which private files are made here."""
        mode = stat.S_IMODE(found.st_mode)
        if os.name == "nt" or mode == 0o600 & ~_umask():
            return True
        made = self._fresh(PRIVATE)
        return made is not None and mode == stat.S_IMODE(made.st_mode)

    def _is_foreign(self, found: os.stat_result, *, folder: bool) -> str | None:
        """What of it does not fit, not even to a file that was made just now."""
        wrong = _misfit(found, folder=folder)
        if wrong is None:
            return None
        made = self._fresh(0)
        return wrong if made is None else _misfit(found, folder=folder, made=made)

    def _fresh(self, flags: int) -> os.stat_result | None:
        """What a file is like that is made here now; None if none can be made."""
        if flags not in self._made:
            self._made[flags] = _probe(self._around, flags)
        return self._made[flags]


def kind_of(found: os.stat_result) -> str:
    """What something is, in words."""
    kinds = {
        stat.S_IFLNK: "a symbolic link",
        stat.S_IFDIR: "a folder",
        stat.S_IFREG: "a file",
        stat.S_IFIFO: "a pipe",
        stat.S_IFSOCK: "a socket",
    }
    return kinds.get(stat.S_IFMT(found.st_mode), "a device")


def _looked_at(path: Path) -> os.stat_result:
    with writing(path, 0):
        return system.lstat(path)


def _kind_is_wrong(found: os.stat_result, *, folder: bool) -> str | None:
    right = stat.S_ISDIR(found.st_mode) if folder else stat.S_ISREG(found.st_mode)
    expected = "a folder" if folder else "a file"
    return None if right else f"is {kind_of(found)} where {expected} is to be"


def _misfit(
    found: os.stat_result, *, folder: bool, made: os.stat_result | None = None
) -> str | None:
    """What does not fit our user and umask, or the file that was `made` here just now."""
    if not folder and found.st_nlink > max(made.st_nlink if made else 1, 1):
        return f"has {found.st_nlink} names (hard links)"
    if os.name == "nt":  # neither owners nor modes
        return None
    user = os.geteuid() if made is None else made.st_uid
    if found.st_uid != user:
        return f"belongs to user {found.st_uid} and not to {os.geteuid()}"
    granted = ~_umask() if made is None else made.st_mode
    if found.st_mode & _OTHERS_WRITE and found.st_mode & _OTHERS_WRITE & ~granted:
        return f"{_WIDER} (its mode is {stat.S_IMODE(found.st_mode):04o})"
    return None


def _probe(folder: Path, flags: int) -> os.stat_result | None:
    path = folder / f".streamshard-{os.urandom(8).hex()}.probe"
    try:
        descriptor = system.open(path, _NEW | flags)
    except OSError:
        return None
    try:
        return system.fstat(descriptor)
    except OSError:
        return None
    finally:
        _remove(path, descriptor)


def _remove(path: Path, descriptor: int) -> None:
    try:
        system.close(descriptor)
        system.unlink(path)
    except OSError as error:
        raise WriteError(
            f"{printable(str(path))}: an empty file that was made to see what this disk can tell, and "
            f"cannot be removed: {error.strerror}. Remove it."
        ) from error


def _umask() -> int:
    """The bits that new files do not get."""
    try:
        for line in system.read_text("/proc/self/status").splitlines():
            if line.startswith("Umask:"):
                return int(line.split()[1], 8)
    except (OSError, ValueError):
        pass
    return _AT_START


def _umask_by_setting() -> int:
    mask = os.umask(0o077)
    os.umask(mask)
    return mask


# Elsewhere than on Linux it can only be told by setting it, which is safe before there are threads.
_AT_START = 0o022 if is_there("/proc/self/status") else _umask_by_setting()
