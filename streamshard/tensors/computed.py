"""Tensors that are computed: an update or DoRA's magnitudes on a source, or a cast; rounded once.

`Computed` is the one node that computes. It holds a source that preserves bytes, adds the sum of
its terms in fp32, scales by magnitudes if it has any, and rounds once.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace

import numpy as np

from streamshard.tensors.arrays import Bytes, Elements, Float32, Float64
from streamshard.tensors.dtypes import DTYPE_BITS, FLOATS
from streamshard.tensors.lazy import (
    Input,
    Lazy,
    Shape,
    Window,
    all_counts,
    check_rows,
    read_float32,
)
from streamshard.tensors.low_rank import (
    TILE_COLUMNS,
    TILE_ROWS,
    LowRank,
    add_up,
    cache_blocks,
    tiles_of,
)
from streamshard.tensors.not_finite import why_not_finite, zero_norm
from streamshard.tensors.rounding import add_and_round, add_row_squares, widen
from streamshard.tensors.workspace import Workspace

__all__ = ["Computed", "Magnitude"]


# What a strip may take: its part of the factors A in fp32, and a tile of its rows.
STRIP_NBYTES = 32_000_000


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

    def inputs(self) -> Iterator[Input]:
        """What it is read from."""
        yield from all_counts(self.vector.inputs())
        if self.whole is not None:
            yield from self.whole.inputs()


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

    def strips(self) -> Iterator[tuple[int, int]]:
        """The columns of each strip."""
        width = self._strip_columns()
        for first in range(0, self.columns, width):
            yield first, min(first + width, self.columns)

    def windows(self, nbytes: int) -> Iterator[Window]:
        """Whole tiles of rows, strip by strip; casts in the order of the file."""
        if not self.terms:
            yield from Lazy.windows(self, nbytes)
            return
        for first, last in self.strips():
            row_nbytes = (last - first) * DTYPE_BITS[self.dtype] // 8
            height = max(nbytes // max(row_nbytes, 1) // TILE_ROWS, 1) * TILE_ROWS
            for row in range(0, self.rows, height):
                yield row, min(row + height, self.rows), first, last

    def buffer_nbytes(self) -> int:
        if not self.terms:
            return self.source.buffer_nbytes()
        width = min(self._strip_columns(), self.columns)
        norms = 8 * self.rows if self.magnitude is not None else 0
        more = sum(term.buffer_nbytes() for term in self.terms)
        return width * self._column_nbytes(whole=width == self.columns) + norms + more

    def held(self) -> tuple[Lazy, ...]:
        return tuple(node for term in self.terms for node in term.held())

    def inputs(self) -> Iterator[Input]:
        yield from self.source.inputs()
        for term in self.terms:
            yield from term.inputs()
        if self.magnitude is not None:
            yield from self.magnitude.inputs()

    def divides(self) -> bool:
        # Some magnitudes take a pass over everything before the first element is known.
        scale = self.magnitude
        return scale is None or (scale.whole is None and self.columns <= self._strip_columns())

    def _strip_columns(self) -> int:
        """How wide a strip is: everything if that is not too much, or as many tiles as are not."""
        if self.columns * self._column_nbytes(whole=True) <= STRIP_NBYTES:
            return max(self.columns, 1)
        tiles = STRIP_NBYTES // (self._column_nbytes(whole=False) * TILE_COLUMNS)
        return max(tiles, 1) * TILE_COLUMNS

    def _column_nbytes(self, *, whole: bool) -> int:
        """Bytes of memory that each column of a strip takes, or of `whole` rows."""
        height = min(self.rows, TILE_ROWS)
        bits = sum(DTYPE_BITS[dtype] for dtype in {self.dtype, self.source.dtype})
        nbytes = height * bits // 8 + sum(4 * term.A.rows for term in self.terms)
        if self.magnitude is not None and self.magnitude.whole is not None:
            nbytes += 3 * 8
        elif self.magnitude is not None and whole:
            nbytes += 4 * height  # the update, which is needed twice
        return nbytes

    def window(
        self, start: int, stop: int, first: int, last: int, out: Bytes, work: Workspace
    ) -> None:
        rows, columns = stop - start, last - first
        if not rows * columns:
            return
        # Same dtype: the rows are read to where they will be replaced.
        same = self.source.dtype == self.dtype
        raw = out
        if not same:
            raw = work.bytes("source", rows * columns * DTYPE_BITS[self.source.dtype] // 8)
        self.source.window(start, stop, first, last, raw, work)
        old = raw.view(FLOATS[self.source.dtype]).reshape(rows, columns)
        new = out.view(FLOATS[self.dtype]).reshape(rows, columns)
        width = self._strip_columns() if self.terms else last
        # Overflow is found below, with the row; a warning would only come on top.
        with np.errstate(over="ignore", invalid="ignore", divide="ignore"):
            if self.magnitude is not None and self.magnitude.whole is None:
                if columns == self.columns <= width:
                    self._fill_scaled_rows(old, new, start, work)
                    return
                squares = self._row_squares(work)[start:stop]
                scale = self._row_scale(start, np.sqrt(squares), work)
            for left in range(first - first % width, last, width):
                strip = left, min(left + width, self.columns)
                low, high = max(left, first), min(strip[1], last)
                inner = np.s_[:, low - first : high - first]
                if self.magnitude is None:
                    factors = None
                elif self.magnitude.whole is None:
                    factors = scale
                else:
                    factors = self._column_scale(strip, work)[:, low - left : high - left]
                self._fill_blocks(old[inner], new[inner], (start, low), strip, work, factors)

    def _fill_blocks(
        self,
        old: Elements,
        new: Elements,
        at: tuple[int, int],
        strip: tuple[int, int],
        work: Workspace,
        scale: Float64 | None,
    ) -> None:
        """Compute a window that begins at a row and column, all of it in one strip."""
        first_row, first = at
        rows, columns = old.shape
        for row, column, height, width in cache_blocks(
            rows, columns, first, self.columns if self.terms else None
        ):
            block = np.s_[row : row + height, column : column + width]
            place = first_row + row, first + column
            update = self.update(place[0], place[1], height, width, work, strip)
            by = scale
            if scale is not None:
                by = scale[block[0]] if scale.shape == (len(old), 1) else scale[:, block[1]]
            self._round(old[block], new[block], place, update, work, by)

    def _fill_scaled_rows(self, old: Elements, new: Elements, start: int, work: Workspace) -> None:
        """Rows whose norms are needed before the first of their elements is known."""
        rows, columns = old.shape
        strip = 0, columns
        for row in range(0, rows, TILE_ROWS):
            height = min(TILE_ROWS, rows - row)
            own = np.s_[row : row + height]
            whole = work.float32("row updates", height, columns)
            squares = np.zeros(height)
            for column in range(0, columns, TILE_COLUMNS):
                across = np.s_[:, column : column + TILE_COLUMNS]
                place = whole[across]
                update = self.update(start + row, column, height, place.shape[1], work, strip)
                np.copyto(place, 0.0 if update is None else update)
                add_row_squares(old[own][across], self.source.dtype, place, squares, work.float32)
            scale = self._row_scale(start + row, np.sqrt(squares), work)
            for column in range(0, columns, TILE_COLUMNS):
                across = np.s_[:, column : column + TILE_COLUMNS]
                at = (start + row, column)
                self._round(old[own][across], new[own][across], at, whole[across], work, scale)

    def _row_squares(self, work: Workspace) -> Float64:
        """Sums over all rows, which take a pass of their own over all strips."""
        dtype = self.source.dtype

        def add_up() -> Float64:
            squares = np.zeros(self.rows)
            for strip in self.strips():
                for row, column, base in tiles_of(self.source, strip, work):
                    update = self.update(row, column, len(base), base.shape[1], work, strip)
                    if update is not None:
                        own = squares[row : row + len(base)]
                        add_row_squares(base, dtype, update, own, work.float32)
            return squares

        kept: Float64 = work.kept(self, "squares", None, add_up)
        return kept

    def _row_scale(self, row: int, norms: Float64, work: Workspace) -> Float64:
        magnitude = self.magnitude
        if magnitude is None:
            raise ValueError("no magnitudes")
        if not norms.all():
            raise zero_norm(row + int(np.argmin(norms)), "this row")
        first = magnitude.start + row
        vector = read_float32(magnitude.vector, first, first + len(norms), work)
        return vector.astype(np.float64) / norms[:, None]

    def _column_scale(self, strip: tuple[int, int], work: Workspace) -> Float64:
        """Magnitude by norm of every column of a strip, which takes a pass of its own over all rows."""
        magnitude = self.magnitude
        if magnitude is None or magnitude.whole is None:
            raise ValueError("no magnitudes of columns")
        whole, vector = magnitude.whole, magnitude.vector
        first, last = strip

        def scale() -> Float64:
            squares = np.zeros(last - first)
            for row, column, base in tiles_of(whole.source, strip, work):
                height, width = base.shape
                total = work.float32("total", height, width)
                widen(base, whole.source.dtype, total)
                update = whole.update(row, column, height, width, work, strip)
                if update is not None:
                    np.add(total, update, out=total)
                exact = total.astype(np.float64)
                own = squares[column - first : column - first + width]
                own += np.einsum("ij,ij->j", exact, exact)
            if not squares.all():
                raise zero_norm(0, f"column {first + int(np.argmin(squares)):,}")
            values = read_float32(vector, first, last, work).reshape(1, -1)
            return values.astype(np.float64) / np.sqrt(squares)

        found: Float64 = work.kept(magnitude, "scale", strip, scale)
        return found

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
            raise why_not_finite(self.source, self.dtype, *at, old.shape, update, work, scale)
        work.changes.add(change)

    def update(
        self,
        row: int,
        column: int,
        height: int,
        width: int,
        work: Workspace,
        strip: tuple[int, int] | None = None,
    ) -> Float32 | None:
        """The sum of the terms for a block that crosses no edge of a tile of columns, in fp32.

        `strip` is the strip that it is in, if that is known.
        """
        if not self.terms:
            return None
        if strip is None:
            columns = self._strip_columns()
            first = column - column % columns
            strip = first, min(first + columns, self.columns)
        tile = column - column % TILE_COLUMNS
        whole = min(TILE_COLUMNS, self.columns - tile)
        update = work.float32("update", height, whole)
        add_up(self.terms, update, row, tile, strip, work)
        return update if width == whole else update[:, column - tile : column - tile + width]
