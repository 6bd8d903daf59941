"""The digest of a file that comes in pieces: taken along, as long as they come in their order.

What comes from a place further on cannot be in it before everything up to there is. So the digest of a
file is known if at some time each of its bytes was the next one, and else it is said why not.
"""

from __future__ import annotations

import hashlib
import threading
from typing import Any

from streamshard.errors import HubError, printable

__all__ = ["Frontier", "WrongDigestError"]


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

    def note(self, start: int, data: memoryview) -> None:
        """Take bytes along that came from `start` on. Raises `WrongDigestError` with the last of them."""
        end = start + len(data)
        if not start <= self._at < end:
            self._farthest = max(self._farthest, end)
            return
        with self._lock:
            if start <= self._at < end and self._hash is not None:
                self._hash.update(data[self._at - start :])
                self._at = end
                if end == self._nbytes:
                    self._judge()

    def _judge(self) -> None:
        found = self._hash.hexdigest()
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
        return False, f"only its first {self._at:,} bytes were read"


def _new(kind: str, nbytes: int) -> Any:
    """What takes a digest of that kind; None if nobody can."""
    if kind == "sha256":
        return hashlib.sha256(usedforsecurity=False)
    if kind == "git":
        return hashlib.sha1(b"blob %d\0" % nbytes, usedforsecurity=False)
    return None
