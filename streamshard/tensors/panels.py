"""Factors as the inner loops want them: A in panels of columns, rows of B times the scale, norms.

Norms are rounded up, and are 0 only where all is: bounds of errors are made of them.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from streamshard.tensors.arrays import Float32, Float64
from streamshard.tensors.exact import Scaled, dyadic
from streamshard.tensors.lazy import READ_NBYTES, Lazy, read_float32
from streamshard.tensors.low_rank import LowRank
from streamshard.tensors.workspace import Workspace

__all__ = ["PANEL", "Bounds", "Panels", "Rows", "bounds_of", "panels_of", "rows_nbytes", "rows_of"]


PANEL = 64
"""Columns of A that lie together, and of a run that is rounded at a time (`_kernels.c`)."""
_PADDED = 5  # the kernel multiplies 6 rows at a time
_CHUNK = 32  # ranks that it sums by themselves
# Rows of B are taken so many at a time, fewer if they are long.
CHUNK_ROWS = 1024
CHUNK_ELEMENTS = 256 * 1024
# Within this the errors of products in fp64 are known exactly.
_SAFE = (2.0**-200, 2.0**200)
_SMALLEST = 2.0**-149
# The bound in fp32 is proven as long as the square of this is below 2**24; beyond, nothing is.
_MOST_NARROW = 4096


class Panels(NamedTuple):
    """A strip of the A of all terms, (panels, ranks, `PANEL`) with zeros at its end; column norms."""

    values: Float32
    norms: Float32


class Rows(NamedTuple):
    """Rows of the B of all terms, side by side, from row `first` of the node on.

    `scaled` are times the scale, in fp32 or fp64; it has `_PADDED` rows more. `norms` are of these.
    """

    first: int
    left: Float32
    scaled: npt.NDArray[Any]
    norms: Float32


class Bounds(NamedTuple):
    """What the kernel is told of the terms: where their ranks end, scales, bounds of errors."""

    ends: npt.NDArray[np.int64]
    scales: Float64
    exact: tuple[Scaled, ...]
    safe: bool
    narrow: float
    tiny: float
    wide: float


def bounds_of(terms: Sequence[LowRank]) -> Bounds:
    """The bounds that `_kernels.c` derives; scales in two parts, whose sum is exact if it is safe."""
    ranks = [term.A.rows for term in terms]
    rank = sum(ranks)
    exact = tuple(term.exact_scale for term in terms)
    scales = np.zeros((len(terms), 2))
    for place, scale in enumerate(exact):
        high = scale.nearest()
        low = scale.minus(dyadic(high)).nearest() if math.isfinite(high) else 0.0
        scales[place] = high, low
    sizes = np.abs(scales[:, 0])
    safe = bool(np.all((sizes == 0) | ((sizes > _SAFE[0]) & (sizes < _SAFE[1])))) and all(
        high or not scale.number for high, scale in zip(sizes, exact, strict=True)
    )
    narrow = min(rank, _CHUNK) + -(-rank // _CHUNK) + 3
    return Bounds(
        np.cumsum(ranks, dtype=np.int64),
        scales,
        exact,
        safe,
        narrow * 2.0**-24 if narrow < _MOST_NARROW else math.inf,
        (rank + 8) * 2.0**-149,
        (rank + len(terms) + 6) * 2.0**-53,
    )


def panels_of(terms: Sequence[LowRank], strip: tuple[int, int], work: Workspace) -> Panels:
    """Columns of A, kept until others are asked for."""

    def make() -> Panels:
        first, last = strip
        count = -(-(last - first) // PANEL)
        values = np.zeros((count, sum(term.A.rows for term in terms), PANEL), np.float32)
        squares = np.zeros(count * PANEL)
        at = 0
        for term in terms:
            for row, end, left, right in term.A.cut((0, term.A.rows, first, last), READ_NBYTES):
                part = read_float32(term.A, row, end, work, (left, right))
                squares[left - first : right - first] += np.square(part, dtype=np.float64).sum(0)
                for panel, inner, outer in _in_panels(left - first, right - first):
                    whole = part[:, outer].reshape(end - row, -1, inner.stop - inner.start)
                    values[panel, at + row : at + end, inner] = whole.swapaxes(0, 1)
            at += term.A.rows
        return Panels(values, _up(np.sqrt(squares)))

    kept: Panels = work.kept(terms, "panels", strip, make)
    return kept


def _in_panels(first: int, last: int) -> Iterator[tuple[slice, slice, slice]]:
    """Columns by panels: which these are, columns within each of them, columns from `first` on."""
    at = first
    while at < last:
        panel, inner = divmod(at, PANEL)
        if inner or last - at < PANEL:
            end = min(last, (panel + 1) * PANEL)
            count = 1
        else:
            end = last - last % PANEL
            count = (end - at) // PANEL
        width = (end - at) // count
        yield (
            slice(panel, panel + count),
            slice(inner, inner + width),
            slice(at - first, end - first),
        )
        at = end


def rows_of(terms: Sequence[LowRank], row: int, work: Workspace, *, wide: bool) -> Rows:
    """Some rows of B, that one among them, kept until others are asked for."""
    height = _chunk_rows(terms)
    first = row - row % height

    def make() -> Rows:
        count = min(height, terms[0].stop - terms[0].start - first)
        rank = sum(term.A.rows for term in terms)
        left = np.empty((count, rank), np.float32)
        scaled = np.zeros((count + _PADDED, rank), np.float64 if wide else np.float32)
        norms = np.zeros(count)
        at = 0
        scales = bounds_of(terms).scales[:, 0]
        # What does not fit becomes infinite, and is computed again.
        with np.errstate(over="ignore", invalid="ignore", under="ignore"):
            for term, scale in zip(terms, scales, strict=True):
                own = np.s_[:, at : at + term.A.rows]
                begin = term.start + first
                part = read_float32(term.B, begin, begin + count, work, out=left[own])
                exact = np.multiply(part, scale, dtype=np.float64)
                scaled[:count][own] = exact
                size = np.sqrt(np.square(part, dtype=np.float64).sum(1)) * abs(scale)
                if term.exact_scale.number:
                    size = np.where(part.any(1), np.maximum(size, _SMALLEST), 0)
                if not wide:
                    tiny = (np.abs(exact) < 2.0**-126) & (part != 0)
                    size += np.where(tiny.any(1), 2.0**-126 * math.sqrt(2 * rank), 0)
                norms = np.hypot(norms, size)
                at += term.A.rows
            return Rows(first, left, scaled, _up(norms))

    kept: Rows = work.kept(terms, ("rows", wide), first, make)
    return kept


def _up(norms: Float64) -> Float32:
    """As fp32, rounded up by more than what the sums of squares have lost."""
    with np.errstate(over="ignore", invalid="ignore", under="ignore"):
        higher = np.nextafter((norms * (1 + 2.0**-20)).astype(np.float32), np.float32(np.inf))
    found: Float32 = np.where(norms == 0, np.float32(0), higher)
    return found


def _chunk_rows(terms: Sequence[LowRank]) -> int:
    rank = max(sum(term.A.rows for term in terms), 1)
    return min(max(CHUNK_ELEMENTS // rank // 128, 1) * 128, CHUNK_ROWS)


def rows_nbytes(terms: Sequence[LowRank], rows: int, kinds: Collection[bool]) -> int:
    """Bytes of memory that rows of B take, wide or not or both, with what is read for them."""
    rank = sum(term.A.rows for term in terms)
    largest = max(term.A.rows for term in terms)
    kept = rank * sum(12 if wide else 8 for wide in kinds)
    read = largest * (8 + 8)
    reading = max(max(_of(term.A), _of(term.B)) for term in terms)
    return min(_chunk_rows(terms), rows) * (kept + read) + reading


def _of(factor: Lazy) -> int:
    return READ_NBYTES + factor.buffer_nbytes()
