"""The only place that asks the operating system to read or write.

Reads are positioned (`pread`), not mapped: a file that shrinks is then an error and not a
bus error, and what was read never counts as the resident memory of this process.
"""

from __future__ import annotations

import errno
import os
import shutil
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from streamshard.errors import InputError, ReadError, WriteError, printable

__all__ = ["ByteRange", "Files", "OutputFile", "disk_free", "read_bytes", "sync_folder"]

_BINARY = getattr(os, "O_BINARY", 0)
_CLOEXEC = getattr(os, "O_CLOEXEC", 0)


@dataclass(frozen=True, slots=True)
class ByteRange:
    """Bytes `[offset, offset + nbytes)` of the file at `path`, which is `file_nbytes` long."""

    path: str
    offset: int
    nbytes: int
    file_nbytes: int


class Files:
    """Input files, opened once each on first use; safe to share between threads.

    A file whose size is no longer what the plan saw raises `ReadError`.
    """

    def __init__(self) -> None:
        self._descriptors: dict[str, int] = {}
        self._lock = threading.Lock()

    def close(self) -> None:
        """Close every file."""
        for descriptor in self._descriptors.values():
            os.close(descriptor)
        self._descriptors.clear()

    def _descriptor(self, path: str, file_nbytes: int) -> int:
        descriptor = self._descriptors.get(path)
        if descriptor is not None:
            return descriptor
        with self._lock:
            if path not in self._descriptors:
                with reading(path):
                    descriptor = os.open(path, os.O_RDONLY | _BINARY | _CLOEXEC)
                    self._descriptors[path] = descriptor
                    self._check_size(path, descriptor, file_nbytes)
            return self._descriptors[path]

    @staticmethod
    def _check_size(path: str, descriptor: int, expected: int) -> None:
        found = os.fstat(descriptor).st_size
        if found != expected:
            raise ReadError(
                f"{printable(path)}: the file has {found:,} bytes now but had {expected:,} when it "
                "was planned. Something is writing to it: wait for that to end, then run again."
            )

    def check(self, source: ByteRange) -> None:
        """Raise `ReadError` if the file of `source` changed its size since it was planned."""
        descriptor = self._descriptor(source.path, source.file_nbytes)
        with reading(source.path):
            self._check_size(source.path, descriptor, source.file_nbytes)

    def read_into(self, source: ByteRange, out: memoryview) -> None:
        """Fill `out` (`source.nbytes` long) with the bytes of `source`."""
        descriptor = self._descriptor(source.path, source.file_nbytes)
        done = 0
        while done < source.nbytes:
            with reading(source.path):
                count = _pread_into(descriptor, out[done : source.nbytes], source.offset + done)
            if count == 0:
                self.check(source)
                raise ReadError(
                    f"{printable(source.path)}: the file ended at byte {source.offset + done:,}, "
                    f"{source.nbytes - done:,} bytes too early. It is truncated or being changed."
                )
            done += count


class OutputFile:
    """A new file of known length that may be written at any place, by several threads."""

    def __init__(self, path: Path, nbytes: int) -> None:
        self.path = path
        with writing(path, nbytes):
            flags = os.O_RDWR | os.O_CREAT | os.O_EXCL | _BINARY | _CLOEXEC
            self._descriptor = os.open(path, flags, 0o666)
            try:
                _allocate(self._descriptor, nbytes)
            except BaseException:
                os.close(self._descriptor)
                raise

    def write(self, data: memoryview, offset: int) -> None:
        """Write all of `data` at `offset`."""
        done = 0
        while done < len(data):
            with writing(self.path, len(data) - done):
                done += _pwrite(self._descriptor, data[done:], offset + done)

    def begin_sync(self, offset: int, nbytes: int) -> None:
        """Ask the system to start putting a range on disk, so that `sync` has less to wait for."""
        if hasattr(os, "posix_fadvise"):
            with writing(self.path, 0):
                # On Linux this starts writing dirty pages out; pages not yet clean stay cached.
                os.posix_fadvise(self._descriptor, offset, nbytes, os.POSIX_FADV_DONTNEED)

    def sync(self) -> None:
        """Wait until the disk has what was written."""
        with writing(self.path, 0):
            os.fsync(self._descriptor)

    def close(self) -> None:
        """Close the file; harmless if it is closed already."""
        if self._descriptor >= 0:
            os.close(self._descriptor)
            self._descriptor = -1


