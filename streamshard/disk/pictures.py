"""Small files that people name, like pictures: written beside their place and renamed into it."""

from __future__ import annotations

import contextlib
import errno
import os
import stat
from pathlib import Path

from streamshard.disk.existence import found
from streamshard.disk.folders import make_folders, remove_empty, sync_folder
from streamshard.disk.new_files import write_new
from streamshard.disk.system import system, writing

__all__ = ["check_place", "put_in_place"]


def check_place(file: Path) -> None:
    """Raise `WriteError` if a file of this name could not be made; an old file there may be replaced."""
    with writing(file, 0):
        there, around = found(file), file.parent
        while (folder := found(around)) is None and around != around.parent:
            around = around.parent  # what is missing is made
        if there is not None and not stat.S_ISREG(there.st_mode):
            raise OSError(errno.EISDIR, "something that is no file has this name", str(file))
        if folder is None:
            raise FileNotFoundError(errno.ENOENT, "there is no such folder", str(around))
        if not stat.S_ISDIR(folder.st_mode):
            raise NotADirectoryError(errno.ENOTDIR, "is no folder", str(around))
        if not system.may_change(around):
            raise PermissionError(errno.EACCES, "nothing can be made in it", str(around))


def put_in_place(file: Path, content: bytes) -> None:
    """Write a file that appears complete or not at all, in the place of an old one if there is one."""
    file = system.resolve(file)  # a link stays one
    new = file.with_name(f".{file.name[:200]}.{os.getpid()}.new")
    with writing(file, len(content)):
        made = make_folders(file.parent)
    try:
        write_new(new, [content])
        with writing(file, len(content)):
            system.rename(new, file)
    except BaseException:
        with contextlib.suppress(OSError):
            system.unlink(new)
        remove_empty(made)
        raise
    sync_folder(file.parent)
