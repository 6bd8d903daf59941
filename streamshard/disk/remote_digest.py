"""The digest of a file that comes in pieces: taken along, as long as they come in their order.

What comes from a place further on cannot be in it before everything up to there is. So the digest of a
file is known if at some time each of its bytes was the next one, and else it is said why not.
"""

from __future__ import annotations

import mmap
import queue
import threading
from collections.abc import Callable
from typing import Any

from streamshard.disk.threads import new_thread, start
from streamshard.errors import HubError, printable
from streamshard.limits import processors

__all__ = ["Frontier", "WrongDigestError"]


ALONE_NBYTES = 1 << 20
"""Up to that nobody needs another thread: that is a header."""


class WrongDigestError(HubError):
    """The bytes that came are others than those that were promised: nothing made of them may count."""


class Frontier:
    """Up to where the bytes of a file have come in their order, and the digest of these."""

    def __init__(self, name: str, nbytes: int, digest: str) -> None:
        self._name, self._nbytes = name, nbytes
        kind, _, self._expected = digest.partition(":")
        self._hash = _new(kind, nbytes)
        self._at = self._farthest = 0
        self._equal = False
        self._lock = threading.Lock()

    def note(
        self,
        start: int,
        data: bytes | mmap.mmap,
        nbytes: int,
        done: Callable[[], object] = lambda: None,
    ) -> None:
        """Take bytes along that came from `start` on: the first `nbytes` of `data`.

        `done` is called, by any thread, when they may change. Raises `WrongDigestError` with the last
        byte of the file.
        """
        end = start + nbytes
        if not start <= self._at < end:
            self._farthest = max(self._farthest, end)
            done()
            return
        with self._lock:
            if not (start <= self._at < end) or self._hash is None:
                done()
                return
            # Another thread is given a view that nobody else has a part of: Python counts those that
            # are made of each other, and without a GIL it miscounts them.
            with memoryview(data) as whole:
                block = whole[self._at - start : nbytes]
            self._hash.add(block, done)
            self._at = end
            if end == self._nbytes:
                self._judge(self._hash.digest())

    @property
    def missing(self) -> int | None:
        """Where the next byte is that the digest needs; None if it needs none, or there is no digest."""
        return None if self._hash is None or self._at >= self._nbytes else self._at

    def rest(self) -> None:
        """Nothing comes for now."""
        with self._lock:
            if self._hash is not None:
                self._hash.rest()

    def _judge(self, found: str) -> None:
        if found != self._expected:
            raise WrongDigestError(
                f"{printable(self._name)}: what came is not what the hub has: the digest of its "
                f"{self._nbytes:,} bytes is {found}, not {printable(self._expected)}. The way from there "
                "to here is at fault (a proxy, a mirror), or the hub. There is no output; run the same "
                "command again, without --stream if this comes again."
            )
        self._equal = True

    def outcome(self) -> tuple[bool, str]:
        """Whether everything came and has the right digest, and how that is known or why not."""
        if self._equal:
            return True, "streamed in order, and equal to the digest of the hub"
        if self._hash is None:
            return False, "the hub tells no digest of its content"
        if self._farthest > self._at:
            return False, "parts of it were read, or in another order"
        return False, f"only its first {self._at:,} bytes were read by who wrote this"


class _Hash:
    """A digest, of which another thread takes some while who reads goes on.

    It takes as long as reading does. Where so many files are read that the processors are all busy, it
    is taken by who reads: then another thread would only cost the change to it.
    """

    def __init__(self, taken: Any) -> None:
        self._hash = taken
        self._blocks = queue.SimpleQueue[tuple[memoryview, Callable[[], object]] | None]()
        self._thread: threading.Thread | None = None
        self._nbytes = 0

    def add(self, block: memoryview, done: Callable[[], object]) -> None:
        """Take a block along; `done` is called when it may change."""
        self._nbytes += len(block)
        if self._nbytes >= ALONE_NBYTES:
            _busy.add(self)
        if self._nbytes >= ALONE_NBYTES and 2 * len(_busy) <= processors() and self._start():
            self._blocks.put((block, done))
            return
        self._end()
        self._hash.update(block)
        done()

    def rest(self) -> None:
        """Nothing comes for now."""
        _busy.discard(self)
        self._end()

    def digest(self) -> str:
        """That of everything."""
        self.rest()
        return str(self._hash.hexdigest())

    def _start(self) -> bool:
        """Have a thread; False if there can be none."""
        if self._thread is not None:
            return True
        thread = new_thread(self._loop)
        try:
            start(thread)
        except RuntimeError:  # the system allows no more of them
            return False
        self._thread = thread
        return True

    def _end(self) -> None:
        """Have no thread, and all blocks taken along."""
        if self._thread is not None:
            self._blocks.put(None)
            self._thread.join()
            self._thread = None

    def _loop(self) -> None:
        while (found := self._blocks.get()) is not None:
            block, done = found
            self._hash.update(block)
            done()


_busy: set[_Hash] = set()
"""Digests that are being taken: as many files are being read."""


def _new(kind: str, nbytes: int) -> _Hash | None:
    """What takes a digest of that kind; None if nobody can."""
    import hashlib

    if kind == "sha256":
        return _Hash(hashlib.sha256(usedforsecurity=False))
    if kind == "git":
        return _Hash(hashlib.sha1(b"blob %d\0" % nbytes, usedforsecurity=False))
    return None
