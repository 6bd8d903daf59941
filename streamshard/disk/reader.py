"""What one thread reads by: parts of files, in place where they are mapped.

A thread has few windows of mapped files at a time, and hands back the one that it has left for longest:
memory stays flat, whatever the size of the files.
"""

from __future__ import annotations

import contextlib
import errno
from collections.abc import Callable, Iterator

from streamshard.disk.files import ByteRange, Files
from streamshard.disk.mapped import WINDOW_NBYTES, Mapped
from streamshard.disk.sources import Source
from streamshard.errors import ReadError, StreamshardError

__all__ = ["Reader"]


# One of the source and one of what it is compared with.
MOST_WINDOWS = 2


class Reader:
    """Parts of files, for one thread; `files` are shared."""

    def __init__(self, files: Files) -> None:
        self.files = files
        self._windows: dict[tuple[str, int], tuple[Mapped, bool]] = {}

    @contextlib.contextmanager
    def view(
        self, span: ByteRange, room: Callable[[int], memoryview], align: int = 1
    ) -> Iterator[memoryview]:
        """The bytes of `span`, to be looked at and not changed, valid until the block ends.

        They are those of the mapped file, or were read into what `room` has given for so many bytes.
        They begin at an address that is a multiple of `align`. Raises `ReadError` when the block ends
        if the file has lost them meanwhile: nothing that was made of them may count.
        """
        file = self.files.source(span.path, span.file_nbytes)
        mapped = self._mapped(file, span, align)
        if mapped is None:
            out = room(span.nbytes)
            self.files.read_into(span, out)
            yield out
            return
        try:
            yield mapped.bytes(span.offset, span.nbytes)
        except Exception as error:
            # The system does not kill who hands it such bytes, but refuses them.
            if mapped.lost or _is_bad_address(error):
                raise _gone(file, span) from error
            raise
        if mapped.lost:
            raise _gone(file, span)

    def read_into(self, span: ByteRange, out: memoryview) -> None:
        """Fill `out` (`span.nbytes` long) with a part of a file."""
        file = self.files.source(span.path, span.file_nbytes)
        mapped = file.mapping() if file.spare else None  # knows what was in the cache before
        self.files.read_into(span, out)
        if mapped is not None and span.nbytes:
            self._enter(mapped, span, populate=False)

    def leave(self) -> None:
        """Hand back all windows."""
        for (_, window), (mapped, _) in self._windows.items():
            mapped.drop(window)
        self._windows.clear()

    def _mapped(self, file: Source, span: ByteRange, align: int) -> Mapped | None:
        mapped = file.mapping()
        if mapped is None or not span.nbytes or span.offset % align:
            return None
        if span.offset + span.nbytes > mapped.nbytes or mapped.lost:
            return None  # what is wrong is told by reading it
        return mapped if self._enter(mapped, span, populate=True) else None

    def _enter(self, mapped: Mapped, span: ByteRange, *, populate: bool) -> bool:
        """Have all windows of a range in memory; whether that was possible."""
        first = span.offset // WINDOW_NBYTES
        last = (span.offset + span.nbytes - 1) // WINDOW_NBYTES
        there = True
        for window in range(first, last + 1):
            key = (span.path, window)
            found = self._windows.pop(key, None)
            if found is None or (populate and not found[1]):
                found = mapped, populate and mapped.populate(window)
            self._windows[key] = found  # the last one that was used
            there = there and found[1]
        for key in [*self._windows][
            : max(len(self._windows) - max(MOST_WINDOWS, last - first + 1), 0)
        ]:
            self._windows.pop(key)[0].drop(key[1])
        return there


def _is_bad_address(error: BaseException | None) -> bool:
    while error is not None and not isinstance(error, OSError):
        error = error.__cause__
    return error is not None and error.errno == errno.EFAULT


def _gone(file: Source, span: ByteRange) -> StreamshardError:
    """What is to be told of a file that has lost a part that was looked at."""
    try:
        file.check()
    except StreamshardError as error:  # it is no longer what it was
        return error
    return ReadError.at(
        file.path,
        f"cannot be read: bytes {span.offset:,} to {span.offset + span.nbytes:,} were lost while they "
        "were used. Check the disk, and run the same command again.",
    )
