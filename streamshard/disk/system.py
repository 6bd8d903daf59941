"""The calls to the operating system, one method a call, and errors that name the file.

Every call goes through `system`, so that a test can put something else in the place of each of
these methods: fail it, or end the process there.
"""

from __future__ import annotations

import errno
import os
import shutil
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, TypeAlias, TypeVar

from streamshard.disk.held import holder
from streamshard.errors import (
    ChangedError,
    InputError,
    OutOfMemoryError,
    ReadError,
    WriteError,
    bytes_text,
    printable,
)

if TYPE_CHECKING:
    from streamshard.disk._mapping import Mapping

if sys.platform == "win32":
    import msvcrt
else:
    import fcntl

__all__ = ["NO_LINK", "PRIVATE", "AnyPath", "System", "is_unread", "reading", "system", "writing"]


AnyPath: TypeAlias = "str | Path"
T = TypeVar("T")
NO_LINK = getattr(os, "O_NOFOLLOW", 0)
PRIVATE = 1 << 30
"""Beside the flags of the system: a new file is for its owner alone."""
_ALWAYS = getattr(os, "O_BINARY", 0) | getattr(os, "O_CLOEXEC", 0)
_FAR = 1 << 30


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

    def may_change(self, path: AnyPath) -> bool:
        """Whether we may make, rename and remove what is in a folder, but for what a sticky bit says."""
        effective = os.access in os.supports_effective_ids
        with _inside(path, itself=True) as (name, folder):
            return os.access(name, os.W_OK | os.X_OK, dir_fd=folder, effective_ids=effective)

    def pread(self, descriptor: int, out: memoryview, offset: int) -> int:
        """How many bytes were read into `out`; 0 at the end of the file."""
        return _pread_into(descriptor, out, offset)

    def pwrite(self, descriptor: int, data: memoryview, offset: int) -> int:
        """How many bytes of `data` were written."""
        return _pwrite(descriptor, data, offset)

    def map(self, descriptor: int, nbytes: int) -> Mapping:
        """The first bytes of a file in memory."""
        from streamshard.disk._mapping import Mapping

        return Mapping(descriptor, nbytes)

    def populate(self, descriptor: int, mapping: Mapping, offset: int, nbytes: int) -> None:
        """Have a part of a file that is mapped in memory."""
        mapping.populate(offset, nbytes)

    def uncache(self, descriptor: int, offset: int, nbytes: int) -> None:
        """Have the page cache forget a range that was read."""
        os.posix_fadvise(descriptor, offset, nbytes, os.POSIX_FADV_DONTNEED)

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

    def scandir(self, path: AnyPath) -> list[os.DirEntry[str]]:
        """What is in a folder."""
        with os.scandir(path) as found:
            return list(found)

    def realpath(self, path: AnyPath) -> str:
        """Where links lead, as far as that can be told."""
        return os.path.realpath(path)

    def resolve(self, path: Path) -> Path:
        """The like; links that lead in a circle are an error."""
        return path.resolve()

    def by_library(self, path: AnyPath, opens: Callable[[AnyPath], T]) -> T:
        """What a library makes of a file that it opens itself."""
        return opens(path)

    def read_text(self, path: AnyPath) -> str:
        """What the system tells of itself in a file of its own."""
        return Path(path).read_text(encoding="utf-8")

    def mkdir(self, path: AnyPath) -> None:
        with _inside(path) as (name, folder):
            os.mkdir(name, dir_fd=folder)

    def rmdir(self, path: AnyPath) -> None:
        with _inside(path) as (name, folder):
            os.rmdir(name, dir_fd=folder)

    def remove_tree(self, path: AnyPath) -> None:
        """Remove a folder with all that is in it, as far as that goes."""
        shutil.rmtree(path, ignore_errors=True)

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


system = System()


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


@contextmanager
def reading(path: AnyPath) -> Iterator[None]:
    """Turn an `OSError` into one that names the file, or `path`, and says what to do."""
    try:
        with _told_by_system(path):
            yield
    except FileNotFoundError as error:
        raise InputError.missing(_path_of(error, path), "no such file. Check the path.") from error
    except IsADirectoryError as error:
        problem = "is a folder, a file was expected."
        raise InputError.at(_path_of(error, path), problem) from error
    except OSError as error:
        found = _path_of(error, path)
        if error.errno in _NO_NAMES:
            raise InputError.at(
                found, f"no such file: {error.strerror}. Check the path."
            ) from error
        advice = _ADVICE.get(error.errno, "Check its permissions and the disk.")
        raise ReadError.at(found, f"cannot be read: {error.strerror}. {advice}") from error


def is_unread(error: Exception) -> bool:
    """Whether an error says nothing of what is in a file, but that the system did not read it."""
    return (
        isinstance(error, ReadError)
        and not isinstance(error, ChangedError)
        and isinstance(error.__cause__, OSError)
    )


@contextmanager
def writing(path: AnyPath, nbytes: int) -> Iterator[None]:
    """Turn an `OSError` into one that names the file, or `path`, and says what to do."""
    try:
        with _told_by_system(path):
            yield
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            problem = (
                f"no space left ({bytes_text(nbytes)} to write). "
                "Free some space, or choose an output on another disk."
            )
        else:
            advice = _ADVICE.get(error.errno, "Check permissions and disk.")
            if error.errno in (errno.EACCES, errno.EROFS):
                # The file may be one of ours that nobody knows: a lock, or not there yet.
                folder = Path(os.fsdecode(path)).parent
                advice = f"Check permissions, those of the folder {printable(str(folder))} first."
            problem = f"cannot be written: {error.strerror}. {advice}"
        raise WriteError.at(_path_of(error, path), problem) from error


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
        raise OutOfMemoryError.at(
            _path_of(error, path),
            f"not enough memory ({error.strerror}). Allow more, and run the same command again.",
        ) from error


def _path_of(error: OSError, path: AnyPath) -> object:
    return path if error.filename is None else error.filename


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
