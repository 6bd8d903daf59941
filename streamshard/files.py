"""The only place that asks the operating system to read or write.

Every call goes through `system`, one method a call, so that a test can put something else in the
place of each of these methods: fail it, or end the process there. What lies in a folder that is held
(see `streamshard.held`) is reached by that folder's descriptor. Reads are positioned (`pread`),
not mapped: a file that shrinks is then an error and not a bus error, and what was read never
counts as the resident memory of this process.
"""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import io
import os
import shutil
import stat
import sys
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, TypeAlias

from streamshard.errors import (
    InputError,
    OutOfMemoryError,
    OutputError,
    ReadError,
    WriteError,
    printable,
)
from streamshard.held import RELATIVE, Held, Inode, holder, inode, let_go, register
from streamshard.inputs import Inputs, Stamp, active, changed

if TYPE_CHECKING:
    from typing_extensions import Buffer

if sys.platform == "win32":
    import msvcrt
else:
    import fcntl

__all__ = [
    "NO_LINK",
    "PRIVATE",
    "ByteRange",
    "Files",
    "InputFile",
    "LogFile",
    "OutputFile",
    "System",
    "copy_file",
    "disk_free",
    "exists",
    "file_nbytes",
    "held",
    "inode_of",
    "make_folders",
    "put",
    "read_bytes",
    "reading",
    "remove_empty",
    "rename",
    "sync_folder",
    "system",
    "write_new",
    "writing",
]

AnyPath: TypeAlias = "str | Path"

COPY_NBYTES = 256 * 1024
NO_LINK = getattr(os, "O_NOFOLLOW", 0)
PRIVATE = 1 << 30
"""Beside the flags of the system: a new file is for its owner alone."""
_READ = os.O_RDONLY | getattr(os, "O_NONBLOCK", 0)  # a pipe with a weight's name must not hang us
_OLD = os.O_RDWR | NO_LINK | getattr(os, "O_NONBLOCK", 0)
_NEW = os.O_RDWR | os.O_CREAT | os.O_EXCL | NO_LINK
_ALWAYS = getattr(os, "O_BINARY", 0) | getattr(os, "O_CLOEXEC", 0)
_FAR = 1 << 30
_GONE = (errno.ENOENT, errno.ENOTDIR, errno.ELOOP)


class System:
    """The operating system: each method is one call and raises the `OSError` of that call."""

    def open(self, path: AnyPath, flags: int) -> int:
        """A descriptor; new files get the mode that the umask leaves, or that of `PRIVATE` ones."""
        mode = 0o600 if flags & PRIVATE else 0o666
        flags = flags & ~PRIVATE | _ALWAYS
        with _inside(path, itself=True) as (name, folder):
            if folder is None:
                return os.open(name, flags, mode)
            return os.open(name, flags | NO_LINK, mode, dir_fd=folder)

    def close(self, descriptor: int) -> None:
        os.close(descriptor)

    def fstat(self, descriptor: int) -> os.stat_result:
        return os.fstat(descriptor)

    def stat(self, path: AnyPath) -> os.stat_result:
        return os.stat(path)

    def lstat(self, path: AnyPath) -> os.stat_result:
        with _inside(path) as (name, folder):
            return os.lstat(name, dir_fd=folder)

    def pread(self, descriptor: int, out: memoryview, offset: int) -> int:
        """How many bytes were read into `out`; 0 at the end of the file."""
        return _pread_into(descriptor, out, offset)

    def pwrite(self, descriptor: int, data: memoryview, offset: int) -> int:
        """How many bytes of `data` were written."""
        return _pwrite(descriptor, data, offset)

    def truncate(self, descriptor: int, nbytes: int) -> None:
        os.ftruncate(descriptor, nbytes)

    def allocate(self, descriptor: int, nbytes: int) -> None:
        """Reserve the disk blocks of a file."""
        if hasattr(os, "posix_fallocate"):
            os.posix_fallocate(descriptor, 0, nbytes)

    def begin_sync(self, descriptor: int, offset: int, nbytes: int) -> None:
        """Start putting a range on disk."""
        if hasattr(os, "posix_fadvise"):
            # On Linux this starts writing dirty pages out; pages not yet clean stay cached.
            os.posix_fadvise(descriptor, offset, nbytes, os.POSIX_FADV_DONTNEED)

    def fsync(self, descriptor: int) -> None:
        os.fsync(descriptor)

    def lock(self, descriptor: int) -> None:
        """Lock an open file, or raise `BlockingIOError` or `PermissionError` at once."""
        if sys.platform == "win32":
            os.lseek(descriptor, _FAR, os.SEEK_SET)  # what is locked cannot be read
            msvcrt.locking(descriptor, msvcrt.LK_NBLCK, 1)
        else:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)

    def listdir(self, path: AnyPath) -> list[str]:
        with _inside(path, itself=True) as (name, folder):
            return os.listdir(folder if folder is not None and name == "." else path)

    def mkdir(self, path: AnyPath) -> None:
        with _inside(path) as (name, folder):
            os.mkdir(name, dir_fd=folder)

    def rmdir(self, path: AnyPath) -> None:
        with _inside(path) as (name, folder):
            os.rmdir(name, dir_fd=folder)

    def unlink(self, path: AnyPath) -> None:
        with _inside(path) as (name, folder):
            os.unlink(name, dir_fd=folder)

    def rename(self, path: AnyPath, other: AnyPath) -> None:
        """Give another name, taking the place of a file but not of a folder that has something in it."""
        with _inside(path) as (old, here), _inside(other) as (new, there):
            os.replace(old, new, src_dir_fd=here, dst_dir_fd=there)

    def disk_free(self, path: AnyPath) -> int | None:
        """Bytes that are free; None where the disk does not tell (ramfs, and some others in memory)."""
        try:
            usage = shutil.disk_usage(path)
        except OSError as error:
            if error.errno in (errno.ENOSYS, errno.EOPNOTSUPP):
                return None
            raise
        return usage.free if usage.total else None


