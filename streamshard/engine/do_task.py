"""What a task asks for is done here: a pure function of the task, that writes just its range.

Nothing here knows of threads, progress, journals or renames: these are the parent's, see `writer.py`.

A range may begin and end anywhere, also within a tensor. What is computed is computed in the windows
of the whole tensor, whatever the ranges are; what a window has changed counts for the range in which
the window begins. A digest, and a distance from another file, need a tensor's bytes in their order:
of one that is in several ranges they are measured when all of it is written (`measure`).
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import TypeAlias

import numpy as np

from streamshard.checkpoint.digests import new_digest
from streamshard.disk.files import BLOCK_NBYTES, ByteRange, Files
from streamshard.disk.new_files import OutputFile
from streamshard.engine.shard_task import Member, Result, ShardTask
from streamshard.errors import AdapterError, printable
from streamshard.tensors.arrays import Bytes
from streamshard.tensors.comparing import squared_distance
from streamshard.tensors.computed import TILE_ROWS
from streamshard.tensors.dtypes import DTYPE_BITS
from streamshard.tensors.lazy import Lazy, NotFiniteError, Stored, Window
from streamshard.tensors.rounding import Changes, has_not_finite
from streamshard.tensors.workspace import Workspace

__all__ = ["WRITE_BYTES", "OnBlock", "do", "measure"]


WRITE_BYTES = BLOCK_NBYTES

OnBlock: TypeAlias = Callable[[int, int, str], None]
"""Is told that bytes were written, and of which tensor: offset in the file, count (0 if some were read
again), name. May raise, which ends the task."""


def do(
    task: ShardTask,
    work: Workspace | None = None,
    on_block: OnBlock | None = None,
    output: OutputFile | None = None,
) -> tuple[Result, ...]:
    """Write the bytes of a task into its file; returns what is known of each of its members.

    A caller who has inputs or the output open hands them over.
    """
    with _opened(task, work, output) as (own, file):
        return tuple(_Part(task, member, own, file, on_block).write() for member in task.members)


def measure(
    task: ShardTask,
    work: Workspace | None = None,
    on_block: OnBlock | None = None,
    output: OutputFile | None = None,
) -> tuple[Result, ...]:
    """What `do` would have found of the task's members, but for changes, from what is written by now.

    All of each of them must be in the range.
    """
    with _opened(task, work, output) as (own, file):
        found = []
        for member in task.members:
            part = _Part(task, member, own, file, on_block)
            at = 0
            for piece in member.tensor.pieces:
                part.measure_again(piece, at)
                at += piece.nbytes
            found.append(part.result(Changes()))
        return tuple(found)


@contextlib.contextmanager
def _opened(
    task: ShardTask, work: Workspace | None, output: OutputFile | None
) -> Iterator[tuple[Workspace, OutputFile]]:
    """What a task needs, opened if the caller has not done it."""
    with contextlib.ExitStack() as stack:
        if work is None:
            work = Workspace(
                stack.enter_context(contextlib.closing(Files(task.stamps, onward=True)))
            )
        if output is None:
            output = stack.enter_context(OutputFile(task.path, task.file_nbytes, again=True))
        yield work, output


class _Part:
    """The bytes of one tensor that lie in the range; offsets are counted from the tensor's first."""

    def __init__(
        self,
        task: ShardTask,
        member: Member,
        work: Workspace,
        output: OutputFile,
        on_block: OnBlock | None,
    ) -> None:
        self.member, self.work, self.output, self.on_block = member, work, output, on_block
        self.first = max(task.begin - member.begin, 0)
        self.last = min(task.end, member.end) - member.begin
        self.whole = task.holds(member)
        self.digest, self.distance = new_digest(), 0.0
        self.measured = 0
        """Bytes of the tensor that are in the digest."""
        self.finite, self.zero = True, True
        """Whether all of these are finite numbers, and whether all are zero."""

    def write(self) -> Result:
        """Write them all."""
        changes, at = Changes(), 0
        for piece in self.member.tensor.pieces:
            end = at + piece.nbytes
            if self.whole or max(at, self.first) < min(end, self.last):
                self._write(piece, at, changes)
            at = end
        return self.result(changes)

    def result(self, changes: Changes) -> Result:
        """What is known by now."""
        if not self.whole:
            return Result(b"", None, changes)
        distance = None if self.member.reference is None else self.distance
        digest = self.digest.digest()
        zero = self.zero and self.measured > 0
        return Result(digest, distance, changes, not_finite=not self.finite, zero=zero)

    def _write(self, piece: Lazy, at: int, changes: Changes) -> None:
        ranges = piece.ranges()
        if ranges is not None:
            for source in ranges:
                self._copy(source, at)
                at += source.nbytes
            return
        self.work.forget()
        scattered = is_scattered(piece)
        try:
            for window in piece.windows(WRITE_BYTES):
                self._compute(piece, window, at, changes, scattered=scattered)
        except NotFiniteError as error:
            for one in piece.inputs():  # who sent it may be to blame
                self.work.files.prove(one.tensor.path, one.tensor.file_nbytes)
            message = f"tensor '{printable(self.member.name)}', {error}. Nothing was written."
            raise AdapterError(message) from error
        if scattered and self.whole:
            self.measure_again(piece, at)

    def _copy(self, source: ByteRange, at: int) -> None:
        """Write bytes of a file as they are."""
        self.work.files.check(source)
        start, stop = max(self.first - at, 0), min(self.last - at, source.nbytes)
        while start < stop:
            place = self.member.begin + at + start
            room = self.output.room(place, stop - start)
            nbytes = min(stop - start, WRITE_BYTES) if room is None else len(room)
            span = ByteRange(source.path, source.offset + start, nbytes, source.file_nbytes)
            if room is None:
                with self.work.view(span, "out") as block:
                    self._put(block, at + start)
            else:
                self.work.reader.read_into(span, room)
                if self.whole:
                    self._measure(np.frombuffer(room, np.uint8))
                self._filled(place, nbytes)
            start += nbytes

    def _filled(self, place: int, nbytes: int) -> None:
        self.output.filled(place, nbytes)
        if self.on_block is not None:
            self.on_block(place, nbytes, self.member.name)

    def _compute(
        self, piece: Lazy, window: Window, at: int, changes: Changes, *, scattered: bool
    ) -> None:
        """Write a window of what must be computed, as far as it is in the range."""
        start, stop, first, last = window
        bits, step = DTYPE_BITS[piece.dtype], piece.row_nbytes
        begin, width = at + start * step + first * bits // 8, (last - first) * bits // 8
        end = begin + (stop - start - 1) * step + width
        if not max(begin, self.first) < min(end, self.last):
            return
        # Ranges that meet in a window both compute it.
        self.work.changes = changes if self.first <= begin < self.last else Changes()
        out = self.work.bytes("out", (stop - start) * width)
        piece.window(*window, out, self.work)
        if not scattered:
            for place in range(0, len(out), WRITE_BYTES):
                self._put(out[place : place + WRITE_BYTES], begin + place)
            return
        ends = max(at, self.first), min(at + piece.nbytes, self.last)
        among = self.member.begin + ends[0], self.member.begin + ends[1]
        for row in range(stop - start):
            block = out[row * width : (row + 1) * width]
            self._write_block(block, begin + row * step, among)

    def _put(self, block: Bytes, at: int) -> None:
        """Write a block that follows the last one, and measure it if its tensor is whole."""
        self._write_block(block, at)
        if self.whole:
            self._measure(block)

    def _write_block(self, block: Bytes, at: int, among: tuple[int, int] | None = None) -> None:
        start, stop = max(self.first - at, 0), min(self.last - at, len(block))
        if start < stop:
            place, data = self.member.begin + at + start, block[start:stop].data
            if among is None:
                self.output.write(data, place)
            else:
                self.output.write_among(data, place, *among)
            if self.on_block is not None:
                self.on_block(place, stop - start, self.member.name)

    def measure_again(self, piece: Lazy, at: int) -> None:
        """Measure what is written already, in the blocks in which it is when it is written in order."""
        for start, stop in _blocks(piece):
            block = self.work.bytes("out", stop - start)
            self.output.read_into(block.data, self.member.begin + at + start)
            if self.on_block is not None:
                self.on_block(self.member.begin + at + start, 0, self.member.name)
            self._measure(block)

    def _measure(self, block: Bytes) -> None:
        self.digest.update(block.data)
        self.finite = self.finite and not has_not_finite(block, self.member.tensor.dtype)
        # Most blocks tell by their first bytes.
        self.zero = self.zero and not block[:64].any() and not block.any()
        if self.member.reference is not None:
            self.distance += self._distance(self.member.reference, block)
        self.measured += block.nbytes

    def _distance(self, reference: Stored, block: Bytes) -> float:
        """Squared distance of the next block from the same elements of another tensor."""
        dtype = self.member.tensor.dtype
        bits, own_bits = DTYPE_BITS[reference.dtype], DTYPE_BITS[dtype]
        offset = reference.offset + self.measured * bits // own_bits
        nbytes = block.nbytes * bits // own_bits
        span = ByteRange(reference.path, offset, nbytes, reference.file_nbytes)
        with self.work.view(span, "reference", max(bits // 8, 1)) as theirs:
            return squared_distance(block, dtype, theirs, reference.dtype)


def is_scattered(piece: Lazy) -> bool:
    """Whether windows are some columns of several rows, which do not follow each other in the file."""
    return any(
        last - first < piece.columns and stop - start > 1
        for start, stop, first, last in piece.windows(WRITE_BYTES)
    )


def _blocks(piece: Lazy) -> Iterator[tuple[int, int]]:
    """The blocks in which a piece is measured, whoever has written what of it."""
    for begin, end in _spans(piece):
        for start in range(begin, end, WRITE_BYTES):
            yield start, min(start + WRITE_BYTES, end)


def _spans(piece: Lazy) -> Iterator[tuple[int, int]]:
    ranges = piece.ranges()
    if ranges is not None:
        sizes = (source.nbytes for source in ranges)
    elif is_scattered(piece):
        # As if its rows were short.
        step = TILE_ROWS * piece.row_nbytes
        sizes = (min(step, piece.nbytes - at) for at in range(0, piece.nbytes, step))
    else:
        sizes = (
            (stop - start) * (last - first) * DTYPE_BITS[piece.dtype] // 8
            for start, stop, first, last in piece.windows(WRITE_BYTES)
        )
    at = 0
    for size in sizes:
        yield at, at + size
        at += size
