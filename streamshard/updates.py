"""Updates of weights as lazy tensors: low-rank products, DoRA's magnitudes, and casts.

`Computed` is the one node that computes. It holds a source that preserves bytes, adds the sum of
its terms in fp32, scales by magnitudes if it has any, and rounds once. The factors of a term may be
views (`Transposed`, `Columns`) of what the adapter has.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import TypeAlias

import numpy as np
import numpy.typing as npt

from streamshard.arithmetic import FLOATS, add_and_round, add_row_squares, narrow
from streamshard.errors import InputError
from streamshard.tensors import (
    Array,
    Bytes,
    Elements,
    Float32,
    Lazy,
    NotFiniteError,
    Shape,
    Stored,
    Workspace,
    check_rows,
    concat,
    read_float32,
)

__all__ = [
    "Columns",
    "Computed",
    "LowRank",
    "Magnitude",
    "Transposed",
    "add_low_rank",
    "cast",
    "with_magnitude",
]

Float64: TypeAlias = npt.NDArray[np.float64]

# The grid of the low-rank product. Constants: the bits of a BLAS product depend on the size of
# the call, so these must not depend on memory, workers, shards or layout.
TILE_ROWS = 128
TILE_COLUMNS = 1024
CHUNK_ROWS = 8 * TILE_ROWS
BLOCK_ELEMENTS = TILE_ROWS * TILE_COLUMNS
# Summing more products than this in fp32 costs more than one bf16 element in 10,000 its correct
# rounding (measured with updates of a third of the weights): higher ranks are summed in fp64.
MAX_RANK_FLOAT32 = 64
# Factors of fused experts up to this size are kept in memory while one tensor is written.
HELD_NBYTES = 32_000_000
READ_NBYTES = 1_000_000


@dataclass(frozen=True, slots=True)
class Transposed(Lazy):
    """A small matrix with rows and columns swapped; only as a factor of an update."""

    source: Lazy

    @property
    def shape(self) -> Shape:  # type: ignore[override]
        return (self.source.columns, self.source.rows)

    @property
    def dtype(self) -> str:  # type: ignore[override]
        return self.source.dtype

    def take(self, start: int, stop: int) -> Lazy:
        raise ValueError("a transposed factor is taken as a whole")

    def fill(self, start: int, stop: int, out: Bytes, work: Workspace) -> None:
        source, count = self.source, stop - start
        place = out.view(FLOATS[self.dtype]).reshape(count, source.rows)
        if isinstance(source, (Stored, Array)):
            flat = source.reshape((source.rows * source.columns,))
            part = work.bytes("transposed", count * flat.row_nbytes)
            for row in range(source.rows):
                first = row * source.columns + start
                flat.fill(first, first + count, part, work)
                place[:, row] = part.view(place.dtype)
            return
        step = max(READ_NBYTES // max(source.row_nbytes, 1), 1)
        for row in range(0, source.rows, step):
            last = min(row + step, source.rows)
            part = work.bytes("transposed", (last - row) * source.row_nbytes)
            source.fill(row, last, part, work)
            place[:, row:last] = part.view(place.dtype).reshape(last - row, -1)[:, start:stop].T


@dataclass(frozen=True, slots=True)
class Columns(Lazy):
    """Every `step`-th column of a matrix, `count` of them from `first` on; only as a factor.

    The factors of fused experts lie side by side in one matrix (PEFT `ParamWrapper`).
    """

    source: Lazy
    first: int
    step: int
    count: int

    @property
    def shape(self) -> Shape:  # type: ignore[override]
        return (self.source.rows, self.count)

    @property
    def dtype(self) -> str:  # type: ignore[override]
        return self.source.dtype

    def take(self, start: int, stop: int) -> Lazy:
        raise ValueError("columns of a factor are taken as a whole")

    def fill(self, start: int, stop: int, out: Bytes, work: Workspace) -> None:
        place = out.view(FLOATS[self.dtype]).reshape(stop - start, self.count)
        chosen = np.s_[:, self.first : self.first + self.step * self.count : self.step]
        source = self.source
        if source.nbytes <= HELD_NBYTES:
            whole = work.held(source).view(place.dtype).reshape(source.rows, source.columns)
            np.copyto(place, whole[start:stop][chosen])
            return
        step = max(READ_NBYTES // source.row_nbytes, 1)
        for row in range(start, stop, step):
            last = min(row + step, stop)
            part = work.bytes("columns", (last - row) * source.row_nbytes)
            source.fill(row, last, part, work)
            rows = part.view(place.dtype).reshape(last - row, source.columns)
            place[row - start : last - start] = rows[chosen]


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
        right = _factor(self.A, work)[:, column : column + out.shape[1]]
        if self.A.rows > MAX_RANK_FLOAT32:
            right = right.astype(np.float64)
        first, last = self.start + row, self.start + row + len(out)
        for tile in range(first - first % TILE_ROWS, last, TILE_ROWS):
            left = self._scaled_rows(tile, work)
            low, high = max(first, tile), min(last, tile + TILE_ROWS)
            rows = out[low - first : high - first]
            if len(rows) == TILE_ROWS and left.dtype == rows.dtype:
                np.matmul(left, right, out=rows)
            else:
                np.copyto(rows, np.matmul(left, right)[low - tile : high - tile])

    def _scaled_rows(self, tile: int, work: Workspace) -> npt.NDArray[np.floating]:
        """`TILE_ROWS` rows of `scale * B` from row `tile` on, zeros beyond the last one.

        In fp32, or in fp64 for ranks above `MAX_RANK_FLOAT32`.
        """
        B = self.B
        chunks: dict[int, tuple[Lazy, npt.NDArray[np.floating]]]
        chunks = work.kept(("scaled", id(B), self.scale), dict)
        chunk = tile // CHUNK_ROWS
        if chunk not in chunks:
            first = chunk * CHUNK_ROWS
            count = min(CHUNK_ROWS, B.rows - first)
            height = -(-count // TILE_ROWS) * TILE_ROWS
            exact = B.columns > MAX_RANK_FLOAT32
            rows = np.zeros((height, B.columns), np.float64 if exact else np.float32)
            # The scale is applied in fp64, so that it costs one rounding and not two.
            rows[:count] = read_float32(B, first, first + count, work) * np.float64(self.scale)
            chunks.clear()
            chunks[chunk] = (B, rows)
        first = tile - chunk * CHUNK_ROWS
        return chunks[chunk][1][first : first + TILE_ROWS]


@dataclass(frozen=True, slots=True)
class Magnitude:
    """DoRA's magnitudes `m` (arXiv:2402.09353): what is added up is scaled by `m / norm`.

    With `whole` None there is one of `vector` for each row, from `start` on, and the norms are
    those of the rows. Otherwise there is one for each column, and the norms are those of the
    columns of `whole`, over all of its rows.
    """

    vector: Lazy
    start: int = 0
    whole: Computed | None = None

    def take(self, start: int) -> Magnitude:
        """The magnitudes of the rows from `start` on."""
        return self if self.whole is not None else replace(self, start=self.start + start)


@dataclass(frozen=True, slots=True)
class Computed(Lazy):
    """`source + sum of terms`, in fp32, scaled by `magnitude` if it has one, rounded once to `dtype`.

    `source` preserves bytes and is reshaped to the matrix that the terms are added to. Without
    terms this is a cast. Made by `cast`, `add_low_rank` and `with_magnitude`.
    """

    source: Lazy
    terms: tuple[LowRank, ...]
    dtype: str
    shape: Shape
    magnitude: Magnitude | None = None

    @property
    def rows(self) -> int:
        return self.source.rows

    @property
    def columns(self) -> int:
        return self.source.columns

    def take(self, start: int, stop: int) -> Computed:
        check_rows(self, start, stop)
        step = self.rows // self.shape[0] if self.shape[0] else 0
        first, last = start * step, stop * step
        return Computed(
            self.source.take(first, last),
            tuple(term.take(first, last) for term in self.terms),
            self.dtype,
            (stop - start, *self.shape[1:]),
            self.magnitude and self.magnitude.take(first),
        )

    def reshape(self, shape: Shape) -> Computed:
        """The same in another shape, of as many rows or of parts of them."""
        if math.prod(shape) != math.prod(self.shape) or (shape[0] and self.rows % shape[0]):
            raise ValueError(f"cannot reshape {self.shape} to {shape}")
        return replace(self, shape=shape)

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
        with np.errstate(over="ignore", invalid="ignore", divide="ignore"):
            if self.magnitude is None:
                self._fill_blocks(old, new, start, work)
            elif self.magnitude.whole is None:
                self._fill_scaled_rows(old, new, start, work)
            else:
                self._fill_blocks(old, new, start, work, self._column_scale(work))

    def _fill_blocks(
        self,
        old: Elements,
        new: Elements,
        start: int,
        work: Workspace,
        scale: Float64 | None = None,
    ) -> None:
        rows, columns = old.shape
        for row, column, height, width in _blocks(rows, columns):
            block = np.s_[row : row + height, column : column + width]
            update = self.update(start + row, column, height, width, work)
            by = None if scale is None else scale[:, column : column + width]
            self._round(old[block], new[block], (start + row, column), update, work, by)

    def _fill_scaled_rows(self, old: Elements, new: Elements, start: int, work: Workspace) -> None:
        """Rows whose norms are needed before the first of their elements is known."""
        rows, columns = old.shape
        for row in range(0, rows, TILE_ROWS):
            height = min(TILE_ROWS, rows - row)
            own = np.s_[row : row + height]
            whole = work.float32("row updates", height, columns)
            squares = np.zeros(height)
            for column in range(0, columns, TILE_COLUMNS):
                across = np.s_[:, column : column + TILE_COLUMNS]
                update = self.update(start + row, column, height, whole[across].shape[1], work)
                np.copyto(whole[across], 0.0 if update is None else update)
                part, dtype = old[own][across], self.source.dtype
                add_row_squares(part, dtype, whole[across], squares, work.float32)
            scale = self._row_scale(start + row, np.sqrt(squares), work)
            for column in range(0, columns, TILE_COLUMNS):
                across = np.s_[:, column : column + TILE_COLUMNS]
                at = (start + row, column)
                self._round(old[own][across], new[own][across], at, whole[across], work, scale)

    def _row_scale(self, row: int, norms: Float64, work: Workspace) -> Float64:
        magnitude = self.magnitude
        if magnitude is None:
            raise ValueError("no magnitudes")
        if not norms.all():
            raise NotFiniteError(
                row + int(np.argmin(norms)),
                "the norm of this row is zero, so DoRA's scale of it is infinite",
            )
        first = magnitude.start + row
        vector = read_float32(magnitude.vector, first, first + len(norms), work)
        return vector.astype(np.float64) / norms[:, None]

    def _column_scale(self, work: Workspace) -> Float64:
        """Magnitude by norm of every column, which takes a pass of its own over all rows."""
        magnitude = self.magnitude
        if magnitude is None or magnitude.whole is None:
            raise ValueError("no magnitudes of columns")
        whole, vector = magnitude.whole, magnitude.vector

        def scale() -> tuple[Magnitude, Float64]:
            squares = np.zeros(whole.columns)
            for row in range(0, whole.rows, TILE_ROWS):
                count = min(TILE_ROWS, whole.rows - row)
                base = read_float32(whole.source, row, row + count, work)
                for column in range(0, whole.columns, TILE_COLUMNS):
                    across = np.s_[:, column : column + TILE_COLUMNS]
                    part = base[across]
                    update = whole.update(row, column, count, part.shape[1], work)
                    exact = (part if update is None else part + update).astype(np.float64)
                    squares[column : column + TILE_COLUMNS] += np.einsum("ij,ij->j", exact, exact)
            if not squares.all():
                raise NotFiniteError(
                    0,
                    f"the norm of column {int(np.argmin(squares)):,} is zero, so DoRA's scale of it "
                    "is infinite",
                )
            values = read_float32(vector, 0, vector.rows, work).reshape(1, -1)
            return magnitude, values.astype(np.float64) / np.sqrt(squares)

        found: tuple[Magnitude, Float64] = work.kept(("columns", id(magnitude)), scale)
        return found[1]

    def _round(
        self,
        old: Elements,
        new: Elements,
        at: tuple[int, int],
        update: Float32 | None,
        work: Workspace,
        scale: Float64 | None,
    ) -> None:
        change = add_and_round(old, self.source.dtype, update, new, self.dtype, work.float32, scale)
        if not math.isfinite(change.squared):
            raise self._not_finite(*at, old.shape, update, work, scale)
        work.change = work.change.plus(change)

    def update(
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
        self,
        row: int,
        column: int,
        shape: Shape,
        update: Float32 | None,
        work: Workspace,
        scale: Float64 | None,
    ) -> NotFiniteError:
        """Which row of a block is not finite, and why."""
        # The block may be overwritten already: its source is read again.
        base = read_float32(self.source, row, row + shape[0], work)
        base = np.ascontiguousarray(base[:, column : column + shape[1]])
        total = base if update is None else base + update
        if scale is not None:
            total = (total * scale).astype(np.float32)
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
        return concat([cast(piece, dtype) for piece in tensor.pieces]).reshape(tensor.shape)
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
        if tensor.magnitude is not None:
            raise ValueError("an update on what DoRA has scaled")
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


def with_magnitude(tensor: Lazy, term: LowRank, vector: Lazy, *, by_row: bool) -> Lazy:
    """`m * V / |V|` with `V = tensor + term`: DoRA (arXiv:2402.09353, PEFT `DoraLinearLayer`).

    `vector` is `m`: one number for each row, with norms over rows, or for each column, with norms
    over columns. Raises `ValueError` if a shape does not fit.
    """
    count = tensor.rows if by_row else tensor.columns
    if vector.rows * vector.columns != count:
        raise ValueError(f"{vector.shape} magnitudes on {tensor.shape}")
    whole = add_low_rank(tensor, [term])
    if not isinstance(whole, Computed):
        raise ValueError("DoRA on what is computed already")  # noqa: TRY004
    vector = vector.reshape((count,))
    return replace(whole, magnitude=Magnitude(vector, 0, None if by_row else whole))


def _factor(tensor: Lazy, work: Workspace) -> Float32:
    """All of a small matrix as fp32, kept while one tensor is written."""

    def read() -> tuple[Lazy, Float32]:
        return tensor, read_float32(tensor, 0, tensor.rows, work)

    kept: tuple[Lazy, Float32] = work.kept(("factor", id(tensor)), read)
    return kept[1]


def _blocks(rows: int, columns: int) -> Iterator[tuple[int, int, int, int]]:
    """Row, column, height and width of blocks that fit the processor's cache."""
    width = min(columns, TILE_COLUMNS)
    height = max(BLOCK_ELEMENTS // width // TILE_ROWS, 1) * TILE_ROWS
    for row in range(0, rows, height):
        for column in range(0, columns, width):
            yield row, column, min(height, rows - row), min(width, columns - column)
