"""Lazy tensors: small immutable values that know their shape and dtype and can fill row blocks.

Two kinds of node preserve bytes (`Stored`, `Array`) and a third joins parts (`Concat`); these
report where their bytes lie. The one that computes (`updates.Computed`) holds a byte-preserving
source: the constructors `concat`, `cast` and `update` push the computation to the parts, so that
a tree is never deeper than that, and the rows of any node are again one of these nodes.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Hashable, Iterable, Iterator
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt

from streamshard.arithmetic import FLOATS, Change, widen
from streamshard.files import ByteRange, Files

__all__ = [
    "DTYPE_BITS",
    "Array",
    "Concat",
    "Lazy",
    "NotFiniteError",
    "Stored",
    "Workspace",
    "check_elements",
    "check_rows",
    "concat",
    "equal_bytes",
    "read_float32",
]

Bytes: TypeAlias = npt.NDArray[np.uint8]
Float32: TypeAlias = npt.NDArray[np.float32]
Elements: TypeAlias = npt.NDArray[np.generic]
Shape: TypeAlias = tuple[int, ...]

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


class Workspace:
    """What one worker needs to fill rows: open inputs, reused buffers, and sums.

    `change` accumulates what updates did to computed elements since it was last set.
    """

    def __init__(self, files: Files) -> None:
        self.files = files
        self.change = Change()
        self._buffers: dict[str, Bytes] = {}
        self._kept: dict[Hashable, Any] = {}
        self._held: dict[int, tuple[Lazy, Bytes]] = {}

    def bytes(self, name: str, nbytes: int) -> Bytes:
        """A buffer that is used again under the same name; its content is left over."""
        buffer = self._buffers.get(name)
        if buffer is None or buffer.nbytes < nbytes:
            buffer = np.empty(nbytes, np.uint8)
            self._buffers[name] = buffer
        return buffer[:nbytes]

    def float32(self, name: str, rows: int, columns: int) -> Float32:
        """The like as an fp32 matrix."""
        return self.bytes(name, rows * columns * 4).view(np.float32).reshape(rows, columns)

    def kept(self, key: Hashable, make: Callable[[], Any]) -> Any:
        """What `make` gave for `key`, kept until another tensor begins.

        A key made of the id of a node must be kept with that node, so that no other can get it.
        """
        if key not in self._kept:
            self._kept[key] = make()
        return self._kept[key]

    def held(self, tensor: Lazy) -> Bytes:
        """All bytes of a tensor; the last two that were asked for stay in memory.

        For the factors of fused experts: each expert needs some of all of their rows.
        """
        key = id(tensor)
        found = self._held.pop(key, None)
        if found is None:
            if len(self._held) > 1:
                self._held.pop(next(iter(self._held)))
            data = np.empty(tensor.nbytes, np.uint8)
            tensor.fill(0, tensor.rows, data, self)
            found = (tensor, data)
        self._held[key] = found
        return found[1]

    def forget(self) -> None:
        """Drop what was kept, but not what is held; called when another tensor begins."""
        self._kept.clear()


class Lazy(ABC):
    """A tensor that can fill any range of its rows; `shape` and `dtype` are always known."""

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
    def fill(self, start: int, stop: int, out: Bytes, work: Workspace) -> None:
        """Put the bytes of matrix rows `[start, stop)` into `out`, which has just that size."""


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

    def fill(self, start: int, stop: int, out: Bytes, work: Workspace) -> None:
        first = self.offset + start * self.row_nbytes
        span = ByteRange(self.path, first, out.nbytes, self.file_nbytes)
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

    def fill(self, start: int, stop: int, out: Bytes, work: Workspace) -> None:
        np.copyto(out, self.data[start * self.row_nbytes : stop * self.row_nbytes])


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

    def fill(self, start: int, stop: int, out: Bytes, work: Workspace) -> None:
        for part, low, high, at in self._overlaps(start, stop):
            place = out[at * self.row_nbytes : (at + high - low) * self.row_nbytes]
            step = part.rows // part.shape[0]  # a cast may have finer rows than dim 0
            part.fill(low * step, high * step, place, work)


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


def read_float32(tensor: Lazy, start: int, stop: int, work: Workspace) -> Float32:
    """Rows `[start, stop)` of a float tensor as a new fp32 matrix."""
    raw = work.bytes("narrow", (stop - start) * tensor.row_nbytes)
    tensor.fill(start, stop, raw, work)
    out = np.empty((stop - start, tensor.columns), np.float32)
    widen(raw.view(FLOATS[tensor.dtype]).reshape(out.shape), tensor.dtype, out)
    return out


def equal_bytes(one: Lazy, other: Lazy, work: Workspace) -> bool:
    """Whether two tensors of one shape and dtype have the same bytes, read block by block."""
    if (one.shape, one.dtype) != (other.shape, other.dtype):
        return False
    step = max(1_000_000 // max(one.row_nbytes, 1), 1)
    for start in range(0, one.rows, step):
        stop = min(start + step, one.rows)
        left, right = (
            work.bytes(name, (stop - start) * tensor.row_nbytes)
            for name, tensor in (("left", one), ("right", other))
        )
        one.fill(start, stop, left, work)
        other.fill(start, stop, right, work)
        if not np.array_equal(left, right):
            return False
    return True


def check_rows(tensor: Lazy, start: int, stop: int) -> None:
    """Raise `ValueError` if there are no rows `[start, stop)`."""
    if not tensor.shape or not 0 <= start <= stop <= tensor.shape[0]:
        raise ValueError(f"rows {start}:{stop} of a tensor of shape {tensor.shape}")


def check_elements(tensor: Lazy, shape: Shape) -> None:
    """Raise `ValueError` if `shape` has another number of elements."""
    if math.prod(shape) != math.prod(tensor.shape):
        raise ValueError(f"cannot reshape {tensor.shape} to {shape}")
