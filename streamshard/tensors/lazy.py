"""Lazy tensors: small immutable values that know their shape and dtype and can fill windows.

A window is some columns of some rows of the matrix of a tensor, however long its rows are.

Two kinds of node preserve bytes (`Stored`, `Array`) and a third joins parts (`Concat`); these
report where their bytes lie. The one that computes (`computed.Computed`) holds a byte-preserving
source: the constructors `concat`, `cast` and `update` push the computation to the parts, so that
a tree is never deeper than that, and the rows of any node are again one of these nodes.
"""

from __future__ import annotations

import contextlib
import math
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator
from typing import NamedTuple, TypeAlias

import numpy as np

from streamshard.disk.files import BLOCK_NBYTES, ByteRange
from streamshard.tensors.arrays import Bytes, Float32
from streamshard.tensors.dtypes import DTYPE_BITS, FLOATS
from streamshard.tensors.rounding import widen
from streamshard.tensors.workspace import Workspace
from streamshard.values import frozen

__all__ = [
    "READ_NBYTES",
    "Array",
    "Input",
    "Lazy",
    "NotFiniteError",
    "Shape",
    "Stored",
    "Window",
    "all_counts",
    "blocks",
    "by_elements",
    "check_elements",
    "check_rows",
    "read_float32",
]


Shape: TypeAlias = tuple[int, ...]
# Rows from the first number to the second, of which columns from the third to the fourth.
Window: TypeAlias = tuple[int, int, int, int]

# What is read at a time where it is looked at and not kept.
READ_NBYTES = 1_000_000


class NotFiniteError(ArithmeticError):
    """A computed row has an infinite or NaN element; whoever knows the tensor's name adds it."""

    def __init__(self, row: int, detail: str) -> None:
        super().__init__(row, detail)  # as given, so that a copy can be made of them

    def __str__(self) -> str:
        row, detail = self.args
        return f"row {row:,}: {detail}"


class Input(NamedTuple):
    """A tensor of a file that another one is made of.

    `whole` says that what else is in the file counts as well, as of an adapter, which is small and
    decides everything.
    """

    tensor: Stored
    whole: bool


def all_counts(inputs: Iterable[Input]) -> Iterator[Input]:
    """The like of files of which everything counts."""
    return (found._replace(whole=True) for found in inputs)


