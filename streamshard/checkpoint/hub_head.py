"""The header of a file that is read by ranges: read once, and put into the empty file that stands for it.

There it is found by what reads only files of this machine, as the official parser does.
"""

from __future__ import annotations

import os
from pathlib import Path

from streamshard.checkpoint.header import MAX_HEADER_BYTES
from streamshard.disk.sources import Source
from streamshard.disk.system import system, writing

__all__ = ["read_head"]

FIRST_NBYTES = 128 * 1024  # headers of weights have 10 to 60 KB


def read_head(file: Source, here: Path | None) -> bytes:
    """The first bytes of a file of safetensors, all of its header among them; also put into `here`."""
    with file:
        first = file.read(0, min(FIRST_NBYTES, file.nbytes))
        wanted = 8 + int.from_bytes(first[:8], "little")
        if len(first) < wanted <= min(8 + MAX_HEADER_BYTES, file.nbytes):
            first += file.read(len(first), wanted - len(first))
    if here is None:
        return first
    with writing(here, len(first)):
        descriptor = system.open(here, os.O_WRONLY)
        try:
            done = 0
            while done < len(first):
                done += system.pwrite(descriptor, memoryview(first)[done:], done)
        finally:
            system.close(descriptor)
    return first
