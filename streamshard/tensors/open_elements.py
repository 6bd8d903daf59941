"""Elements that no kernel could decide: by exact integers, or an error of those that are not finite."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from itertools import count, repeat

import numpy as np

from streamshard.tensors.exact import Scaled, dyadic, integers, root, rounded, total
from streamshard.tensors.lazy import Lazy, read_float32
from streamshard.tensors.low_rank import LowRank
from streamshard.tensors.not_finite import base_not_finite, too_large
from streamshard.tensors.workspace import Workspace
from streamshard.values import frozen

__all__ = ["Scaling", "element", "square_of_column", "square_of_row"]


# Rows or columns that are read at a time for a norm.
_STEP = 512


@frozen
class Scaling:
    """DoRA's `m / |V|` of an element: `m`, and the square of the norm."""

    magnitude: float
    square: Scaled


def element(
    row: int,
    base: float,
    terms: list[tuple[Scaled, list[int], list[int]]],
    dtype: str,
    scaling: Callable[[], Scaling] | None,
) -> float:
    """The element of a row, rounded once; each term is its scale, a row of B, a column of A.

    Raises `NotFiniteError` if it has no number in `dtype`.
    """
    if not np.isfinite(base):
        raise base_not_finite(row)
    value, adds = total(base, terms)
    more = False
    if scaling is not None and value.number:
        by = scaling()  # which takes all of a row or column
        m = dyadic(by.magnitude)
        if m.number:
            scaled = m.times(value)
            size, more = root(scaled.times(scaled), by.square)
            negative = (m.number < 0) != (value.number < 0)
            value = size._replace(number=-size.number if negative else size.number)
        else:
            value = Scaled(0, 0)
    if not value.number:
        # What is nothing is +0; a -0 that nothing is added to stays.
        return base if base == 0 and not adds else 0.0
    found = rounded(value, dtype, more=more)
    if not np.isfinite(found):
        raise too_large(row, value, dtype)
    return found


def square_of_row(source: Lazy, terms: tuple[LowRank, ...], row: int, work: Workspace) -> Scaled:
    """The sum of the squares of a row of what is added up, exactly."""
    lefts = [
        integers(read_float32(t.B, t.start + row, t.start + row + 1, work)[0].tolist())
        for t in terms
    ]
    found = Scaled(0, 0)
    for first in range(0, source.columns, _STEP):
        span = first, min(first + _STEP, source.columns)
        bases = read_float32(source, row, row + 1, work, span)[0]
        rights = [read_float32(t.A, 0, t.A.rows, work, span).T for t in terms]
        more = _squares(repeat(row), bases, terms, _one_by_one(lefts, rights))
        found = Scaled(found.number + more.number, more.exponent)
    return found


def square_of_column(
    source: Lazy, terms: tuple[LowRank, ...], column: int, work: Workspace
) -> Scaled:
    """The like of a column."""
    span = column, column + 1
    rights = [integers(read_float32(t.A, 0, t.A.rows, work, span)[:, 0].tolist()) for t in terms]
    found = Scaled(0, 0)
    for row in range(0, source.rows, _STEP):
        end = min(row + _STEP, source.rows)
        bases = read_float32(source, row, end, work, span)[:, 0]
        lefts = [read_float32(t.B, t.start + row, t.start + end, work) for t in terms]
        more = _squares(count(row), bases, terms, _one_by_one(rights, lefts))
        found = Scaled(found.number + more.number, more.exponent)
    return found


def _one_by_one(
    same: list[list[int]], others: list[np.ndarray]
) -> Iterator[list[tuple[list[int], list[int]]]]:
    for rows in zip(*others, strict=True):
        yield [(one, integers(row.tolist())) for one, row in zip(same, rows, strict=True)]


def _squares(
    rows: Iterable[int],
    bases: np.ndarray,
    terms: tuple[LowRank, ...],
    factors: Iterator[list[tuple[list[int], list[int]]]],
) -> Scaled:
    scales = [term.exact_scale for term in terms]
    found, exponent = 0, 0
    for row, base, own in zip(rows, bases.tolist(), factors):  # noqa: B905 - rows have no end
        if not np.isfinite(base):
            raise base_not_finite(row)
        value, _ = total(base, [(scale, *pair) for scale, pair in zip(scales, own, strict=True)])
        found += value.number * value.number
        exponent = value.exponent  # that of the scales, and the same for all
    return Scaled(found, 2 * exponent)
