"""Lazy tensors: small immutable values that know their shape and dtype and can fill windows.

A window is some columns of some rows of the matrix of a tensor, however long its rows are.

Two kinds of node preserve bytes (`Stored`, `Array`) and a third joins parts (`Concat`); these
report where their bytes lie. The one that computes (`updates.Computed`) holds a byte-preserving
source: the constructors `concat`, `cast` and `update` push the computation to the parts, so that
a tree is never deeper than that, and the rows of any node are again one of these nodes.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import TypeAlias

import numpy as np
import numpy.typing as npt

from streamshard.arithmetic import FLOATS, widen
from streamshard.files import ByteRange
from streamshard.workspace import Bytes, Float32, Held, Workspace

__all__ = [
    "DTYPE_BITS",
    "READ_NBYTES",
    "Array",
    "Bytes",
    "Concat",
    "Float32",
    "Held",
    "Lazy",
    "NotFiniteError",
    "Stored",
    "Window",
    "Workspace",
    "blocks",
    "by_elements",
    "check_elements",
    "check_rows",
    "concat",
    "equal_bytes",
    "read_float32",
]

Elements: TypeAlias = npt.NDArray[np.generic]
Shape: TypeAlias = tuple[int, ...]
# Rows from the first number to the second, of which columns from the third to the fourth.
Window: TypeAlias = tuple[int, int, int, int]

# What is read at a time where it is looked at and not kept.
READ_NBYTES = 1_000_000

# Bits an element, in the order of the format's own enumeration: files are laid out widest
# first by this order (safetensors `Dtype`, safetensors/src/tensor.rs).
DTYPE_BITS: dict[str, int] = {
    "BOOL": 8,
    "F4": 4,
    "F6_E2M3": 6,
    "F6_E3M2": 6,
    "U8": 8,
    "I8": 8,
    "F8_E5M2": 8,
    "F8_E4M3": 8,
    "F8_E8M0": 8,
    "F8_E4M3FNUZ": 8,
    "F8_E5M2FNUZ": 8,
    "I16": 16,
    "U16": 16,
    "F16": 16,
    "BF16": 16,
    "I32": 32,
    "U32": 32,
    "F32": 32,
    "C64": 64,
    "F64": 64,
    "I64": 64,
    "U64": 64,
}


class NotFiniteError(ArithmeticError):
    """A computed row has an infinite or NaN element; whoever knows the tensor's name adds it."""

    def __init__(self, row: int, detail: str) -> None:
        super().__init__(f"row {row:,}: {detail}")


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


@dataclass(frozen=True, slots=True)
class Stored(Lazy):
    """Bytes of a safetensors file, from `offset` (counted from the file's first byte)."""

    path: str
    offset: int
    shape: Shape
    dtype: str
    file_nbytes: int

    def ranges(self) -> tuple[ByteRange, ...]:
        return (ByteRange(self.path, self.offset, self.nbytes, self.file_nbytes),)

    def take(self, start: int, stop: int) -> Stored:
        check_rows(self, start, stop)
        return replace(
            self,
            offset=self.offset + start * self.row_nbytes,
            shape=(stop - start, *self.shape[1:]),
        )

    def reshape(self, shape: Shape) -> Stored:
        check_elements(self, shape)
        return replace(self, shape=shape)

    def window(
        self, start: int, stop: int, first: int, last: int, out: Bytes, work: Workspace
    ) -> None:
        by_elements(self, (start, stop, first, last), out, work)

    def elements(self, start: int, stop: int, out: Bytes, work: Workspace) -> None:
        begin = self.offset + start * DTYPE_BITS[self.dtype] // 8
        span = ByteRange(self.path, begin, out.nbytes, self.file_nbytes)
        work.files.read_into(span, out.data)


@dataclass(frozen=True, slots=True, eq=False)
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


