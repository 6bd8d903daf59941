"""What a run has read, and whether all of it is still as it was: inputs must not change meanwhile.

What a file is, beyond its name, is its `Stamp`. A run notes that of every file when it first opens it,
before a byte is read, and compares it whenever it opens the file again, when a weight file of the
output is finished, and once more when everything is read. Nothing is read twice for that.
"""

from __future__ import annotations

import contextlib
import errno
import functools
import os
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextvars import ContextVar
from dataclasses import dataclass
from pathlib import Path
from typing import ParamSpec, Protocol, TypeVar

from streamshard.disk.system import AnyPath, reading, system
from streamshard.errors import (
    AdapterError,
    ChangedError,
    InputError,
    ReadError,
    StreamshardError,
    UsageError,
    VerificationError,
)
from streamshard.values import frozen

__all__ = ["Inputs", "Opened", "Stamp", "active", "changed", "named", "watched", "watching"]


P = ParamSpec("P")
T = TypeVar("T")

_GONE = (errno.ENOENT, errno.ENOTDIR, errno.ELOOP)
# Systems keep times in ticks of 1 to 16 ms: two changes within one cannot be told apart.
TICK_NS = 20_000_000
MOST_HELD = 256


@frozen
class Stamp:
    """Which file something is, and when it was changed: equal as long as nobody touches it.

    `mtime_ns` is when its content was changed, which programs may set back; `ctime_ns` when anything
    of it was, which they cannot.
    """

    device: int
    inode: int
    nbytes: int
    mtime_ns: int
    ctime_ns: int

    @classmethod
    def of(cls, found: os.stat_result) -> Stamp:
        """The stamp in what the system says of a file."""
        return cls(found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns, found.st_ctime_ns)


class Opened(Protocol):
    """An open file as this module needs it."""

    path: str | Path
    stamp: Stamp

    def stamp_again(self) -> None:
        """Take the stamp that the file has by now."""

    def named(self) -> Stamp | None:
        """The stamp of what has the file's name by now; None if nothing has."""

    def release(self) -> None:
        """Give the descriptor back."""


@dataclass
class _Seen:
    """A file that was open elsewhere, as it was then."""

    path: str | Path
    stamp: Stamp

    def stamp_again(self) -> None:
        """It is known as it was."""

    def named(self) -> Stamp | None:
        return named(self.path)

    def release(self) -> None:
        """It has no descriptor here."""


class Inputs:
    """Everything that a run has opened to read from; safe to share between threads.

    Files stay open as far as the limit of descriptors allows: the number of a file that somebody
    removes then cannot become that of another one.
    """

    def __init__(self) -> None:
        self._noted: dict[str, Opened] = {}
        self._held: dict[str, Opened] = {}
        self._room = _room()
        self._own: tuple[str, ...] = ()
        self._ended = False
        self._lock = threading.Lock()

    @property
    def stamps(self) -> dict[str, Stamp]:
        """The stamp that every file had when it was first opened, by path."""
        with self._lock:
            return {
                path: file.stamp for path, file in self._noted.items() if not self._is_own(path)
            }

    def leave_out(self, *places: Path) -> None:
        """These, and what lies below them, are the run's own to change."""
        with self._lock:
            self._own += tuple(str(place) for place in places)

    def expect(self, stamps: Mapping[str, Stamp]) -> None:
        """Take note of files that others have opened, by their paths, as they were then."""
        with self._lock:
            for path, stamp in stamps.items():
                self._noted.setdefault(path, _Seen(path, stamp))

    def note(self, file: Opened) -> bool:
        """Take note of a file that was opened; False if it is no input.

        Raises `ChangedError` if it is not what had this name when it was first opened.
        """
        path = str(file.path)
        with self._lock:
            if self._ended or self._is_own(path):
                return False
            first = self._noted.get(path)
        if first is None:
            # What is written within the tick of the last change would go unnoticed.
            if 0 <= time.time_ns() - file.stamp.ctime_ns < TICK_NS:
                time.sleep(TICK_NS / 1e9)
                file.stamp_again()
            with self._lock:
                first = self._noted.setdefault(path, file)
        if file.stamp != first.stamp:
            raise changed(path, first.stamp, file.stamp)
        return True

    def hold(self, file: Opened) -> bool:
        """Whether the descriptor of a file that is no longer needed is kept here."""
        path = str(file.path)
        with self._lock:
            if self._ended or (path not in self._held and len(self._held) >= self._room):
                return False
            return self._held.setdefault(path, file) is file

    def let_go(self) -> bool:
        """Give back all descriptors, and keep none any more; whether there were some."""
        with self._lock:
            held, self._held, self._room = self._held, {}, 0
        for file in held.values():
            file.release()
        return bool(held)

    def check(self) -> None:
        """Raise `ChangedError` if any file is no longer what it was when it was first opened."""
        with self._lock:
            noted = [(p, file) for p, file in self._noted.items() if not self._is_own(p)]
        for path, file in noted:
            now = file.named()
            if now != file.stamp:
                raise changed(path, file.stamp, now)

    def end(self) -> None:
        """Check everything for the last time: what comes now does not concern the run any more."""
        if not self._ended:
            self.check()
            self.close()

    def close(self) -> None:
        """Give back all descriptors."""
        self._ended = True
        self.let_go()

    def _is_own(self, path: str) -> bool:
        return any(path == own or path.startswith(own + os.sep) for own in self._own)


