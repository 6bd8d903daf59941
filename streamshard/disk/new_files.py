"""Files that are written: output files that appear when they are complete, and files that grow."""

from __future__ import annotations

import contextlib
import errno
import os
import stat
import threading
from collections.abc import Callable, Iterable
from pathlib import Path

from streamshard.disk.files import BLOCK_NBYTES, open_source
from streamshard.disk.system import NO_LINK, reading, system, writing
from streamshard.errors import OutputError, ReadError, WriteError

__all__ = ["LogFile", "OutputFile", "copy_file", "put", "write_all", "write_new"]


_OLD = os.O_RDWR | NO_LINK | getattr(os, "O_NONBLOCK", 0)
_NEW = os.O_RDWR | os.O_CREAT | os.O_EXCL | NO_LINK


class OutputFile:
    """A file of known length that may be written at any place, by several threads; a new one.

    `again` opens one that was made in that length before, here or by another process.
    """

    def __init__(self, path: Path, nbytes: int, *, again: bool = False) -> None:
        self.path = path
        self._closing = threading.Lock()
        if again:
            self._open_again(nbytes)
            return
        with writing(path, nbytes):
            try:
                self._descriptor = system.open(path, _NEW)
            except FileExistsError as error:
                raise OutputError.at(
                    path,
                    "is there already, and no run of ours has put it there. It "
                    "was left alone: move or remove it, then run again.",
                ) from error
            try:
                _allocate(self._descriptor, nbytes)
            except BaseException:
                self.abandon()
                raise

    def _open_again(self, nbytes: int) -> None:
        with writing(self.path, 0):
            self._descriptor = system.open(self.path, _OLD)
            try:
                _check_made(system.fstat(self._descriptor), nbytes)
            except BaseException:
                self.abandon()
                raise

    def __enter__(self) -> OutputFile:  # noqa: PYI034 - Self needs Python 3.11
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if kind is None:
            self.close()
        else:
            self.abandon()

    def write(self, data: memoryview, offset: int) -> None:
        """Write all of `data` at `offset`."""
        write_all(self._descriptor, self.path, data, offset)

    def write_among(self, data: memoryview, offset: int, begin: int, end: int) -> None:
        """The like, of data that comes in no order with everything between `begin` and `end`."""
        self.write(data, offset)

    def room(self, offset: int, nbytes: int) -> memoryview | None:
        """Where to put bytes instead of writing them; None if that is no use."""
        return None

    def filled(self, offset: int, nbytes: int) -> None:
        """Take note of bytes that are in their room now."""

    def read_into(self, out: memoryview, offset: int) -> None:
        """Fill `out` with what was written at `offset`."""
        done = 0
        while done < len(out):
            with reading(self.path):
                count = system.pread(self._descriptor, out[done:], offset + done)
            if not count:
                raise ReadError.at(
                    self.path,
                    f"the file ended at byte {offset + done:,} while it was "
                    "being written. Something else changes it: wait for that to end, then run again.",
                )
            done += count

    def begin_sync(self, offset: int, nbytes: int) -> None:
        """Ask the system to start putting a range on disk, so that `sync` has less to wait for."""
        with writing(self.path, 0):
            system.begin_sync(self._descriptor, offset, nbytes)

    def sync(self) -> None:
        """Wait until the disk has what was written."""
        with writing(self.path, 0):
            system.fsync(self._descriptor)

    def close(self) -> None:
        """Close the file; harmless if it is closed already, or by another thread."""
        with self._closing:  # once: its number may be that of another file by then
            descriptor, self._descriptor = self._descriptor, -1
        if descriptor >= 0:
            with writing(self.path, 0):
                system.close(descriptor)

    def abandon(self) -> None:
        """Close the file because of an error, which another one shall not hide."""
        with contextlib.suppress(WriteError):
            self.close()


def _check_made(found: os.stat_result, nbytes: int) -> None:
    if not stat.S_ISREG(found.st_mode) or found.st_size != nbytes:
        raise OSError(errno.ESTALE, "it is not the file that this run has made")


class LogFile:
    """A file that only grows, from its first `nbytes` bytes on; what comes after these is dropped.

    A new one must not be there yet; one that is there is looked at by `check` before it is changed.
    """

    def __init__(
        self, path: Path, nbytes: int, check: Callable[[os.stat_result], None] | None = None
    ) -> None:
        self.path = path
        self._end = nbytes
        with writing(path, 0):
            self._descriptor = system.open(path, _NEW if check is None else _OLD)
            try:
                if check is not None:
                    check(system.fstat(self._descriptor))
                system.truncate(self._descriptor, nbytes)
            except BaseException:
                self.close()
                raise

    def append(self, data: bytes) -> None:
        """Add `data` and wait until the disk has it."""
        put(self._descriptor, self.path, data, self._end)
        self._end += len(data)

    def close(self) -> None:
        """Close the file; harmless if it is closed already."""
        descriptor, self._descriptor = self._descriptor, -1
        if descriptor >= 0:
            with contextlib.suppress(OSError):  # every line is on disk already
                system.close(descriptor)


def put(descriptor: int, path: Path, data: bytes, offset: int) -> None:
    """Write `data` at a place of an open file and wait until the disk has it."""
    write_all(descriptor, path, memoryview(data), offset)
    with writing(path, len(data)):
        system.fsync(descriptor)


def write_all(descriptor: int, path: Path, data: memoryview, offset: int) -> None:
    """Write `data` at a place of an open file."""
    done = 0
    while done < len(data):
        with writing(path, len(data) - done):
            count = system.pwrite(descriptor, data[done:], offset + done)
            if not count:
                raise OSError(errno.EIO, "nothing was written")
        done += count


def copy_file(source: Path, copy: Path) -> None:
    """Copy the bytes of a file to a new one and wait until the disk has them."""
    with open_source(source) as file, OutputFile(copy, file.nbytes) as out:
        for offset in range(0, file.nbytes, BLOCK_NBYTES):
            block = file.read(offset, min(BLOCK_NBYTES, file.nbytes - offset))
            out.write(memoryview(block), offset)
        file.check()
        out.sync()


def write_new(path: Path, pieces: Iterable[bytes]) -> None:
    """Write a new small file, piece after piece, and wait until the disk has it."""
    with OutputFile(path, 0) as file:
        offset = 0
        for piece in pieces:
            file.write(memoryview(piece), offset)
            offset += len(piece)
        file.sync()


def _allocate(descriptor: int, nbytes: int) -> None:
    # Reserving the blocks first finds a full disk before hours of work, and writes to known
    # places run faster; file systems that cannot do it get a sparse file.
    system.truncate(descriptor, nbytes)
    if nbytes:
        try:
            system.allocate(descriptor, nbytes)
        except OSError as error:
            if error.errno not in (errno.EOPNOTSUPP, errno.EINVAL, errno.ENOSYS):
                raise
