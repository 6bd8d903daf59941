"""The right to write one output, held by one run at a time.

A lock file beside the output is locked (`flock`, which NFS knows too), so that the lock of a killed
run is gone with it. Where the disk knows no locks, the record in the file decides: it holds as
long as the process that it names lives.
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
import platform
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from streamshard.errors import OutputError, printable
from streamshard.files import InputFile, LogFile, reading, system, writing

__all__ = ["locked"]

_UNSUPPORTED = {errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP}


@contextlib.contextmanager
def locked(path: Path, target: Path) -> Iterator[None]:
    """Hold the lock at `path` for writing `target`; raises `OutputError` if another run does."""
    descriptor = _take(path, target)
    try:
        record = {"pid": os.getpid(), "host": platform.node(), "boot": _boot()}
        log = LogFile(path, 0)
        try:
            log.append(json.dumps(record).encode() + b"\n")
        finally:
            log.close()
        yield
    finally:
        # While it is still held, so that no other run's lock is removed.
        with contextlib.suppress(OSError):
            system.unlink(path)
        with contextlib.suppress(OSError):
            system.close(descriptor)


def _take(path: Path, target: Path) -> int:
    while True:
        with writing(path, 0):
            descriptor = system.open(path, os.O_RDWR | os.O_CREAT)
        kept = False
        try:
            with writing(path, 0):
                free = _try(descriptor, path)
                # Its last holder may have removed it in between.
                kept = free and _is_named(path, descriptor)
        finally:
            if not kept:
                with contextlib.suppress(OSError):  # nothing was written
                    system.close(descriptor)
        if kept:
            return descriptor
        if not free:
            raise _refusal(path, target)


def _try(descriptor: int, path: Path) -> bool:
    """Whether a file could be locked."""
    try:
        system.lock(descriptor)
    except (BlockingIOError, PermissionError):
        return False
    except OSError as error:
        if error.errno not in _UNSUPPORTED:
            raise
        return not _alive(_record(path))
    return True


def _is_named(path: Path, descriptor: int) -> bool:
    """Whether a file still has its name."""
    try:
        named = system.lstat(path)
    except FileNotFoundError:
        return False
    mine = system.fstat(descriptor)
    return (named.st_dev, named.st_ino) == (mine.st_dev, mine.st_ino)


def _refusal(path: Path, target: Path) -> OutputError:
    record = _record(path)
    who = f" (process {record['pid']} on {printable(str(record['host']))})" if record else ""
    return OutputError(
        f"{printable(str(target))}: another run{who} is writing it. Wait for that to end, or choose "
        f"another output. If no such process is left, remove {printable(str(path))}."
    )


def _record(path: Path) -> dict[str, Any]:
    """Who holds a lock; empty if that is not known."""
    try:
        with reading(path), InputFile(path) as file:
            record = json.loads(file.read(0, 1000))
    except Exception:  # noqa: BLE001 - only for the message, or written half
        return {}
    known = isinstance(record, dict) and {"pid", "host", "boot"} <= record.keys()
    return record if known else {}


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
        return Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
    except OSError:
        return ""