_active: ContextVar[Inputs | None] = ContextVar("inputs", default=None)


def active() -> Inputs | None:
    """What notes the files that are opened here; threads must be given it by whoever starts them."""
    return _active.get()


@contextlib.contextmanager
def watching() -> Iterator[Inputs]:
    """Have every file that is opened in the block noted, and checked when it ends.

    Raises `ChangedError` in place of an error that says what is wrong with an input, if one has changed:
    that may be why.
    """
    inputs = Inputs()
    token = _active.set(inputs)
    try:
        yield inputs
        inputs.end()
    except (InputError, AdapterError, UsageError, VerificationError) as error:
        try:
            inputs.end()
        except ChangedError as reason:
            raise reason from error
        except StreamshardError:
            pass
        raise
    finally:
        _active.reset(token)
        inputs.close()


def watched(command: Callable[P, T]) -> Callable[P, T]:
    """A command whose inputs must not change while it runs: it ends with `ChangedError` if one does."""

    @functools.wraps(command)
    def run(*args: P.args, **kwargs: P.kwargs) -> T:
        with watching():
            return command(*args, **kwargs)

    return run


def named(path: AnyPath) -> Stamp | None:
    """The stamp of what has this name by now, also through a link; None if nothing has."""
    try:
        with reading(path):
            return Stamp.of(system.stat(path))
    except (InputError, ReadError) as error:
        cause = error.__cause__
        if isinstance(cause, OSError) and cause.errno in _GONE:
            return None
        raise


def changed(path: str | Path, before: Stamp, now: Stamp | None) -> ChangedError:
    """The error for a file that is not as it was; `now` is None if it is gone."""
    if now is None:
        how = "was removed or renamed"
    elif (now.device, now.inode) != (before.device, before.inode):
        how = "was replaced by another file"
    elif now.nbytes != before.nbytes:
        how = f"was written to (it has {now.nbytes:,} bytes now but had {before.nbytes:,})"
    elif now.mtime_ns != before.mtime_ns:
        how = "was written to"
    else:
        how = "was changed (its content, or its owner, permissions or links)"
    return ChangedError.at(
        path,
        f"{how} while this run was reading it. A result would be of two states of the input, so "
        "there is none. Wait until nothing changes the inputs, then run it again.",
    )


def _room() -> int:
    """How many files are held open: a small part of what the process may have."""
    try:
        import resource
    except ImportError:  # Windows, whose C library has 512 or more
        return 64
    limit, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    return MOST_HELD if limit == resource.RLIM_INFINITY else min(limit // 8, MOST_HELD)