@contextmanager
def _inside(path: AnyPath, *, itself: bool = False) -> Iterator[tuple[AnyPath, int | None]]:
    """A path as a call is to be given it, and the open folder to which it is relative, if any.

    Errors name the whole path.
    """
    held = holder(str(path), itself=itself)
    if held is None:
        yield path, None
        return
    try:
        yield held.inside(str(path))
    except OSError as error:
        error.filename = str(path)
        raise


system = System()


@dataclass(frozen=True, slots=True)
class ByteRange:
    """Bytes `[offset, offset + nbytes)` of the file at `path`, which is `file_nbytes` long."""

    path: str
    offset: int
    nbytes: int
    file_nbytes: int


class InputFile:
    """A regular file to read from, at any place, by several threads.

    It is noted in `inputs`, by default those that are active where it is opened: a `ChangedError`
    says that it is not what had this name before.
    """

    def __init__(self, path: AnyPath, inputs: Inputs | None = None) -> None:
        self.path = path
        self._inputs = active() if inputs is None else inputs
        with reading(path):
            self._descriptor = self._open()
            try:
                found = system.fstat(self._descriptor)
                self.stamp = Stamp.of(found)
                _check_regular(path, found.st_mode)
                if self._inputs is not None and not self._inputs.note(self):
                    self._inputs = None
            except BaseException:
                self.release()
                raise
        self.nbytes = self.stamp.nbytes

    def _open(self) -> int:
        try:
            return system.open(self.path, _READ)
        except OSError as error:
            full = error.errno in (errno.EMFILE, errno.ENFILE)
            if not full or self._inputs is None or not self._inputs.let_go():
                raise
            return system.open(self.path, _READ)

    def __enter__(self) -> InputFile:  # noqa: PYI034 - Self needs Python 3.11
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        try:
            # What is wrong with its content may be that it was half written.
            if self._inputs is not None and (kind is None or issubclass(kind, InputError)):
                self.check()
        finally:
            self.close()

    def close(self) -> None:
        """Close the file; harmless if it is closed already."""
        if self._descriptor < 0 or self._inputs is None or not self._inputs.hold(self):
            self.release()

    def release(self) -> None:
        """Give the descriptor back, which those who note inputs may have kept."""
        descriptor, self._descriptor = self._descriptor, -1
        if descriptor >= 0:
            with contextlib.suppress(OSError):  # nothing was written
                system.close(descriptor)

    def _now(self) -> Stamp:
        with reading(self.path):
            return Stamp.of(system.fstat(self._descriptor))

    def stamp_again(self) -> None:
        """Take the stamp that the file has by now."""
        self.stamp = self._now()

    def named(self) -> Stamp | None:
        """The stamp of what has the file's name by now, also through a link; None if nothing has."""
        try:
            with reading(self.path):
                return Stamp.of(system.stat(self.path))
        except (InputError, ReadError) as error:
            cause = error.__cause__
            if isinstance(cause, OSError) and cause.errno in _GONE:
                return None
            raise

    def check(self) -> None:
        """Raise `ChangedError` if the file is no longer as it was when it was opened."""
        if (now := self._now()) != self.stamp:
            raise changed(self.path, self.stamp, now)

    def read_into(self, out: memoryview, offset: int) -> int:
        """Fill `out` from `offset` on; fewer bytes than asked for only at the end of the file.

        Raises `ReadError` if that comes earlier than when the file was opened.
        """
        done = 0
        while done < len(out):
            with reading(self.path):
                count = system.pread(self._descriptor, out[done:], offset + done)
            if not count:
                break
            done += count
        if done < len(out) and offset + done < self.nbytes:
            self.check()
            raise ReadError(
                f"{printable(str(self.path))}: the file ended at byte {offset + done:,}, "
                f"{self.nbytes - offset - done:,} bytes too early. It is truncated or being changed."
            )
        return done

    def stream(self) -> io.BufferedReader:
        """The file as Python has files, for those who read no others; closing it closes nothing."""
        return io.BufferedReader(_Raw(self))

    def read(self, offset: int, nbytes: int) -> bytes:
        """Up to `nbytes` bytes from `offset` on."""
        # Of all ways to fill bytes this one copies nothing: headers may have 100 MB.
        out = io.BytesIO(bytes(nbytes))
        with out.getbuffer() as buffer:
            count = self.read_into(buffer, offset)
        out.truncate(count)
        return out.getvalue()


