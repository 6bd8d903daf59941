"""A file that is read by ranges, but for its header: that is kept in the empty file that stands for it.

So a header costs no second request, and what reads only files of this machine, as the official parser
does, finds it there.
"""

from __future__ import annotations

import io
import os
from pathlib import Path

from streamshard.checkpoint.header import MAX_HEADER_BYTES
from streamshard.disk.files import InputFile, as_stream
from streamshard.disk.inputs import Inputs
from streamshard.disk.mapped import Mapped
from streamshard.disk.sources import Abilities, Source
from streamshard.disk.system import AnyPath, system, writing

__all__ = ["Headed", "keep_head"]

FIRST_NBYTES = 100_000  # headers of weights have 10 to 60 KB


def keep_head(file: Source, here: Path) -> int:
    """Write the header of a file into an empty one of its length; returns how many bytes that are."""
    first = file.read(0, min(FIRST_NBYTES, file.nbytes))
    wanted = 8 + int.from_bytes(first[:8], "little")
    if len(first) < wanted <= min(8 + MAX_HEADER_BYTES, file.nbytes):
        first += file.read(len(first), wanted - len(first))
    with writing(here, len(first)):
        descriptor = system.open(here, os.O_WRONLY)
        try:
            done = 0
            while done < len(first):
                done += system.pwrite(descriptor, memoryview(first)[done:], done)
        finally:
            system.close(descriptor)
    return len(first)


class Headed:
    """A source whose first `known` bytes are those of a file of this machine."""

    def __init__(self, file: Source, here: Path, known: int) -> None:
        self._file, self._here, self._known = file, here, known
        self.path: AnyPath = file.path
        self.nbytes, self.spare, self.stamp = file.nbytes, file.spare, file.stamp

    @property
    def abilities(self) -> Abilities:
        """What it can do."""
        return self._file.abilities

    def __enter__(self) -> Headed:  # noqa: PYI034 - Self needs Python 3.11
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Close it; harmless if it is closed already."""
        self._file.close()

    def check(self) -> None:
        """Raise `ChangedError` if it is no longer what it was when it was opened."""
        self._file.check()

    def mapping(self) -> Mapped | None:
        """None: it must be read."""
        return None

    def stream(self) -> io.BufferedReader:
        """The like as Python has files."""
        return as_stream(self)

    def read_into(self, out: memoryview, offset: int) -> int:
        """Fill `out` from `offset` on; fewer bytes than asked for only at the end."""
        near = max(min(self._known - offset, len(out)), 0)
        if near:
            ended = Inputs()
            ended.close()  # no input by itself
            with InputFile(self._here, ended) as file:
                file.read_into(out[:near], offset)
        if near == len(out):
            return near
        return near + self._file.read_into(out[near:], offset + near)

    def read(self, offset: int, nbytes: int) -> bytes:
        """Up to `nbytes` bytes from `offset` on."""
        out = bytearray(max(min(nbytes, self.nbytes - offset), 0))
        return bytes(out[: self.read_into(memoryview(out), offset)])