@contextmanager
def reading(path: str | Path) -> Iterator[None]:
    """Turn an `OSError` into one that names `path` and says what to do."""
    try:
        yield
    except FileNotFoundError as error:
        raise InputError(f"{printable(str(path))}: no such file. Check the path.") from error
    except IsADirectoryError as error:
        raise InputError(f"{printable(str(path))}: is a folder, a file was expected.") from error
    except OSError as error:
        raise ReadError(
            f"{printable(str(path))}: cannot be read: {error.strerror}. "
            "Check its permissions and the disk."
        ) from error


@contextmanager
def writing(path: str | Path, nbytes: int) -> Iterator[None]:
    """Turn an `OSError` into one that names `path` and says what to do."""
    try:
        yield
    except OSError as error:
        where = printable(str(path))
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            message = (
                f"{where}: no space left ({nbytes:,} bytes to write). "
                "Free some space, or choose an output on another disk."
            )
        else:
            message = f"{where}: cannot be written: {error.strerror}. Check permissions and disk."
        raise WriteError(message) from error


def read_bytes(path: Path, limit: int) -> bytes:
    """The whole of a small file; `InputError` if it has more than `limit` bytes."""
    with reading(path), path.open("rb") as file:
        data = file.read(limit + 1)
    if len(data) > limit:
        raise InputError(f"{printable(str(path))}: larger than {limit:,} bytes; not read.")
    return data


def copy_files(sources: Mapping[str, Path], target: Path) -> None:
    """Copy files, as bytes, to their names below `target`."""
    for name, source in sources.items():
        _copy_file(source, target / name)
    for folder in {(target / name).parent for name in sources} - {target}:
        sync_folder(folder)


def _copy_file(source: Path, copy: Path) -> None:
    with reading(source):
        file = source.open("rb")
    with file, writing(copy, 0):
        copy.parent.mkdir(parents=True, exist_ok=True)
        with copy.open("xb") as out:
            while True:
                with reading(source):  # an error of the source is not one of the output
                    block = file.read(1 << 20)
                if not block:
                    break
                out.write(block)
            out.flush()
            os.fsync(out.fileno())


def write_new(path: Path, data: bytes) -> None:
    """Write a new small file and wait until the disk has it."""
    file = OutputFile(path, len(data))
    try:
        file.write(memoryview(data), 0)
        file.sync()
    finally:
        file.close()


def disk_free(path: Path) -> int:
    """Bytes that may still be written to the disk which holds (or will hold) `path`."""
    existing = path
    while not existing.exists() and existing != existing.parent:
        existing = existing.parent
    with reading(existing):
        return shutil.disk_usage(existing).free


def sync_folder(path: Path) -> None:
    """Wait until the disk has the names in a folder; Windows has no such call."""
    if os.name != "nt":
        with writing(path, 0):
            descriptor = os.open(path, os.O_RDONLY)
            try:
                os.fsync(descriptor)
            finally:
                os.close(descriptor)


def _allocate(descriptor: int, nbytes: int) -> None:
    # Reserving the blocks first finds a full disk before hours of work, and writes to known
    # places run faster; file systems that cannot do it get a sparse file.
    os.ftruncate(descriptor, nbytes)
    if nbytes and hasattr(os, "posix_fallocate"):
        try:
            os.posix_fallocate(descriptor, 0, nbytes)
        except OSError as error:
            if error.errno not in (errno.EOPNOTSUPP, errno.EINVAL, errno.ENOSYS):
                raise


if hasattr(os, "preadv"):

    def _pread_into(descriptor: int, out: memoryview, offset: int) -> int:
        return os.preadv(descriptor, [out], offset)

    def _pwrite(descriptor: int, data: memoryview, offset: int) -> int:
        return os.pwrite(descriptor, data, offset)

else:  # Windows has no positioned calls in Python's os module
    _seek_lock = threading.Lock()

    def _pread_into(descriptor: int, out: memoryview, offset: int) -> int:
        with _seek_lock:
            os.lseek(descriptor, offset, os.SEEK_SET)
            data = os.read(descriptor, len(out))
        out[: len(data)] = data
        return len(data)

    def _pwrite(descriptor: int, data: memoryview, offset: int) -> int:
        with _seek_lock:
            os.lseek(descriptor, offset, os.SEEK_SET)
            return os.write(descriptor, data)