def _check_regular(path: AnyPath, mode: int) -> None:
    if not stat.S_ISREG(mode):
        what = "a folder" if stat.S_ISDIR(mode) else "no regular file"
        raise InputError(f"{printable(str(path))}: is {what}, a file was expected.")


class _Raw(io.RawIOBase):
    """An input file that is read from one place after the other."""

    def __init__(self, file: InputFile) -> None:
        super().__init__()
        self._file = file
        self._at = 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._at

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        start = {io.SEEK_SET: 0, io.SEEK_CUR: self._at, io.SEEK_END: self._file.nbytes}[whence]
        self._at = max(start + offset, 0)
        return self._at

    def readinto(self, buffer: Buffer) -> int:
        count = self._file.read_into(memoryview(buffer).cast("B"), self._at)
        self._at += count
        return count


class Files:
    """Input files, opened once each on first use; safe to share between threads.

    A file that is not what the plan saw raises `ChangedError`: by the inputs that were active where this
    was made, by its size, and by `stamps`, for those who have no more of a plan than these.
    """

    def __init__(self, stamps: Mapping[str, Stamp] | None = None) -> None:
        self._stamps = stamps or {}
        self._inputs = active()
        self._files: dict[str, InputFile] = {}
        self._lock = threading.Lock()

    def close(self) -> None:
        """Close every file."""
        for file in self._files.values():
            file.close()
        self._files.clear()

    def _file(self, path: str, file_nbytes: int) -> InputFile:
        file = self._files.get(path)
        if file is not None:
            return file
        with self._lock:
            if path not in self._files:
                file = InputFile(path, self._inputs)
                try:
                    self._check_planned(file, file_nbytes)
                except BaseException:
                    file.close()
                    raise
                self._files[path] = file
            return self._files[path]

    def _check_planned(self, file: InputFile, file_nbytes: int) -> None:
        expected = self._stamps.get(str(file.path), file.stamp)
        if expected == file.stamp:
            expected = dataclasses.replace(expected, nbytes=file_nbytes)
        if expected != file.stamp:
            raise changed(file.path, expected, file.stamp)

    def check(self, source: ByteRange) -> None:
        """Raise `ChangedError` if the file of `source` has changed since it was planned."""
        self._file(source.path, source.file_nbytes).check()

    def read_into(self, source: ByteRange, out: memoryview) -> None:
        """Fill `out` (`source.nbytes` long) with the bytes of `source`."""
        file = self._file(source.path, source.file_nbytes)
        file.read_into(out[: source.nbytes], source.offset)


