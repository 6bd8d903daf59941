"""Factors as the inner loops want them: A in panels of columns, rows of B times the scale, norms.

Norms are rounded up, and are 0 only where all is: bounds of errors are made of them.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Sequence
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from streamshard.tensors import kernel
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


class Bounds(NamedTuple):
    """What the kernel is told of the terms: where their ranks end, scales, bounds of errors."""

    ends: npt.NDArray[np.int64]
    scales: Float64
    exact: tuple[Scaled, ...]
    safe: bool
    narrow: float
    tiny: float
    wide: float


class Panels(NamedTuple):
    """A strip of the A of all terms, (panels, ranks, `PANEL`) with zeros at its end; column norms.

    Beside it what is known of the terms, whatever the strip.
    """

    values: Float32
    norms: Float32
    bounds: Bounds


class Rows(NamedTuple):
    """Rows of the B of all terms, side by side, from row `first` of the node on.

    `scaled` are times the scale, in fp32 or fp64; it has `_PADDED` rows more. `norms` are of these.
    """

    first: int
    left: Float32
    scaled: npt.NDArray[Any]
    norms: Float32


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

    def make(spent: Panels | None) -> Panels:
        first, last = strip
        count, rank = -(-(last - first) // PANEL), sum(term.A.rows for term in terms)
        values = _room((count, rank, PANEL), np.float32, spent and spent.values)
        values[(last - first) // PANEL :] = 0  # the last one may have columns of zeros
        squares = np.zeros(count * PANEL)
        at = 0
        for term in terms:
            for row, end, left, right in term.A.cut((0, term.A.rows, first, last), READ_NBYTES):
                room = work.float32("factor", end - row, right - left)
                part = read_float32(term.A, row, end, work, (left, right), out=room)
                kernel.pack_rows(part, left - first, values, at + row, squares)
            at += term.A.rows
        return Panels(values, _up(np.sqrt(squares)), bounds_of(terms))

    kept: Panels = work.kept(terms, "panels", strip, make)
    return kept


def rows_of(terms: Sequence[LowRank], row: int, work: Workspace, *, wide: bool) -> Rows:
    """Some rows of B, that one among them, kept until others are asked for."""
    height = _chunk_rows(terms)
    first = row - row % height

    def make(spent: Rows | None) -> Rows:
        count = min(height, terms[0].stop - terms[0].start - first)
        rank, kind = sum(term.A.rows for term in terms), np.float64 if wide else np.float32
        left = _room((count, rank), np.float32, spent and spent.left)
        scaled = _room((count + _PADDED, rank), kind, spent and spent.scaled)
        scaled[count:] = 0
        norms = np.zeros(count)
        at = 0
        for term, scale in zip(terms, bounds_of(terms).scales[:, 0].tolist(), strict=True):
            own = np.s_[:, at : at + term.A.rows]
            begin = term.start + first
            part = read_float32(term.B, begin, begin + count, work, out=left[own])
            # What does not fit becomes infinite, and is computed again.
            least = _SMALLEST if term.exact_scale.number else 0.0
            tiny = 0.0 if wide else 2.0**-126 * math.sqrt(2 * rank)
            kernel.scale_rows(part, scale, scaled[:count][own], norms, least, tiny)
            at += term.A.rows
        return Rows(first, left, scaled, _up(norms))

    kept: Rows = work.kept(terms, ("rows", wide), first, make)
    return kept


def _room(shape: tuple[int, ...], kind: type, spent: npt.NDArray[Any] | None) -> npt.NDArray[Any]:
    """An array with some content, in the memory of one that is not needed any more if it fits."""
    count = math.prod(shape)
    flat = None if spent is None else spent.base
    if flat is None or flat.size < count:
        flat = np.empty(count, kind)
    return flat[:count].reshape(shape)


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
