"""Low-rank products as lazy tensors: `B @ A` on a fixed grid of tiles, and views of the factors.

The grid is part of the result: the bits of a product depend on the shapes that BLAS is given, so
the same tiles are computed whatever part of a tensor is asked for.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise

import numpy as np
import numpy.typing as npt

from streamshard.tensors.arrays import Bytes, Elements, Float32
from streamshard.tensors.dtypes import FLOATS
from streamshard.tensors.lazy import (
    READ_NBYTES,
    Input,
    Lazy,
    Shape,
    Window,
    all_counts,
    read_float32,
)
from streamshard.tensors.workspace import Workspace

__all__ = [
    "BLOCK_ELEMENTS",
    "CHUNK_ROWS",
    "HELD_NBYTES",
    "MAX_RANK_FLOAT32",
    "SPAN_COLUMNS",
    "TILE_COLUMNS",
    "TILE_ROWS",
    "Columns",
    "LowRank",
    "Transposed",
    "add_up",
    "cache_blocks",
    "tiles_of",
]


# These must not depend on memory, workers, shards or layout.
TILE_ROWS = 128
TILE_COLUMNS = 1024
BLOCK_ELEMENTS = TILE_ROWS * TILE_COLUMNS
# Rows of B are scaled so many at a time, fewer if they are long. No bit depends on these.
CHUNK_ROWS = 8 * TILE_ROWS
CHUNK_ELEMENTS = 256 * 1024
# Summing more products than this in fp32 costs more than one bf16 element in 10,000 its correct
# rounding (measured with updates of a third of the weights): higher ranks are summed in fp64.
MAX_RANK_FLOAT32 = 64
# Factors of fused experts up to this size are kept in memory.
HELD_NBYTES = 32_000_000
# Columns that are read at a time where rows of a tile are only looked at.
SPAN_COLUMNS = 8 * TILE_COLUMNS


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

    def cut(self, window: Window, nbytes: int) -> Iterator[Window]:
        start, stop, first, last = window
        for row, end, left, right in self.source.cut((first, last, start, stop), nbytes):
            yield left, right, row, end

    def window(
        self, start: int, stop: int, first: int, last: int, out: Bytes, work: Workspace
    ) -> None:
        place = out.view(FLOATS[self.dtype]).reshape(stop - start, last - first)
        for row, end, left, right in self.source.cut((first, last, start, stop), READ_NBYTES):
            part = work.bytes("transposed", (end - row) * (right - left) * place.itemsize)
            self.source.window(row, end, left, right, part, work)
            columns = part.view(place.dtype).reshape(end - row, right - left)
            place[left - start : right - start, row - first : end - first] = columns.T

    def buffer_nbytes(self) -> int:
        return min(READ_NBYTES, self.source.nbytes) + self.source.buffer_nbytes()

    def held(self) -> tuple[Lazy, ...]:
        return self.source.held()

    def inputs(self) -> Iterator[Input]:
        return self.source.inputs()


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

    def window(
        self, start: int, stop: int, first: int, last: int, out: Bytes, work: Workspace
    ) -> None:
        place = out.view(FLOATS[self.dtype]).reshape(stop - start, last - first)
        begin, source = self.first + self.step * first, self.source
        width = self.step * (last - first - 1) + 1
        if self.held():
            whole = work.held.all(source, work).view(place.dtype)
            rows = whole.reshape(source.rows, -1)[start:stop]
            np.copyto(place, rows[:, begin : begin + width : self.step])
            return
        step = max(READ_NBYTES // (width * place.itemsize), 1)
        for row in range(start, stop, step):
            end = min(row + step, stop)
            part = work.bytes("columns", (end - row) * width * place.itemsize)
            source.window(row, end, begin, begin + width, part, work)
            rows = part.view(place.dtype).reshape(end - row, width)
            place[row - start : end - start] = rows[:, :: self.step]

    def buffer_nbytes(self) -> int:
        return 0 if self.held() else max(READ_NBYTES, self.source.row_nbytes)

    def held(self) -> tuple[Lazy, ...]:
        return (self.source,) if self.source.nbytes <= HELD_NBYTES else ()

    def inputs(self) -> Iterator[Input]:
        return self.source.inputs()


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

    def fill(
        self, out: Float32, row: int, column: int, strip: tuple[int, int], work: Workspace
    ) -> None:
        """Put the part of the update that begins at (`row`, `column`) into `out`.

        `column` is a multiple of `TILE_COLUMNS`, and `out` is no wider than that. `strip` are the
        columns, these among them, whose part of `A` is kept for the next call.
        """
        first = column - strip[0]
        right = self._strip(strip, work)[:, first : first + out.shape[1]]
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

    def _strip(self, strip: tuple[int, int], work: Workspace) -> Float32:
        """Some columns of A in fp32."""
        first, last = strip

        def read() -> Float32:
            # In a wider matrix, as if it were all of A: BLAS may treat packed columns differently.
            wider = int(last - first < self.A.columns)
            out = np.empty((self.A.rows, last - first + wider), np.float32)[:, : last - first]
            return read_float32(self.A, 0, self.A.rows, work, strip, out)

        kept: Float32 = work.kept(self.A, "strip", strip, read)
        return kept

    def _scaled_rows(self, tile: int, work: Workspace) -> npt.NDArray[np.floating]:
        """`TILE_ROWS` rows of `scale * B` from row `tile` on, zeros beyond the last one.

        In fp32, or in fp64 for ranks above `MAX_RANK_FLOAT32`.
        """
        B = self.B
        height = self._chunk_rows()
        first = tile - tile % height

        def read() -> npt.NDArray[np.floating]:
            count = min(height, B.rows - first)
            kind = np.float64 if B.columns > MAX_RANK_FLOAT32 else np.float32
            rows = np.zeros((-(-count // TILE_ROWS) * TILE_ROWS, B.columns), kind)
            # The scale is applied in fp64, so that it costs one rounding and not two.
            part = read_float32(B, first, first + count, work)
            # Said so, as numpy 1 takes a number by itself for one of the array's dtype.
            rows[:count] = np.multiply(part, self.scale, dtype=np.float64)
            return rows

        kept: npt.NDArray[np.floating] = work.kept(B, ("scaled", self.scale), first, read)
        return kept[tile - first : tile - first + TILE_ROWS]

    def held(self) -> tuple[Lazy, ...]:
        """What is kept in memory as a whole."""
        return (*self.A.held(), *self.B.held())

    def inputs(self) -> Iterator[Input]:
        """What the factors are read from."""
        yield from all_counts(self.A.inputs())
        yield from all_counts(self.B.inputs())

    def _chunk_rows(self) -> int:
        tiles = CHUNK_ELEMENTS // (self.B.columns * TILE_ROWS)
        return min(max(tiles, 1) * TILE_ROWS, CHUNK_ROWS)

    def buffer_nbytes(self) -> int:
        """Bytes of memory that it takes beside the strip of A."""
        rank, rows = self.A.rows, min(self._chunk_rows(), self.B.rows)
        exact = rank > MAX_RANK_FLOAT32
        # Rows of B as read, in fp64, and as they are kept.
        chunk = rank * rows * (4 + 8 + (8 if exact else 4))
        right = 8 * TILE_COLUMNS * (rank + TILE_ROWS) if exact else 0
        return chunk + right + max(self.A.buffer_nbytes(), self.B.buffer_nbytes())


def add_up(
    terms: Sequence[LowRank],
    out: Float32,
    row: int,
    column: int,
    strip: tuple[int, int],
    work: Workspace,
) -> None:
    """Put the sum of the same part of several updates into `out`; added in their order, in fp32."""
    terms[0].fill(out, row, column, strip, work)
    for term in terms[1:]:
        more = work.float32("more", len(out), out.shape[1])
        term.fill(more, row, column, strip, work)
        np.add(out, more, out=out)


def cache_blocks(
    rows: int, columns: int, first: int, across: int | None
) -> Iterator[tuple[int, int, int, int]]:
    """Row, column, height and width of blocks that fit the processor's cache.

    They are counted from the window, whose first column is `first`. Where there is a grid, over
    `across` columns, none crosses a tile's edge.
    """
    if across is None:
        width = min(columns, BLOCK_ELEMENTS)
        height = BLOCK_ELEMENTS // width
        edges = [*range(0, columns, width), columns]
    else:
        width = min(across, TILE_COLUMNS)
        height = max(BLOCK_ELEMENTS // width // TILE_ROWS, 1) * TILE_ROWS
        edges = [0, *range(TILE_COLUMNS - first % TILE_COLUMNS, columns, TILE_COLUMNS), columns]
    for row in range(0, rows, height):
        for column, end in pairwise(edges):
            yield row, column, min(height, rows - row), end - column


def tiles_of(
    matrix: Lazy, strip: tuple[int, int], work: Workspace
) -> Iterator[tuple[int, int, Elements]]:
    """A strip of a matrix, tile by tile: row, column, elements. Some tiles are read at a time."""
    kind = FLOATS[matrix.dtype]
    for row in range(0, matrix.rows, TILE_ROWS):
        end = min(row + TILE_ROWS, matrix.rows)
        for column in range(*strip, SPAN_COLUMNS):
            last = min(column + SPAN_COLUMNS, strip[1])
            raw = work.bytes("span", (end - row) * (last - column) * np.dtype(kind).itemsize)
            matrix.window(row, end, column, last, raw, work)
            span = raw.view(kind).reshape(end - row, last - column)
            for inner in range(0, last - column, TILE_COLUMNS):
                yield row, column + inner, span[:, inner : inner + TILE_COLUMNS]
