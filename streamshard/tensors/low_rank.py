"""Low-rank updates: `B @ A` times a scale, and views of factors that are stored otherwise."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import numpy as np

from streamshard.tensors.arrays import Bytes
from streamshard.tensors.dtypes import FLOATS
from streamshard.tensors.exact import Scaled, dyadic
from streamshard.tensors.lazy import (
    READ_NBYTES,
    Input,
    Lazy,
    Shape,
    Window,
    all_counts,
)
from streamshard.tensors.workspace import Workspace
from streamshard.values import frozen

__all__ = ["HELD_NBYTES", "Columns", "LowRank", "Transposed"]


# Factors of fused experts up to this size are kept in memory.
HELD_NBYTES = 32_000_000


@frozen
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


@frozen
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


@frozen
class LowRank:
    """The update `weight * scale * B @ A`, of which rows `[start, stop)` are meant.

    `A` is (r, columns), `B` is (rows, r).
    """

    A: Lazy
    B: Lazy
    scale: float
    start: int
    stop: int
    weight: float = 1.0

    def take(self, start: int, stop: int) -> LowRank:
        """The same update for rows `[start, stop)` of this window."""
        if (start, stop) == (0, self.stop - self.start):
            return self
        return replace(self, start=self.start + start, stop=self.start + stop)

    @property
    def exact_scale(self) -> Scaled:
        """The product of both, exactly."""
        return dyadic(self.scale).times(dyadic(self.weight))

    def held(self) -> tuple[Lazy, ...]:
        """What is kept in memory as a whole."""
        return (*self.A.held(), *self.B.held())

    def inputs(self) -> Iterator[Input]:
        """What the factors are read from."""
        yield from all_counts(self.A.inputs())
        yield from all_counts(self.B.inputs())
