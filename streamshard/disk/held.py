"""Folders that are held open, so that what is done in them is done in them and nowhere else.

Paths are looked up anew by every call: whoever may write to the folder around an output could put a
link to somewhere else in the place of the folder in which it is built, between one call and the next.
So that folder is opened once, and calls are made relative to its descriptor; the last part of a path
in it is never followed if it is a link. Where a platform has no such calls, the folder's identity is
compared directly before each of them instead, which leaves a very short time to whoever is at it.
"""

from __future__ import annotations

import errno
import os
import threading
from typing import TypeAlias

from streamshard.values import frozen

__all__ = ["RELATIVE", "Held", "Inode", "holder", "inode", "let_go", "register"]


Inode: TypeAlias = tuple[int, int]

RELATIVE = {os.open, os.mkdir, os.rmdir, os.unlink, os.rename, os.stat} <= os.supports_dir_fd
"""Whether calls can be made relative to an open folder; not on Windows."""

_held: tuple[Held, ...] = ()
_changing = threading.Lock()


@frozen(eq=False)
class Held:
    """A folder by its path, its identity, and its descriptor; None where folders cannot be opened."""

    path: str
    inode: Inode
    descriptor: int | None

    def inside(self, path: str) -> tuple[str, int | None]:
        """A path in this folder as calls are to be given it, and the folder to which it is relative."""
        if self.descriptor is not None:
            return path[len(self.path) + 1 :] or ".", self.descriptor
        if inode(os.lstat(self.path)) != self.inode:
            raise OSError(errno.ESTALE, "something else has been put in its place", self.path)
        return path, None


def inode(found: os.stat_result) -> Inode:
    """What a file or folder keeps, whatever it is called."""
    return found.st_dev, found.st_ino


def holder(path: str, *, itself: bool = False) -> Held | None:
    """The innermost folder held that `path` is in, or, if `itself`, that it is."""
    best = None
    for held in _held:
        folder = held.path
        within = path.startswith(folder) and path[len(folder) : len(folder) + 1] == os.sep
        # Of a folder that is held twice the last one counts.
        if (within or (itself and path == folder)) and (
            best is None or len(folder) >= len(best.path)
        ):
            best = held
    return best


def register(held: Held) -> None:
    """From now on calls for paths in this folder go by its descriptor."""
    global _held  # noqa: PLW0603 - replaced and never changed: other threads are going through it
    with _changing:
        _held = (*_held, held)


def let_go(held: Held) -> None:
    """The end of that; closing the descriptor is left to who has opened it."""
    global _held  # noqa: PLW0603 - likewise
    with _changing:
        _held = tuple(one for one in _held if one is not held)
