"""Tensors joined from the rows of several."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from dataclasses import replace
from itertools import pairwise

from streamshard.disk.files import ByteRange
from streamshard.tensors.arrays import Bytes
from streamshard.tensors.dtypes import DTYPE_BITS
from streamshard.tensors.lazy import Input, Lazy, Shape, Stored, check_elements, check_rows
from streamshard.tensors.workspace import Workspace
from streamshard.values import frozen

__all__ = ["Concat", "concat"]


@frozen
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

    def divides(self) -> bool:
        return all(part.divides() for part in self.parts)

    def inputs(self) -> Iterator[Input]:
        for part in self.parts:
            yield from part.inputs()


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
