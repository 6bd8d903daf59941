"""Where bytes are read from: a source has a key, a size and an identity, and gives ranges of bytes.

A local file (`files.InputFile`) is one, and its key is its path. Whoever reads opens sources by their
keys, with `files.open_source`: a new kind of source, such as a file on a hub, is told there, by what
its keys look like, and needs no change elsewhere.
"""

from __future__ import annotations

import io
from typing import Protocol

from streamshard.disk.inputs import Stamp
from streamshard.disk.mapped import Mapped
from streamshard.disk.system import AnyPath
from streamshard.values import frozen

__all__ = ["Abilities", "Source"]


@frozen
class Abilities:
    """What a source can do: asked for, so that nobody has to know of which kind it is.

    With `ranges`, a part of it costs about what that part has of bytes. `local` is the path of a file
    on this machine that has the same bytes, for libraries that open files themselves; None if there
    is none. `in_order` says that it is best read by one thread, from its beginning to its end.
    """

    ranges: bool
    local: AnyPath | None
    in_order: bool = False


class Source(Protocol):
    """Something that is open to be read, at any place, by several threads."""

    path: AnyPath
    """Its key."""
    nbytes: int
    spare: bool
    """Whether the page cache is to be left as it was."""
    onward: bool
    """Whether who reads a part goes on to its end as a rule: then more may be asked for beforehand."""
    stamp: Stamp
    """Its identity: another one, as soon as anything of it has changed."""

    @property
    def abilities(self) -> Abilities:
        """What it can do."""

    def read_into(self, out: memoryview, offset: int) -> int:
        """Fill `out` from `offset` on; fewer bytes than asked for only at the end."""

    def read(self, offset: int, nbytes: int) -> bytes:
        """Up to `nbytes` bytes from `offset` on."""

    def mapping(self) -> Mapped | None:
        """All of it in memory, to be looked at in place; None if it must be read."""

    def stream(self) -> io.BufferedReader:
        """The like as Python has files; closing it closes nothing."""

    def check(self) -> None:
        """Raise `ChangedError` if it is no longer what it was when it was opened."""

    def prove(self) -> None:
        """The like, before it is blamed for what it holds: may read all of it."""

    def close(self) -> None:
        """Close it; harmless if it is closed already."""

    def __enter__(self) -> Source:  # noqa: PYI034 - Self needs Python 3.11
        """Itself."""

    def __exit__(self, kind: type[BaseException] | None, /, *_: object) -> None:
        """Close it; after an error that its content may be the cause of, `check` it."""