@dataclass(frozen=True, slots=True)
class Concat(Lazy):
    """Parts joined along dim 0; made by `concat`.

    After `reshape` the parts may be rows of a matrix that is finer than dim 0.
    """

    parts: tuple[Lazy, ...]
    shape: Shape
    dtype: str

    @property
    def rows(self) -> int:
        return sum(part.shape[0] for part in self.parts)

    @property
    def columns(self) -> int:
        return math.prod(self.shape) // max(self.rows, 1)

    @property
    def pieces(self) -> tuple[Lazy, ...]:
        return self.parts

    def ranges(self) -> tuple[ByteRange, ...] | None:
        found: list[ByteRange] = []
        for part in self.parts:
            ranges = part.ranges()
            if ranges is None:
                return None
            found += ranges
        return tuple(found)

    def _overlaps(self, start: int, stop: int) -> Iterator[tuple[Lazy, int, int, int]]:
        first = 0
        for part in self.parts:
            low, high = max(start, first), min(stop, first + part.shape[0])
            if low < high:
                yield part, low - first, high - first, low - start
            first += part.shape[0]

    def take(self, start: int, stop: int) -> Lazy:
        check_rows(self, start, stop)
        if start == stop:
            return self.parts[0].take(0, 0).reshape((0, *self.shape[1:]))
        step = self.rows // self.shape[0]
        overlaps = self._overlaps(start * step, stop * step)
        found = concat([part.take(low, high) for part, low, high, _ in overlaps])
        return found.reshape((stop - start, *self.shape[1:]))

    def reshape(self, shape: Shape) -> Lazy:
        check_elements(self, shape)
        inner, row = shape[1:], math.prod(shape[1:])
        if shape == self.shape:
            return self
        if all(math.prod(part.shape) % row == 0 for part in self.parts):
            return concat(
                part.reshape((math.prod(part.shape) // row, *inner)) for part in self.parts
            )
        if not shape[0] or self.rows % shape[0]:
            raise ValueError(f"the parts of {self.shape} do not fit {shape}")
        return replace(self, shape=shape)

    def window(
        self, start: int, stop: int, first: int, last: int, out: Bytes, work: Workspace
    ) -> None:
        columns = self.columns
        width = (last - first) * DTYPE_BITS[self.dtype] // 8
        for part, low, high, at in self._overlaps(start, stop):
            place = out[at * width : (at + high - low) * width]
            step = part.rows // part.shape[0]  # a cast may have finer rows than dim 0
            if last - first == columns:
                part.fill(low * step, high * step, place, work)
            elif step == 1:
                part.window(low, high, first, last, place, work)
            else:
                for row in range(low, high):
                    piece = place[(row - low) * width : (row - low + 1) * width]
                    part.elements(row * columns + first, row * columns + last, piece, work)

    def buffer_nbytes(self) -> int:
        return max(part.buffer_nbytes() for part in self.parts)

    def held(self) -> tuple[Lazy, ...]:
        return tuple(node for part in self.parts for node in part.held())


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


def concat(parts: Iterable[Lazy]) -> Lazy:
    """`parts` joined along dim 0; adjacent byte ranges of one file become one tensor again.

    Raises `ValueError` if dtypes or trailing dimensions differ.
    """
    flat = [piece for part in parts for piece in part.pieces]
    if not flat:
        raise ValueError("nothing to concatenate")
    for one, other in pairwise(flat):
        if one.dtype != other.dtype or one.shape[1:] != other.shape[1:] or not other.shape:
            raise ValueError(
                f"cannot join {one.dtype} {list(one.shape)} and {other.dtype} {list(other.shape)}"
            )
    joined = [flat[0]]
    for part in flat[1:]:
        last = joined[-1]
        if (
            isinstance(last, Stored)
            and isinstance(part, Stored)
            and last.path == part.path
            and last.offset + last.nbytes == part.offset
        ):
            joined[-1] = replace(last, shape=(last.shape[0] + part.shape[0], *last.shape[1:]))
        else:
            joined.append(part)
    if len(joined) == 1:
        return joined[0]
    rows = sum(part.shape[0] for part in joined)
    return Concat(tuple(joined), (rows, *flat[0].shape[1:]), flat[0].dtype)


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
        raw = work.bytes("narrow", place.size * np.dtype(kind).itemsize)
        tensor.window(*part, raw, work)
        widen(raw.view(kind).reshape(place.shape), tensor.dtype, place)
    return out


def blocks(one: Lazy, other: Lazy, nbytes: int, work: Workspace) -> Iterator[tuple[Bytes, Bytes]]:
    """The bytes of two tensors of one shape side by side; valid until the next ones."""
    bits = [DTYPE_BITS[tensor.dtype] for tensor in (one, other)]
    total, step = math.prod(one.shape), max(nbytes // max(bits), 1) * 8
    for start in range(0, total, step):
        stop = min(start + step, total)
        left, right = (
            work.bytes(name, (stop - start) * width // 8)
            for name, width in zip(("left", "right"), bits, strict=True)
        )
        one.elements(start, stop, left, work)
        other.elements(start, stop, right, work)
        yield left, right


def equal_bytes(one: Lazy, other: Lazy, work: Workspace) -> bool:
    """Whether two tensors of one shape and dtype have the same bytes, read block by block."""
    if (one.shape, one.dtype) != (other.shape, other.dtype):
        return False
    pairs = blocks(one, other, READ_NBYTES, work)
    return all(np.array_equal(left, right) for left, right in pairs)


def check_rows(tensor: Lazy, start: int, stop: int) -> None:
    """Raise `ValueError` if there are no rows `[start, stop)`."""
    if not tensor.shape or not 0 <= start <= stop <= tensor.shape[0]:
        raise ValueError(f"rows {start}:{stop} of a tensor of shape {tensor.shape}")


def check_elements(tensor: Lazy, shape: Shape) -> None:
    """Raise `ValueError` if `shape` has another number of elements."""
    if math.prod(shape) != math.prod(tensor.shape):
        raise ValueError(f"cannot reshape {tensor.shape} to {shape}")