class OutputFile:
    """A new file of known length that may be written at any place, by several threads."""

    def __init__(self, path: Path, nbytes: int) -> None:
        self.path = path
        with writing(path, nbytes):
            try:
                self._descriptor = system.open(path, _NEW)
            except FileExistsError as error:
                raise OutputError(
                    f"{printable(str(path))}: is there already, and no run of ours has put it there. It "
                    "was left alone: move or remove it, then run again."
                ) from error
            try:
                _allocate(self._descriptor, nbytes)
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
        _write_all(self._descriptor, self.path, data, offset)

    def read_into(self, out: memoryview, offset: int) -> None:
        """Fill `out` with what was written at `offset`."""
        done = 0
        while done < len(out):
            with reading(self.path):
                count = system.pread(self._descriptor, out[done:], offset + done)
            if not count:
                raise ReadError(
                    f"{printable(str(self.path))}: the file ended at byte {offset + done:,} while it was "
                    "being written. Something else changes it: wait for that to end, then run again."
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
        """Close the file; harmless if it is closed already."""
        descriptor, self._descriptor = self._descriptor, -1
        if descriptor >= 0:
            with writing(self.path, 0):
                system.close(descriptor)

    def abandon(self) -> None:
        """Close the file because of an error, which another one shall not hide."""
        with contextlib.suppress(WriteError):
            self.close()


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
    _write_all(descriptor, path, memoryview(data), offset)
    with writing(path, len(data)):
        system.fsync(descriptor)


def _write_all(descriptor: int, path: Path, data: memoryview, offset: int) -> None:
    done = 0
    while done < len(data):
        with writing(path, len(data) - done):
            count = system.pwrite(descriptor, data[done:], offset + done)
            if not count:
                raise OSError(errno.EIO, "nothing was written")
        done += count


@contextmanager
def reading(path: AnyPath) -> Iterator[None]:
    """Turn an `OSError` into one that names the file, or `path`, and says what to do."""
    try:
        with _told_by_system(path):
            yield
    except FileNotFoundError as error:
        raise InputError(f"{_where(error, path)}: no such file. Check the path.") from error
    except IsADirectoryError as error:
        raise InputError(f"{_where(error, path)}: is a folder, a file was expected.") from error
    except OSError as error:
        where = _where(error, path)
        if error.errno in _NO_NAMES:
            raise InputError(f"{where}: no such file: {error.strerror}. Check the path.") from error
        advice = _ADVICE.get(error.errno, "Check its permissions and the disk.")
        raise ReadError(f"{where}: cannot be read: {error.strerror}. {advice}") from error


@contextmanager
def writing(path: AnyPath, nbytes: int) -> Iterator[None]:
    """Turn an `OSError` into one that names the file, or `path`, and says what to do."""
    try:
        with _told_by_system(path):
            yield
    except OSError as error:
        where = _where(error, path)
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            message = (
                f"{where}: no space left ({nbytes:,} bytes to write). "
                "Free some space, or choose an output on another disk."
            )
        else:
            advice = _ADVICE.get(error.errno, "Check permissions and disk.")
            message = f"{where}: cannot be written: {error.strerror}. {advice}"
        raise WriteError(message) from error


# What cannot be the name of a file that is there.
_NO_NAMES = (errno.ENAMETOOLONG, errno.ELOOP, errno.ENOTDIR)
_ADVICE: dict[int | None, str] = {
    errno.ENAMETOOLONG: "Choose a shorter path.",
    errno.ELOOP: "Its links lead in a circle: choose another path.",
    errno.ENOTDIR: "A part of the path is a file: choose another path.",
    errno.EMFILE: "Allow more open files (ulimit -n).",
    errno.ENFILE: "Close other programs.",
    errno.EFBIG: "Allow larger files (ulimit -f), use --max-shard-size, or choose another disk.",
}


@contextmanager
def _told_by_system(path: AnyPath) -> Iterator[None]:
    """Have what else a path or a call can raise be an `OSError`, or what it is in truth."""
    try:
        yield
    except RuntimeError as error:  # of pathlib before Python 3.13
        if "Symlink loop" not in str(error):
            raise
        raise OSError(errno.ELOOP, "links lead in circles", str(path)) from error
    except UnicodeEncodeError as error:  # a name that the encoding of this system does not have
        raise OSError(errno.EILSEQ, "not a name that this system can have", str(path)) from error
    except OSError as error:
        if error.errno != errno.ENOMEM:
            raise
        raise OutOfMemoryError(
            f"{_where(error, path)}: not enough memory ({error.strerror}). Allow more, and run the "
            "same command again."
        ) from error


def _where(error: OSError, path: AnyPath) -> str:
    return printable(str(path if error.filename is None else error.filename))


def read_bytes(path: Path, limit: int) -> bytes:
    """The whole of a small file; `InputError` if it has more than `limit` bytes."""
    with InputFile(path) as file:
        data = file.read(0, file.nbytes + 1) if file.nbytes <= limit else b""
        if max(file.nbytes, len(data)) > limit:
            raise InputError(f"{printable(str(path))}: larger than {limit:,} bytes; not read.")
    return data


def file_nbytes(path: Path) -> int:
    """Size of an input file."""
    with InputFile(path) as file:
        return file.nbytes


def copy_file(source: Path, copy: Path) -> None:
    """Copy the bytes of a file to a new one and wait until the disk has them."""
    with InputFile(source) as file, OutputFile(copy, file.nbytes) as out:
        for offset in range(0, file.nbytes, COPY_NBYTES):
            block = file.read(offset, min(COPY_NBYTES, file.nbytes - offset))
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


def exists(path: Path) -> bool:
    """Whether something, be it a broken link, has this name in the place of an output."""
    return inode_of(path) is not None


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
            raise OutputError(f"{printable(str(path))}: is no folder any more. Run again.")
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
