"""Files that are mapped into memory: read in place, in windows that are handed back when consumed.

That saves a copy of every byte. It is done where it is known to be good: on local file systems, for
files of more than one window, where the kernel can say that bytes are missing (see `_mapping.c`), and
as long as it is fast. Measured: where the page cache has a file in large pages, as it has what Linux 6.16
has read ahead on ext4, a digest takes 0.030 ns a byte of a mapping and 0.051 by reads of 256 KB; where it
has small ones, as of what was written in small parts, 0.084 and 0.061, as every page is mapped by itself.
So windows are timed. What is not mapped is read by positioned reads (`pread`), with the same bytes.
`STREAMSHARD_READ` forces one.

A file that shrinks while it is mapped is an error and not a bus error: windows are asked for before
they are touched, and whoever has looked at one is told, before anything is made of it, if it was gone.
"""

from __future__ import annotations

import contextlib
import os
import sys
import time
from collections.abc import Iterator

from streamshard.disk.system import system
from streamshard.errors import UsageError

if sys.platform == "linux":
    import resource

try:
    from streamshard.disk import _mapping
except ImportError:  # another system, an older kernel, or installed without a compiler
    _mapping = None  # type: ignore[assignment]

__all__ = ["WINDOW_NBYTES", "Mapped", "check_choice", "mapped"]


WINDOW_NBYTES = 2 * 1024 * 1024
"""The size of a large page, which the kernel maps at once where a window lies in one."""
_SAMPLE_NBYTES = 128 * 1024  # what Linux reads ahead at least
# A window of large pages takes 5 microseconds, one of small pages 60 and more; so many in a row, and the
# rest of the file is read.
_SLOW_NS = 30_000
_PATIENCE = 8
_CHOICES = ("auto", "mmap", "pread")
# By their numbers: ext2 to 4, XFS, Btrfs, F2FS, bcachefs, tmpfs, ramfs, overlay, FAT, exFAT, NTFS, JFS,
# ReiserFS, NILFS, SquashFS, EROFS, ISO 9660, UDF. In a network bytes may be missing at any time, and ZFS
# has a cache of its own, to which a mapping adds a second copy.
_LOCAL = {
    *(0xEF53, 0x58465342, 0x9123683E, 0xF2F52010, 0xCA451A4E, 0x01021994, 0x858458F6, 0x794C7630),
    *(0x4D44, 0x2011BAB0, 0x5346544E, 0x7366746E, 0x3153464A, 0x52654973, 0x3434, 0x73717368),
    *(0xE0F5E1E2, 0x9660, 0x15013346),
}


def _choice() -> str:
    return os.environ.get("STREAMSHARD_READ") or "auto"


def check_choice() -> None:
    """Raise `UsageError` if the environment asks for a way to read that there is not."""
    choice = _choice()
    if choice not in _CHOICES:
        raise UsageError(
            f"STREAMSHARD_READ is {choice!r}; {', '.join(_CHOICES)} can be chosen. Leave it out: "
            "outputs do not depend on it."
        )
    if choice == "mmap" and _mapping is None:
        raise UsageError(
            "STREAMSHARD_READ is 'mmap', which this installation cannot: it takes Linux 5.14 and the "
            "compiled part of streamshard. Leave it out: outputs do not depend on it."
        )


class Mapped:
    """An open file in memory; safe to share between threads.

    What the page cache did not have when the file was opened is not mapped, as the system reads ahead
    better for those who read. With `spare` it is not left there either.
    """

    def __init__(self, descriptor: int, nbytes: int, *, spare: bool) -> None:
        self._descriptor, self.nbytes, self._spare = descriptor, nbytes, spare
        self._patience = _PATIENCE
        self._mapping = system.map(descriptor, nbytes)
        try:
            self._absent = self._mapping.absent(WINDOW_NBYTES, _SAMPLE_NBYTES)
        except BaseException:
            self._mapping.close()
            raise

    @property
    def lost(self) -> bool:
        """Whether bytes that somebody has looked at were gone."""
        return self._mapping.lost

    def bytes(self, offset: int, nbytes: int) -> memoryview:
        """A range of it, all of whose windows are populated; for one thread.

        Not a slice of a view that others slice: without a GIL Python loses count of these, and would
        hand the mapping back while somebody looks at it.
        """
        return memoryview(self._mapping)[offset : offset + nbytes]

    def populate(self, window: int) -> bool:
        """Have a window in memory; False if it is to be read instead."""
        if self._absent[window] or not self._patience:
            return False
        begin = window * WINDOW_NBYTES
        nbytes = min(WINDOW_NBYTES, self.nbytes - begin)
        started = time.perf_counter_ns()
        try:
            system.populate(self._descriptor, self._mapping, begin, nbytes)
        except OSError:  # reading it will tell why
            return False
        if _choice() == "auto":
            slow = time.perf_counter_ns() - started > _SLOW_NS
            self._patience = self._patience - 1 if slow else _PATIENCE
        return True

    def drop(self, window: int) -> None:
        """Hand a window back; harmless if it is used again, by whomever."""
        begin = window * WINDOW_NBYTES
        nbytes = min(WINDOW_NBYTES, self.nbytes - begin)
        with contextlib.suppress(OSError, ValueError):  # it is closed by now
            if not self._absent[window]:
                self._mapping.drop(begin, nbytes)
            elif self._spare:
                system.uncache(self._descriptor, begin, nbytes)

    def close(self) -> None:
        """Unmap the file, when nobody looks at it any more."""
        if self._spare:
            # What was read ahead, and what several have read.
            for begin, end in _runs(self._absent):
                with contextlib.suppress(OSError):
                    at = begin * WINDOW_NBYTES
                    system.uncache(self._descriptor, at, (end - begin) * WINDOW_NBYTES)
        self._spare = False  # the descriptor may become that of another file
        self._mapping.close()


def _runs(flags: bytes) -> Iterator[tuple[int, int]]:
    """Where there are ones.

    >>> list(_runs(bytes([0, 1, 1, 0, 1])))
    [(1, 3), (4, 5)]
    """
    end = 0
    while (begin := flags.find(1, end)) >= 0:
        end = flags.find(0, begin)
        end = len(flags) if end < 0 else end
        yield begin, end


def mapped(descriptor: int, nbytes: int, *, spare: bool = False) -> Mapped | None:
    """An open file of so many bytes in memory, or None if it is to be read otherwise."""
    choice = _choice()
    if _mapping is None or choice == "pread" or not nbytes:
        return None
    try:
        if choice == "auto" and (
            nbytes <= WINDOW_NBYTES
            or _mapping.file_system(descriptor) not in _LOCAL
            or _counts_addresses()
        ):
            return None
        return Mapped(descriptor, nbytes, spare=spare)
    except OSError:
        return None


def _counts_addresses() -> bool:
    """Whether a limit of this process counts what is mapped, as if it were memory."""
    return resource.getrlimit(resource.RLIMIT_AS)[0] != resource.RLIM_INFINITY
