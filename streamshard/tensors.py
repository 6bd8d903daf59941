"""Lazy tensors: small immutable values that know their shape and dtype and can fill row blocks.

Two kinds of node preserve bytes (`Stored`, `Array`) and a third joins parts (`Concat`); these
report where their bytes lie. The one that computes (`Computed`) holds a byte-preserving source:
the constructors `concat`, `cast` and `add_low_rank` push the computation to the parts, so that
a tree is never deeper than that, and the rows of any node are again one of these nodes.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import TypeAlias

import numpy as np
import numpy.typing as npt

from streamshard.arithmetic import FLOATS, add_and_round, narrow, widen
from streamshard.errors import InputError
from streamshard.files import ByteRange, Files

__all__ = [
    "DTYPE_BITS",
    "Array",
    "Computed",
    "Concat",
    "Lazy",
    "LowRank",
    "NotFiniteError",
    "Stored",
    "Workspace",
    "add_low_rank",
    "cast",
    "concat",
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

# The grid of the low-rank product. Constants: the bits of a BLAS product depend on the size of
# the call, so these must not depend on memory, workers, shards or layout.
TILE_ROWS = 128
TILE_COLUMNS = 1024
CHUNK_ROWS = 8 * TILE_ROWS
BLOCK_ELEMENTS = TILE_ROWS * TILE_COLUMNS
# Summing more products than this in fp32 costs more than one bf16 element in 10,000 its correct
# rounding (measured with updates of a third of the weights): higher ranks are summed in fp64.
MAX_RANK_FLOAT32 = 64


class NotFiniteError(ArithmeticError):
    """A computed row has an infinite or NaN element; whoever knows the tensor's name adds it."""

    def __init__(self, row: int, detail: str) -> None:
        super().__init__(f"row {row:,}: {detail}")


