"""TEMPORARY: replaced by the one of branch `ranges`."""

from __future__ import annotations

import io
from typing import Any

from streamshard.disk.files import as_stream
from streamshard.disk.inputs import Stamp
from streamshard.disk.mapped import Mapped
from streamshard.disk.sources import Abilities
from streamshard.disk.system import AnyPath
from streamshard.errors import ReadError

__all__ = ["Remote", "RemoteFile"]


class _Frontier:
    def outcome(self) -> tuple[bool, str]:
        """Not known."""
        return False, "it was read in parts"


class Remote:
    """A file elsewhere."""

    def __init__(
        self, name: str, nbytes: int, digest: str, opener: Any, *, head: bytes = b""
    ) -> None:
        self.name, self.nbytes, self.digest, self.opener = name, nbytes, digest, opener
        self.head, self.frontier = head, _Frontier()

    def open(self, key: AnyPath) -> RemoteFile:
        """It."""
        return RemoteFile(key, self)


class RemoteFile:
    """A file that is read by ranges."""

    def __init__(self, key: AnyPath, remote: Remote) -> None:
        self.path: AnyPath = key
        self.nbytes, self.spare = remote.nbytes, False
        self.stamp = Stamp(0, 0, self.nbytes, 0, 0)
        self._opener, self._head = remote.opener, remote.head

    @property
    def abilities(self) -> Abilities:
        """What it can do."""
        return Abilities(ranges=True, local=None)

    def read_into(self, out: memoryview, offset: int) -> int:
        """Fill `out`."""
        stop = min(offset + len(out), self.nbytes)
        if stop <= offset:
            return 0
        known = self._head[offset : offset + len(out)]
        out[: len(known)] = known
        done = len(known)
        if done == stop - offset:
            return done
        stream = self._opener.open(offset + done, stop)
        try:
            while done < stop - offset:
                count = stream.readinto(out[done : stop - offset])
                if not count:
                    raise ReadError.at(self.path, "short")
                done += count
        finally:
            stream.close()
        return done

    def read(self, offset: int, nbytes: int) -> bytes:
        """Bytes."""
        out = bytearray(max(min(nbytes, self.nbytes - offset), 0))
        self.read_into(memoryview(out), offset)
        return bytes(out)

    def mapping(self) -> Mapped | None:
        """None."""
        return None

    def stream(self) -> io.BufferedReader:
        """A file."""
        return as_stream(self)

    def check(self) -> None:
        """Nothing can change."""

    def close(self) -> None:
        """Nothing is open."""

    def __enter__(self) -> RemoteFile:  # noqa: PYI034
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
