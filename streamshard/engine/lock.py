"""The right to write one output, held by one run at a time.

A lock file beside the output is locked (`flock`, which NFS knows too), so that the lock of a killed
run is gone with it. Where the disk knows no locks, the record in the file decides: it holds as
long as the process that it names lives. The record fills the first block of the file and is written at
once. In the second block a run notes which folders it is about to rename, so that the next run does not
take somebody's folder for one of these; until that is done with, the file stays.
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
import platform
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, TypeAlias

from streamshard.disk.folders import inode_of
from streamshard.disk.held import Inode, inode
from streamshard.disk.new_files import put
from streamshard.disk.system import NO_LINK, PRIVATE, system, writing
from streamshard.engine.ours import Ours
from streamshard.errors import BusyError, OutputError, WriteError, printable

__all__ = ["Lock", "Moved", "locked", "look"]


Moved: TypeAlias = "tuple[int | None, int]"

_UNSUPPORTED = {errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP}
_NEW = os.O_RDWR | os.O_CREAT | os.O_EXCL | PRIVATE | NO_LINK
_OLD = os.O_RDWR | NO_LINK | getattr(os, "O_NONBLOCK", 0)
BLOCK = 512  # a disk writes so much at once
TRIES = 1000
_PID = re.compile(rb'\{"pid": \d+(.*)', re.DOTALL)
_PIDS = 1 << 31  # systems take no other number for that of a process
_HOST = b', "host": "'


class Lock:
    """A lock that is held.

    `moved` is what a run was about to do, who may have been killed then: the folder that it replaces,
    if any, and the one that it has built. Each by its inode number alone: that of a disk may be another
    one after it was mounted anew.
    """

    def __init__(self, path: Path, descriptor: int, moved: Moved | None) -> None:
        self.path = path
        self.moved = moved
        self._descriptor = descriptor

    def put_record(self) -> None:
        """Say who holds it."""
        record = {"pid": os.getpid(), "host": platform.node(), "boot": _boot()}
        put(self._descriptor, self.path, _block(record), 0)

    def note(self, old: Inode | None, new: Inode) -> None:
        """Note that the folder `new` is going to be put in the place of `old`, before that is done."""
        before = None if old is None else old[1]
        self.moved = (before, new[1])
        put(self._descriptor, self.path, _block({"old": before, "new": new[1]}), BLOCK)

    def settle(self) -> None:
        """Forget the note: nothing is left that it was about."""
        if self.moved is not None:
            with writing(self.path, 0):
                system.truncate(self._descriptor, BLOCK)
        self.moved = None

    def end(self) -> None:
        """Give it back; the file stays if what it notes is not done with."""
        with contextlib.suppress(OSError, WriteError):
            # While it is still held, so that no other run's lock is removed.
            if self.moved is None and _is_named(self.path, self._descriptor):
                system.unlink(self.path)
        with contextlib.suppress(OSError):
            system.close(self._descriptor)


@contextlib.contextmanager
def locked(path: Path, target: Path) -> Iterator[Lock]:
    """Hold the lock at `path` for writing `target`; raises `BusyError` if another run does.

    What has this name and is no lock of ours is refused as well, and left as it is.
    """
    lock = _take(path, target, Ours(path.parent))
    try:
        lock.put_record()
        yield lock
    finally:
        lock.end()


def look(path: Path, target: Path) -> Moved | None:
    """What a lock notes, without taking it; None if there is none.

    Refuses what is no lock of ours, and one that a process of this machine holds.
    """
    ours = Ours(path.parent)
    with writing(path, 0):
        if inode_of(path) is None:
            return None
        ours.check(system.lstat(path), path)
        descriptor = system.open(path, os.O_RDONLY | _OLD & ~os.O_RDWR)
    try:
        with writing(path, 0):
            ours.check(system.fstat(descriptor), path)
        content = _content(descriptor, path)
        _check(content, descriptor, path, ours)
        record = _record(content)
        if record and record["host"] == platform.node() and not _seems_free(descriptor, path):
            raise _refusal(path, target, record)
        return _note(content)
    finally:
        with contextlib.suppress(OSError):  # nothing was written
            system.close(descriptor)


def _take(path: Path, target: Path, ours: Ours) -> Lock:
    for _ in range(TRIES):
        descriptor = _opened(path, ours)
        if descriptor is None:  # its holder has removed it just now
            continue
        lock = None
        try:
            with writing(path, 0):
                ours.check(system.fstat(descriptor), path)
                free = _try(descriptor, path)
            content = _content(descriptor, path)
            _check(content, descriptor, path, ours)
            if not free:
                raise _refusal(path, target, _record(content))
            # Its last holder may have removed it in between.
            if _is_named(path, descriptor):
                lock = Lock(path, descriptor, _note(content))
                return lock
        finally:
            if lock is None:
                with contextlib.suppress(OSError):  # nothing was written
                    system.close(descriptor)
    raise OutputError(
        f"{printable(str(path))}: is made and removed by others again and again. Wait for them to "
        "end, or choose another output."
    )


def _opened(path: Path, ours: Ours) -> int | None:
    """A descriptor of the lock file, made if there is none; None if it vanishes meanwhile."""
    with writing(path, 0):
        with contextlib.suppress(FileExistsError):
            return system.open(path, _NEW)
        with contextlib.suppress(FileNotFoundError):
            ours.check(system.lstat(path), path)  # before it is opened: it may be a pipe
            return system.open(path, _OLD)
    return None


def _try(descriptor: int, path: Path) -> bool:
    """Whether a file could be locked."""
    try:
        system.lock(descriptor)
    except (BlockingIOError, PermissionError):
        return False
    except OSError as error:
        if error.errno not in _UNSUPPORTED:
            raise
        return not _alive(_record(_content(descriptor, path)))
    return True


def _seems_free(descriptor: int, path: Path) -> bool:
    """The like of a file that is open to be read; in a container another process may have that number."""
    try:
        return _try(descriptor, path)
    except OSError:  # NFS locks only what may be written to
        known = _record(_content(descriptor, path))
        return not _alive(known)


def _is_named(path: Path, descriptor: int) -> bool:
    """Whether a file still has its name."""
    with writing(path, 0):
        return inode_of(path) == inode(system.fstat(descriptor))


def _refusal(path: Path, target: Path, record: dict[str, Any]) -> BusyError:
    if record and (record["pid"], record["host"]) == (os.getpid(), platform.node()):
        return BusyError(
            f"{printable(str(target))}: another call in this process is writing it. Wait for that to "
            "end, or choose another output."
        )
    who = f" (process {record['pid']} on {printable(str(record['host']))})" if record else ""
    return BusyError(
        f"{printable(str(target))}: another run{who} is writing it. Wait for that to end, or choose "
        f"another output. If no such process is left, remove {printable(str(path))}."
    )


def _content(descriptor: int, path: Path) -> bytes:
    """The blocks that a lock file may have."""
    with writing(path, 0):
        data = bytearray(min(system.fstat(descriptor).st_size, 2 * BLOCK))
        done = 0
        while done < len(data):
            count = system.pread(descriptor, memoryview(data)[done:], done)
            if not count:
                if system.fstat(descriptor).st_size > done:
                    raise OSError(errno.EIO, "it ended too early", str(path))
                break  # its holder has shortened it
            done += count
    return bytes(data[:done])


def _check(content: bytes, descriptor: int, path: Path, ours: Ours) -> None:
    """Refuse what no run has written; one may have been killed before, or while, it wrote that."""
    first = content[:BLOCK].rstrip(b"\0")
    if not first:
        with writing(path, 0):
            known = ours.is_private(system.fstat(descriptor))
    else:
        known = bool(_record(content)) or _is_beginning(first)
    if not known:
        what = "holds something else" if first else "is an empty file"
        raise OutputError(
            f"{printable(str(path))}: {what} and not what a run of streamshard writes there, to keep "
            "others from writing the same output. It was left alone: move or remove it, or choose "
            "another output."
        )


def _is_beginning(text: bytes) -> bool:
    """Whether text that is no record may be one that was cut off."""
    start = b'{"pid": '
    if start.startswith(text):
        return True
    cut = _PID.fullmatch(text)
    return cut is not None and (cut[1].startswith(_HOST) or _HOST.startswith(cut[1]))


def _record(content: bytes) -> dict[str, Any]:
    """Who holds a lock; empty if that is not known."""
    record = _parsed(content[:BLOCK])
    pid, host, boot = (record.get(key) for key in ("pid", "host", "boot"))
    known = type(pid) is int and 0 < pid < _PIDS and isinstance(host, str) and isinstance(boot, str)
    return record if known else {}


def _note(content: bytes) -> Moved | None:
    note = _parsed(content[BLOCK:])
    old, new = note.get("old"), note.get("new")
    return (old, new) if type(new) is int and (old is None or type(old) is int) else None


def _parsed(text: bytes) -> dict[str, Any]:
    try:
        found = json.loads(text.rstrip(b"\0"))
    except (ValueError, RecursionError):
        return {}
    return found if isinstance(found, dict) else {}


def _block(content: dict[str, Any]) -> bytes:
    return json.dumps(content).encode().ljust(BLOCK - 1) + b"\n"


def _alive(record: dict[str, Any]) -> bool:
    """Whether the process of a record may still run; of another machine nothing is known."""
    if not record:
        return False
    if record["host"] != platform.node():
        return True
    import psutil

    return bool(record["boot"] == _boot() and psutil.pid_exists(int(record["pid"])))


def _boot() -> str:
    """What changes when this machine starts anew; empty where that is not told."""
    try:
        return system.read_text("/proc/sys/kernel/random/boot_id").strip()
    except OSError:
        return ""