class Lazy(ABC):
    """A tensor that can fill any window of its rows; `shape` and `dtype` are always known."""

    __slots__ = ()

    shape: Shape
    dtype: str

    @property
    def nbytes(self) -> int:
        """Bytes as stored."""
        return math.prod(self.shape) * DTYPE_BITS[self.dtype] // 8

    @property
    def rows(self) -> int:
        """Rows of the matrix that `fill` works on: dim 0 against all others."""
        return self.shape[0] if self.shape else 1

    @property
    def columns(self) -> int:
        """Elements of one such row."""
        return math.prod(self.shape[1:])

    @property
    def row_nbytes(self) -> int:
        """Bytes of one such row."""
        return self.columns * DTYPE_BITS[self.dtype] // 8

    @property
    def pieces(self) -> tuple[Lazy, ...]:
        """The parts that follow each other in the file; most tensors are one."""
        return (self,)

    def ranges(self) -> tuple[ByteRange, ...] | None:
        """The file ranges that the tensor consists of, or None if it must be computed."""
        return None

    @abstractmethod
    def take(self, start: int, stop: int) -> Lazy:
        """Rows `[start, stop)` of dim 0 as a tensor."""

    def reshape(self, shape: Shape) -> Lazy:
        """The same bytes in another shape; only for tensors that preserve bytes."""
        raise ValueError(f"a {type(self).__name__} cannot be reshaped to {shape}")

    @abstractmethod
    def window(
        self, start: int, stop: int, first: int, last: int, out: Bytes, work: Workspace
    ) -> None:
        """Put the bytes of columns `[first, last)` of matrix rows `[start, stop)` into `out`.

        `out` has just that size. `first` is one that begins with a byte.
        """

    def fill(self, start: int, stop: int, out: Bytes, work: Workspace) -> None:
        """Put the bytes of matrix rows `[start, stop)` into `out`, which has just that size."""
        self.window(start, stop, 0, self.columns, out, work)

    def elements(self, start: int, stop: int, out: Bytes, work: Workspace) -> None:
        """Put the bytes of elements `[start, stop)`, counted through all rows, into `out`."""
        columns, bits, begin = self.columns, DTYPE_BITS[self.dtype], start
        while start < stop:
            row, first = divmod(start, columns)
            last, rows = min(columns, first + stop - start), 1
            if last - first == columns:
                rows = (stop - start) // columns
            end = start + rows * (last - first)
            place = out[(start - begin) * bits // 8 : (end - begin) * bits // 8]
            self.window(row, row + rows, first, last, place, work)
            start = end

    @contextlib.contextmanager
    def seen(self, start: int, stop: int, work: Workspace, name: str) -> Iterator[Bytes]:
        """The bytes of elements `[start, stop)`, to be looked at until the block ends.

        A buffer of this `name` is used if they are not in memory already. An error of reading may come
        when the block ends: see `Workspace.view`.
        """
        block = work.bytes(name, (stop - start) * DTYPE_BITS[self.dtype] // 8)
        self.elements(start, stop, block, work)
        yield block

    def windows(self, nbytes: int) -> Iterator[Window]:
        """Windows of about `nbytes` that make up everything, in the order that costs least."""
        return self.cut((0, self.rows, 0, self.columns), nbytes)

    def cut(self, window: Window, nbytes: int) -> Iterator[Window]:
        """A window in parts of about `nbytes`, as they are best read: rows, or parts of one."""
        start, stop, first, last = window
        columns, bits = last - first, DTYPE_BITS[self.dtype]
        height = max(nbytes * 8 // max(columns * bits, 1), 1)
        # Of elements of less than a byte too: a part begins with one.
        width = max(nbytes // bits, 1) * 8 if columns * bits > nbytes * 8 else max(columns, 1)
        for row in range(start, stop, height):
            for column in range(first, last, width):
                yield row, min(row + height, stop), column, min(column + width, last)

    def buffer_nbytes(self) -> int:
        """Bytes of memory that one worker needs to fill the windows, one by one."""
        return 0

    def held(self) -> tuple[Lazy, ...]:
        """What is kept in memory as a whole, for all workers, while windows are filled."""
        return ()

    def divides(self) -> bool:
        """Whether several workers can each fill some of it without all of them doing the same."""
        return True

    def inputs(self) -> Iterator[Input]:
        """What is read from files, in the order of the expression."""
        return iter(())


@frozen
class Stored(Lazy):
    """Bytes of a safetensors file, from `offset` (counted from the file's first byte)."""

    path: str
    offset: int
    shape: Shape
    dtype: str
    file_nbytes: int

    def ranges(self) -> tuple[ByteRange, ...]:
        return (ByteRange(self.path, self.offset, self.nbytes, self.file_nbytes),)

    def inputs(self) -> Iterator[Input]:
        yield Input(self, whole=False)

    def take(self, start: int, stop: int) -> Stored:
        check_rows(self, start, stop)
        offset = self.offset + start * self.row_nbytes
        return self._at(offset, (stop - start, *self.shape[1:]))

    def reshape(self, shape: Shape) -> Stored:
        check_elements(self, shape)
        return self._at(self.offset, shape)

    def _at(self, offset: int, shape: Shape) -> Stored:
        if shape == self.shape and offset == self.offset:
            return self  # a model has tens of thousands, and most are used as they are
        return Stored(self.path, offset, shape, self.dtype, self.file_nbytes)

    def window(
        self, start: int, stop: int, first: int, last: int, out: Bytes, work: Workspace
    ) -> None:
        by_elements(self, (start, stop, first, last), out, work)

    def elements(self, start: int, stop: int, out: Bytes, work: Workspace) -> None:
        work.reader.read_into(self._span(start, out.nbytes), out.data)

    @contextlib.contextmanager
    def seen(self, start: int, stop: int, work: Workspace, name: str) -> Iterator[Bytes]:
        bits = DTYPE_BITS[self.dtype]
        span = self._span(start, (stop - start) * bits // 8)
        with work.view(span, name, max(bits // 8, 1)) as found:
            yield found

    def _span(self, start: int, nbytes: int) -> ByteRange:
        """Some bytes from element `start` on."""
        begin = self.offset + start * DTYPE_BITS[self.dtype] // 8
        return ByteRange(self.path, begin, nbytes, self.file_nbytes)


@frozen(eq=False)
class Array(Lazy):
    """Bytes in memory; for what has no file of its own (adapters that were pickled)."""

    data: Bytes
    shape: Shape
    dtype: str

    def take(self, start: int, stop: int) -> Array:
        check_rows(self, start, stop)
        part = self.data[start * self.row_nbytes : stop * self.row_nbytes]
        return Array(part, (stop - start, *self.shape[1:]), self.dtype)

    def reshape(self, shape: Shape) -> Array:
        check_elements(self, shape)
        return Array(self.data, shape, self.dtype)

    def window(
        self, start: int, stop: int, first: int, last: int, out: Bytes, work: Workspace
    ) -> None:
        bits, rows = DTYPE_BITS[self.dtype], self.data.reshape(self.rows, self.row_nbytes)
        part = rows[start:stop, first * bits // 8 : last * bits // 8]
        np.copyto(out.reshape(part.shape), part)


def by_elements(tensor: Lazy, window: Window, out: Bytes, work: Workspace) -> None:
    """Fill a window of a tensor whose elements are at hand in their order."""
    start, stop, first, last = window
    columns = tensor.columns
    if last - first == columns:
        tensor.elements(start * columns, stop * columns, out, work)
        return
    width = out.nbytes // max(stop - start, 1)
    for row in range(start, stop):
        at, begin = row * columns, (row - start) * width
        tensor.elements(at + first, at + last, out[begin : begin + width], work)


def read_float32(
    tensor: Lazy,
    start: int,
    stop: int,
    work: Workspace,
    columns: tuple[int, int] | None = None,
    out: Float32 | None = None,
) -> Float32:
    """Rows `[start, stop)` of a float tensor, or some columns of these, as a new fp32 matrix.

    It is put into `out` if there is one.
    """
    first, last = columns or (0, tensor.columns)
    if out is None:
        out = np.empty((stop - start, last - first), np.float32)
    kind = FLOATS[tensor.dtype]
    for part in tensor.cut((start, stop, first, last), READ_NBYTES):
        row, end, left, right = part
        place = out[row - start : end - start, left - first : right - first]
        if tensor.dtype == "F32" and place.flags.c_contiguous:
            tensor.window(*part, place.reshape(-1).view(np.uint8), work)
            continue
        raw = work.bytes("narrow", place.size * np.dtype(kind).itemsize)
        tensor.window(*part, raw, work)
        widen(raw.view(kind).reshape(place.shape), tensor.dtype, place)
    return out


def blocks(
    work: Workspace, *tensors: Lazy, nbytes: int = BLOCK_NBYTES
) -> Iterator[tuple[Bytes, ...]]:
    """All bytes of tensors of one shape, side by side; each block is valid until the next one."""
    bits = [DTYPE_BITS[tensor.dtype] for tensor in tensors]
    total, step = math.prod(tensors[0].shape), max(nbytes // max(bits), 1) * 8
    for start in range(0, total, step):
        stop = min(start + step, total)
        with contextlib.ExitStack() as stack:
            yield tuple(
                stack.enter_context(tensor.seen(start, stop, work, f"block {place}"))
                for place, tensor in enumerate(tensors)
            )


def check_rows(tensor: Lazy, start: int, stop: int) -> None:
    """Raise `ValueError` if there are no rows `[start, stop)`."""
    if not tensor.shape or not 0 <= start <= stop <= tensor.shape[0]:
        raise ValueError(f"rows {start}:{stop} of a tensor of shape {tensor.shape}")


def check_elements(tensor: Lazy, shape: Shape) -> None:
    """Raise `ValueError` if `shape` has another number of elements."""
    if math.prod(shape) != math.prod(tensor.shape):
        raise ValueError(f"cannot reshape {tensor.shape} to {shape}")
