"""Where the entries of a zip archive lie in its file, for archives that store and do not compress.

`torch.save` writes such files. Only the directory at the end is read, and the local header of an entry
that is asked for: nothing is unpacked, and what is read is bounded, whatever the file claims.
"""

from __future__ import annotations

import struct
from dataclasses import field

from streamshard.disk.sources import Source
from streamshard.values import frozen

__all__ = ["Entries", "NoArchiveError", "read_entries"]


# The largest InternVL has 40,000 tensors, and a directory of 6 MB if they all are in one file.
MAX_DIRECTORY_NBYTES = 32_000_000
MAX_ENTRIES = 200_000

# The records of PKWARE's APPNOTE.TXT, 4.3: as far as they are needed, without signature and names.
_END = struct.Struct("<4s4H2LH")
_LOCATOR = struct.Struct("<4sLQL")
_END_64 = struct.Struct("<4sQ2H2L4Q")
_ENTRY = struct.Struct("<4s6H3L5H2L")
_LOCAL = struct.Struct("<4s5H3L2H")
_MORE_64 = 0xFFFFFFFF


class NoArchiveError(ValueError):
    """The file is no such archive; the message says what is wrong with it."""


@frozen
class Entries:
    """The entries of an archive by name: where the local header of each begins, and its bytes."""

    file: Source
    _found: dict[str, tuple[int, int]] = field(repr=False)

    @property
    def names(self) -> list[str]:
        """All names, in the order of the directory."""
        return list(self._found)

    def __contains__(self, name: str) -> bool:
        return name in self._found

    def nbytes(self, name: str) -> int:
        """How many bytes an entry has."""
        return self._found[name][1]

    def offset(self, name: str) -> int:
        """Where the bytes of an entry begin; raises `NoArchiveError` if they do not lie in the file."""
        header, nbytes = self._found[name]
        local = self.file.read(header, _LOCAL.size)
        if len(local) < _LOCAL.size or not local.startswith(b"PK\3\4"):
            raise NoArchiveError(f"its entry {name!r} is not where its directory says")
        names, extra = map(int, _LOCAL.unpack(local)[-2:])
        begin = header + _LOCAL.size + names + extra
        if begin + nbytes > self.file.nbytes:
            raise NoArchiveError(f"its entry {name!r} claims more bytes than the file has")
        return begin

    def read(self, name: str, limit: int) -> bytes:
        """The bytes of a small entry; raises `NoArchiveError` if it has more than `limit`."""
        if self.nbytes(name) > limit:
            raise NoArchiveError(f"its entry {name!r} has more than {limit:,} bytes")
        return self.file.read(self.offset(name), self.nbytes(name))


def read_entries(file: Source) -> Entries:
    """The entries of an archive that is open; raises `NoArchiveError` for what is none, or compressed."""
    begin, nbytes, count = _directory(file)
    if nbytes > MAX_DIRECTORY_NBYTES or count > MAX_ENTRIES or begin + nbytes > file.nbytes:
        raise NoArchiveError("its directory is too large, or not in the file: the file may be cut")
    directory = file.read(begin, nbytes)
    found: dict[str, tuple[int, int]] = {}
    at = 0
    for _ in range(count):
        if at + _ENTRY.size > len(directory) or directory[at : at + 4] != b"PK\1\2":
            raise NoArchiveError("its directory is damaged")
        fields = _ENTRY.unpack_from(directory, at)
        flags, method, packed, plain = fields[3], fields[4], fields[8], fields[9]
        names, extra, comment, header = *fields[10:13], fields[-1]
        at += _ENTRY.size
        name = directory[at : at + names].decode("utf-8", "replace")
        more = directory[at + names : at + names + extra]
        at += names + extra + comment
        plain, packed, header = _wide(more, plain, packed, header)
        if method or flags & 1 or plain != packed:
            raise NoArchiveError(f"its entry {name!r} is compressed, which torch does not do")
        if plain > file.nbytes:
            raise NoArchiveError(f"its entry {name!r} claims more bytes than the file has")
        if name in found:
            raise NoArchiveError(f"it has two entries {name!r}")
        found[name] = header, plain
    return Entries(file, found)


def _directory(file: Source) -> tuple[int, int, int]:
    """Where the directory begins, its bytes, and how many entries it has."""
    # At the very end, as torch writes no comment after it.
    start = max(file.nbytes - _END.size - _LOCATOR.size, 0)
    last = file.read(start, _LOCATOR.size + _END.size)
    end, locator = last[-_END.size :], last[: -_END.size]
    if len(end) < _END.size or not end.startswith(b"PK\5\6"):
        raise NoArchiveError("it is no zip archive, or its end is missing")
    _, _, _, _, count, nbytes, begin, _ = _END.unpack(end)
    if len(locator) == _LOCATOR.size and locator.startswith(b"PK\6\7"):
        wide = file.read(min(_LOCATOR.unpack(locator)[2], file.nbytes), _END_64.size)
        if len(wide) < _END_64.size or not wide.startswith(b"PK\6\6"):
            raise NoArchiveError("its end is damaged")
        count, nbytes, begin = _END_64.unpack(wide)[-3:]
    return begin, nbytes, count


def _wide(extra: bytes, *values: int) -> list[int]:
    """Numbers of an entry, of which those that need more than 32 bits are in its extra field."""
    found = list(values)
    at = 0
    while at + 4 <= len(extra):
        kind, size = struct.unpack_from("<2H", extra, at)
        at += 4
        if kind == 1:
            rest = extra[at : at + size]
            for place, value in enumerate(found):
                if value == _MORE_64 and len(rest) >= 8:
                    found[place], rest = int.from_bytes(rest[:8], "little"), rest[8:]
        at += size
    return found
