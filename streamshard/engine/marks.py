"""By what a file that was read again is known to be as it was then, on any machine that sees it."""

from __future__ import annotations

import contextlib
from pathlib import Path
from typing import NamedTuple

from streamshard.disk.system import system

__all__ = ["Mark", "mark_of"]


class Mark(NamedTuple):
    """Length, and when the content was changed: renames leave both, and machines agree on them."""

    nbytes: int
    mtime_ns: int


def mark_of(file: Path) -> Mark | None:
    """What a file is like now; None if that cannot be told."""
    with contextlib.suppress(OSError):
        found = system.lstat(file)
        return Mark(found.st_size, found.st_mtime_ns)
    return None
