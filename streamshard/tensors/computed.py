"""Tensors that are computed: an update or DoRA's magnitudes on a source, or a cast; rounded once.

`Computed` is the one node that computes. It holds a source that preserves bytes. What it adds the sum
of its terms to, and scales by magnitudes if it has any, is a real number: the exact value is rounded
once. Kernels do nearly all of it, and say what they could not decide (`kernel.py`).
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import replace

import numpy as np

from streamshard.tensors.arrays import Bytes, Elements, Float32, Float64
from streamshard.tensors.dtypes import DTYPE_BITS, FLOATS
from streamshard.tensors.exact import Scaled
from streamshard.tensors.kernel import needs_fp64
from streamshard.tensors.lazy import (
    Input,
    Lazy,
    Shape,
    Window,
    all_counts,
    check_rows,
    read_float32,
)
from streamshard.tensors.low_rank import LowRank
from streamshard.tensors.magnitudes import Scale, scale_of
from streamshard.tensors.merging import Addition
from streamshard.tensors.not_finite import why_cast_fails, zero_norm
from streamshard.tensors.open_elements import square_of_column, square_of_row
from streamshard.tensors.panels import bounds_of, rows_nbytes
from streamshard.tensors.rounding import Change, Changes, round_block
from streamshard.tensors.workspace import Workspace
from streamshard.values import frozen

__all__ = ["TILE_ROWS", "Computed", "Magnitude"]


# What a strip may take: its part of the factors A in fp32, and a tile of its rows.
STRIP_NBYTES = 32_000_000
# Rows that are computed at a time, or several times as many if they are short, and columns of which a
# strip has several; no byte depends on them.
TILE_ROWS = 64
TILE_NBYTES = 1024 * 1024
TILE_COLUMNS = 1024
BLOCK_ELEMENTS = 128 * 1024


@frozen
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


@frozen
class Computed(Lazy):
    """`source + sum of terms`, scaled by `magnitude` if it has one, rounded once to `dtype`.

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
            most = max(nbytes, TILE_NBYTES) // max(row_nbytes, 1)
            height = max(most // TILE_ROWS, 1) * TILE_ROWS
            for row in range(0, self.rows, height):
                yield row, min(row + height, self.rows), first, last

    def buffer_nbytes(self) -> int:
        if not self.terms:
            return self.source.buffer_nbytes()
        width = min(self._strip_columns(), self.columns)
        norms = 0
        if self.magnitude is not None:
            norms = 5 * 8 * (self.rows if self.magnitude.whole is None else width)
        kinds = {self._addition(None).wide} | ({True} if self.magnitude is not None else set())
        rows = rows_nbytes(self.terms, self.rows, kinds)
        tile = min(TILE_NBYTES, self.nbytes) * self._bits() // DTYPE_BITS[self.dtype]
        return width * self._column_nbytes() + tile + norms + rows

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
        nbytes = self._column_nbytes()
        if self.columns * nbytes <= STRIP_NBYTES:
            return max(self.columns, 1)
        return max(STRIP_NBYTES // (nbytes * TILE_COLUMNS), 1) * TILE_COLUMNS

    def _column_nbytes(self) -> int:
        """Bytes of memory that each column of a strip takes."""
        height = min(self.rows, TILE_ROWS)
        return height * self._bits() // 8 + sum(4 * term.A.rows for term in self.terms) + 4

    def _bits(self) -> int:
        """Bits of memory that each element of a window takes."""
        return sum(DTYPE_BITS[dtype] for dtype in {self.dtype, self.source.dtype})

    def _addition(self, scale: Scale | None) -> Addition:
        wide = needs_fp64(self.dtype) or not (scale is None or scale.narrow)
        return Addition(self.terms, self.dtype, wide=wide)

    def window(
        self, start: int, stop: int, first: int, last: int, out: Bytes, work: Workspace
    ) -> None:
        rows, columns = stop - start, last - first
        if not rows * columns:
            return
        # Same dtype: the rows are read to where they will be replaced.
        raw = out
        if self.source.dtype != self.dtype:
            raw = work.bytes("source", rows * columns * DTYPE_BITS[self.source.dtype] // 8)
        self.source.window(start, stop, first, last, raw, work)
        old = raw.view(FLOATS[self.source.dtype]).reshape(rows, columns)
        new = out.view(FLOATS[self.dtype]).reshape(rows, columns)
        # What is not finite is found below, with its row; a warning would only come on top.
        with np.errstate(over="ignore", invalid="ignore", divide="ignore"):
            if not self.terms:
                self._round(old, new, (start, first), work)
                return
            width = self._strip_columns()
            for left in range(first - first % width, last, width):
                strip = left, min(left + width, self.columns)
                low, high = max(left, first), min(strip[1], last)
                inner = np.s_[:, low - first : high - first]
                scale = self._scale(old, (start, stop), strip, work)
                place = old[inner], new[inner]
                self._addition(scale).merge(
                    self.source.dtype, *place, (start, low), strip, work, scale
                )

    def update(self, start: int, stop: int, first: int, last: int, work: Workspace) -> Float32:
        """The sum of the terms for a window, rounded once to fp32."""
        plain = Addition(self.terms, "F32", wide=True)
        out = np.zeros((stop - start, last - first), np.float32)
        width, changes = self._strip_columns(), work.changes
        work.changes = Changes()
        for left in range(first - first % width, last, width):
            strip = left, min(left + width, self.columns)
            low, high = max(left, first), min(strip[1], last)
            part = out[:, low - first : high - first]
            plain.merge("F32", part, part, (start, low), strip, work, None)
        work.changes = changes
        return out

    def _round(self, old: Elements, new: Elements, at: tuple[int, int], work: Workspace) -> None:
        """A cast, in blocks that fit the processor's cache."""
        rows, columns = old.shape
        width = min(columns, BLOCK_ELEMENTS)
        height = BLOCK_ELEMENTS // width
        for row in range(0, rows, height):
            for column in range(0, columns, width):
                block = np.s_[row : row + height, column : column + width]
                shape = old[block].shape
                base, rounded = (work.float32(name, *shape) for name in ("base", "change"))
                cast = round_block(
                    old[block], self.source.dtype, new[block], self.dtype, base, rounded
                )
                if not math.isfinite(cast):
                    place = at[0] + row, at[1] + column
                    raise why_cast_fails(self.source, self.dtype, *place, shape, work)
                work.changes.add(Change(cast=cast))

    # --- DoRA ---

    def _scale(
        self, old: Elements, rows: tuple[int, int], strip: tuple[int, int], work: Workspace
    ) -> Scale | None:
        """Magnitudes by norms for a window of rows, or for the columns of a strip."""
        magnitude = self.magnitude
        if magnitude is None:
            return None
        bound = bounds_of(self.terms).wide
        if magnitude.whole is not None:
            whole, vector = magnitude.whole, magnitude.vector

            def make(_: object) -> Scale:
                sums = np.zeros((strip[1] - strip[0], 3))
                whole._add_squares(strip, work, sums, by_row=False)  # noqa: SLF001
                values = read_float32(vector, *strip, work).reshape(-1)

                def square(place: int) -> Scaled:
                    column = strip[0] + place
                    found = square_of_column(whole.source, whole.terms, column, work)
                    if not found.number:
                        raise zero_norm(0, f"column {column:,}")
                    return found

                return scale_of(values, sums, bound, square, by_row=False)

            kept: Scale = work.kept(self.terms, "scale", strip, make)
            return kept
        start, stop = rows
        if self.columns <= self._strip_columns() and old.shape[1] == self.columns:
            sums = np.zeros((stop - start, 3))
            wide = Addition(self.terms, self.dtype, wide=True)
            wide.square(self.source.dtype, old, (start, 0), strip, work, sums)
        else:
            sums = work.kept(
                self.terms, "squares", magnitude.start, lambda _: self._all_sums(work)
            )[start:stop]
        first = magnitude.start + start
        values = read_float32(magnitude.vector, first, first + stop - start, work).reshape(-1)

        def square(place: int) -> Scaled:
            found = square_of_row(self.source, self.terms, start + place, work)
            if not found.number:
                raise zero_norm(start + place, "this row")
            return found

        return scale_of(values, sums, bound, square, by_row=True)

    def _all_sums(self, work: Workspace) -> Float64:
        """Sums over rows, which take a pass of their own over all strips."""
        sums = np.zeros((self.rows, 3))
        for strip in self.strips():
            self._add_squares(strip, work, sums, by_row=True)
        return sums

    def _add_squares(
        self, strip: tuple[int, int], work: Workspace, sums: Float64, *, by_row: bool
    ) -> None:
        """Add squares of a strip by row or by column: high part, low part, squared bounds."""
        first, last = strip
        kind = np.dtype(FLOATS[self.source.dtype])
        addition = Addition(self.terms, self.dtype, wide=True)
        for row in range(0, self.rows, TILE_ROWS):
            end = min(row + TILE_ROWS, self.rows)
            raw = work.bytes("squared", (end - row) * (last - first) * kind.itemsize)
            self.source.window(row, end, first, last, raw, work)
            old = raw.view(kind).reshape(end - row, last - first)
            own = sums[row:end] if by_row else sums
            addition.square(self.source.dtype, old, (row, first), strip, work, own, by_row=by_row)