class Workspace:
    """What one worker needs to fill rows: open inputs, reused buffers, and sums.

    `squared_change` accumulates in fp64 the sum of (written - source)² over all computed
    elements since it was last set.
    """

    def __init__(self, files: Files) -> None:
        self.files = files
        self.squared_change = 0.0
        self._buffers: dict[str, Bytes] = {}
        # The tensors are kept too, so that no other one can get their id.
        self._factors: dict[int, tuple[Lazy, Float32]] = {}
        self._scaled: dict[tuple[int, float], tuple[int, Lazy, npt.NDArray[np.floating]]] = {}

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

    def factor(self, tensor: Lazy) -> Float32:
        """All of a small matrix as fp32, kept while the same node asks for it again."""
        held = self._factors.get(id(tensor))
        if held is None:
            held = (tensor, read_float32(tensor, 0, tensor.rows, self))
            self._factors[id(tensor)] = held
        return held[1]

    def scaled_rows(self, tensor: Lazy, scale: float, tile: int) -> npt.NDArray[np.floating]:
        """`TILE_ROWS` rows of `scale * tensor` from row `tile` on, zeros beyond the last one.

        In fp32, or in fp64 for ranks above `MAX_RANK_FLOAT32`.
        """
        chunk = tile // CHUNK_ROWS
        kept = self._scaled.get((id(tensor), scale))
        if kept is None or kept[0] != chunk:
            first = chunk * CHUNK_ROWS
            count = min(CHUNK_ROWS, tensor.rows - first)
            exact = tensor.columns > MAX_RANK_FLOAT32
            height = -(-count // TILE_ROWS) * TILE_ROWS
            rows = np.zeros((height, tensor.columns), np.float64 if exact else np.float32)
            # The scale is applied in fp64, so that it costs one rounding and not two.
            rows[:count] = read_float32(tensor, first, first + count, self) * np.float64(scale)
            kept = (chunk, tensor, rows)
            self._scaled[id(tensor), scale] = kept
        first = tile - chunk * CHUNK_ROWS
        return kept[2][first : first + TILE_ROWS]

    def forget_factors(self) -> None:
        """Drop the kept matrices; called when another tensor begins."""
        self._factors.clear()
        self._scaled.clear()


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
        _check_rows(self, start, stop)
        return replace(
            self,
            offset=self.offset + start * self.row_nbytes,
            shape=(stop - start, *self.shape[1:]),
        )

    def reshape(self, shape: Shape) -> Stored:
        _check_elements(self, shape)
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
        _check_rows(self, start, stop)
        part = self.data[start * self.row_nbytes : stop * self.row_nbytes]
        return Array(part, (stop - start, *self.shape[1:]), self.dtype)

    def reshape(self, shape: Shape) -> Array:
        _check_elements(self, shape)
        return Array(self.data, shape, self.dtype)

    def fill(self, start: int, stop: int, out: Bytes, work: Workspace) -> None:
        np.copyto(out, self.data[start * self.row_nbytes : stop * self.row_nbytes])


@dataclass(frozen=True, slots=True)
class Concat(Lazy):
    """Parts joined along dim 0; made by `concat`."""

    parts: tuple[Lazy, ...]
    shape: Shape
    dtype: str

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
        _check_rows(self, start, stop)
        if start == stop:
            return self.parts[0].take(0, 0)
        return concat([part.take(low, high) for part, low, high, _ in self._overlaps(start, stop)])

    def reshape(self, shape: Shape) -> Lazy:
        _check_elements(self, shape)
        inner, row = shape[1:], math.prod(shape[1:])
        if any(math.prod(part.shape) % row for part in self.parts):
            raise ValueError(f"the parts of {self.shape} do not fit {shape}")
        return concat(part.reshape((math.prod(part.shape) // row, *inner)) for part in self.parts)

    def fill(self, start: int, stop: int, out: Bytes, work: Workspace) -> None:
        for part, low, high, at in self._overlaps(start, stop):
            place = out[at * self.row_nbytes : (at + high - low) * self.row_nbytes]
            step = part.rows // part.shape[0]  # a cast may have finer rows than dim 0
            part.fill(low * step, high * step, place, work)


@dataclass(frozen=True, slots=True)
class LowRank:
    """The update `scale * B @ A`, of which rows `[start, stop)` are meant.

    `A` is (r, columns), `B` is (rows, r). Tiles are counted from the first row of `B`, so any
    window of rows has the same bits wherever it ends up.
    """

    A: Lazy
    B: Lazy
    scale: float
    start: int
    stop: int

    def take(self, start: int, stop: int) -> LowRank:
        """The same update for rows `[start, stop)` of this window."""
        return replace(self, start=self.start + start, stop=self.start + stop)

    def fill(self, out: Float32, row: int, column: int, work: Workspace) -> None:
        """Put the part of the update that begins at (`row`, `column`) into `out`.

        `column` is a multiple of `TILE_COLUMNS`, and `out` is no wider than that.
        """
        right = work.factor(self.A)[:, column : column + out.shape[1]]
        if self.A.rows > MAX_RANK_FLOAT32:
            right = right.astype(np.float64)
        first, last = self.start + row, self.start + row + len(out)
        for tile in range(first - first % TILE_ROWS, last, TILE_ROWS):
            left = work.scaled_rows(self.B, self.scale, tile)
            low, high = max(first, tile), min(last, tile + TILE_ROWS)
            rows = out[low - first : high - first]
            if len(rows) == TILE_ROWS and left.dtype == rows.dtype:
                np.matmul(left, right, out=rows)
            else:
                np.copyto(rows, np.matmul(left, right)[low - tile : high - tile])


@dataclass(frozen=True, slots=True)
class Computed(Lazy):
    """`source + sum of terms`, in fp32, rounded once to `dtype`.

    `source` preserves bytes and is reshaped to the matrix that the terms are added to. Without
    terms this is a cast. Made by `cast` and `add_low_rank`.
    """

    source: Lazy
    terms: tuple[LowRank, ...]
    dtype: str
    shape: Shape

    @property
    def rows(self) -> int:
        return self.source.rows

    @property
    def columns(self) -> int:
        return self.source.columns

    def take(self, start: int, stop: int) -> Computed:
        _check_rows(self, start, stop)
        step = self.rows // self.shape[0] if self.shape[0] else 0
        first, last = start * step, stop * step
        terms = tuple(term.take(first, last) for term in self.terms)
        shape = (stop - start, *self.shape[1:])
        return Computed(self.source.take(first, last), terms, self.dtype, shape)

    def fill(self, start: int, stop: int, out: Bytes, work: Workspace) -> None:
        rows, columns = stop - start, self.columns
        if not rows * columns:
            return
        # Same dtype: the rows are read to where they will be replaced.
        same = self.source.dtype == self.dtype
        raw = out if same else work.bytes("source", rows * self.source.row_nbytes)
        self.source.fill(start, stop, raw, work)
        old = raw.view(FLOATS[self.source.dtype]).reshape(rows, columns)
        new = out.view(FLOATS[self.dtype]).reshape(rows, columns)
        # Overflow is found below, with the row; a warning would only come on top.
        with np.errstate(over="ignore", invalid="ignore"):
            self._fill_blocks(old, new, start, work)

    def _fill_blocks(self, old: Elements, new: Elements, start: int, work: Workspace) -> None:
        rows, columns = old.shape
        for row, column, height, width in _blocks(rows, columns):
            block = np.s_[row : row + height, column : column + width]
            update = self._update(start + row, column, height, width, work)
            squared = add_and_round(
                old[block], self.source.dtype, update, new[block], self.dtype, work.float32
            )
            if not math.isfinite(squared):
                raise self._not_finite(start + row, column, (height, width), update, work)
            work.squared_change += squared

    def _update(
        self, row: int, column: int, height: int, width: int, work: Workspace
    ) -> Float32 | None:
        """The sum of the terms for a block, in fp32."""
        if not self.terms:
            return None
        update = work.float32("update", height, width)
        self.terms[0].fill(update, row, column, work)
        for term in self.terms[1:]:
            more = work.float32("more", height, width)
            term.fill(more, row, column, work)
            np.add(update, more, out=update)
        return update

    def _not_finite(
        self, row: int, column: int, shape: Shape, update: Float32 | None, work: Workspace
    ) -> NotFiniteError:
        """Which row of a block is not finite, and why."""
        # The block may be overwritten already: its source is read again.
        base = read_float32(self.source, row, row + shape[0], work)
        base = np.ascontiguousarray(base[:, column : column + shape[1]])
        total = base if update is None else base + update
        rounded = np.empty_like(base)
        narrow(total, self.dtype, np.empty(shape, FLOATS[self.dtype]), rounded)
        bad = int(np.argmin(np.isfinite(rounded - base).all(axis=1)))
        if not np.isfinite(base[bad]).all():
            detail = "the base weight is not finite (NaN or infinite)"
        elif np.isfinite(total[bad]).all():
            detail = (
                f"a value of magnitude {np.abs(total[bad]).max():g} does not fit in {self.dtype}; "
                "write --dtype bf16 or fp32 instead"
            )
        else:
            detail = "the merged weight is not finite (NaN or infinite)"
        return NotFiniteError(row + bad, detail)


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


def cast(tensor: Lazy, dtype: str) -> Lazy:
    """`tensor` rounded to a float `dtype`; integers and other non-floats stay what they are.

    Raises `InputError` for floats that do not widen to fp32 without loss.
    """
    if tensor.dtype == dtype or not tensor.dtype.startswith(("F", "BF")):
        return tensor
    if tensor.dtype not in FLOATS or dtype not in FLOATS:
        raise InputError(
            f"cannot convert {tensor.dtype} to {dtype}; only {', '.join(FLOATS)} can be converted. "
            "Keep the dtype, or dequantize the checkpoint first."
        )
    if isinstance(tensor, Computed):
        return replace(tensor, dtype=dtype)
    if len(tensor.pieces) > 1:
        return concat([cast(piece, dtype) for piece in tensor.pieces])
    columns = tensor.shape[-1] if len(tensor.shape) > 1 else 1
    matrix = (math.prod(tensor.shape) // max(columns, 1), columns)
    return Computed(tensor.reshape(matrix), (), dtype, tensor.shape)


def add_low_rank(tensor: Lazy, terms: Sequence[LowRank]) -> Lazy:
    """`tensor` plus the sum of `terms` (each with as many rows), rounded once to its dtype.

    Raises `ValueError` if a term's shape does not fit.
    """
    for term in terms:
        if (term.stop - term.start, term.A.columns) != (tensor.rows, tensor.columns):
            raise ValueError(f"a {term.B.shape} x {term.A.shape} update on {tensor.shape}")
        if term.B.columns != term.A.rows:
            raise ValueError(f"ranks of {term.B.shape} and {term.A.shape} differ")
    if isinstance(tensor, Computed):
        matrix = (tensor.shape[0], math.prod(tensor.shape[1:]))
        return replace(tensor, source=tensor.source.reshape(matrix), terms=(*tensor.terms, *terms))
    if tensor.ranges() is None and len(tensor.pieces) > 1:
        parts, first = [], 0
        for piece in tensor.pieces:
            height = piece.shape[0]
            parts.append(add_low_rank(piece, [t.take(first, first + height) for t in terms]))
            first += height
        return concat(parts)
    source = tensor.reshape((tensor.rows, tensor.columns))
    return Computed(source, tuple(terms), tensor.dtype, tensor.shape)


def read_float32(tensor: Lazy, start: int, stop: int, work: Workspace) -> Float32:
    """Rows `[start, stop)` of a float tensor as a new fp32 matrix."""
    raw = work.bytes("narrow", (stop - start) * tensor.row_nbytes)
    tensor.fill(start, stop, raw, work)
    out = np.empty((stop - start, tensor.columns), np.float32)
    widen(raw.view(FLOATS[tensor.dtype]).reshape(out.shape), tensor.dtype, out)
    return out


def _blocks(rows: int, columns: int) -> Iterator[tuple[int, int, int, int]]:
    """Row, column, height and width of blocks that fit the processor's cache."""
    width = min(columns, TILE_COLUMNS)
    height = max(BLOCK_ELEMENTS // width // TILE_ROWS, 1) * TILE_ROWS
    for row in range(0, rows, height):
        for column in range(0, columns, width):
            yield row, column, min(height, rows - row), min(width, columns - column)


def _check_rows(tensor: Lazy, start: int, stop: int) -> None:
    if not tensor.shape or not 0 <= start <= stop <= tensor.shape[0]:
        raise ValueError(f"rows {start}:{stop} of a tensor of shape {tensor.shape}")


def _check_elements(tensor: Lazy, shape: Shape) -> None:
    if math.prod(shape) != math.prod(tensor.shape):
        raise ValueError(f"cannot reshape {tensor.shape} to {shape}")
