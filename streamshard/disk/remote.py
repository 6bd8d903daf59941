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

__all__ = ["RemoteFile"]


class RemoteFile:
    """A file that is read by ranges."""

    def __init__(self, key: str, nbytes: int, digest: str | None, opener: Any) -> None:
        self.path: AnyPath = key
        self.nbytes, self.spare = nbytes, False
        self.stamp = Stamp(0, 0, nbytes, 0, 0)
        self._opener = opener

    @property
    def abilities(self) -> Abilities:
        """What it can do."""
        return Abilities(ranges=True, local=None)

    def read_into(self, out: memoryview, offset: int) -> int:
        """Fill `out`."""
        stop = min(offset + len(out), self.nbytes)
        if stop <= offset:
            return 0
        stream = self._opener.open(offset, stop)
        done = 0
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
