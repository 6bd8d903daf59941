"""Floating-point formats of checkpoints and fp32, both ways, on blocks.

numpy has no bfloat16. Widening it to fp32 is a shift by 16 bits; rounding fp32 to it, to
nearest with ties to even, is an integer addition and a shift. Where the compiled kernel is
installed it does the same to bfloat16 in one pass. Both add up in one order, that of `LANES`, so that
nothing depends on which of them there is.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np

from streamshard.tensors.arrays import Bytes, Elements, Float32, Float64
from streamshard.tensors.dtypes import NOT_FINITE

try:
    from streamshard.tensors import _kernels
except ImportError:  # installed without a compiler
    _kernels = None  # type: ignore[assignment]

__all__ = [
    "Change",
    "Changes",
    "add_and_round",
    "add_row_squares",
    "count_not_finite",
    "narrow",
    "squared_distance_bf16",
    "widen",
]


# How many sums the kernel keeps at a time: element i of a row is added to sum i modulo this, those
# that are left over at the end of a row to the first; in the end the sums are added up in their order.
LANES = 16
# So many blocks are remembered before their sums are condensed.
MAX_TERMS = 4096


class Change(NamedTuple):
    """What updates and casts did: sums in fp64 of squares, and counts of elements.

    `effected` is of what was written less what was there, `intended` of what was to be added
    before rounding. Of `updated` elements `unchanged` have the bits that they had. `cast` is of
    what rounding alone did, where there was no update.
    """

    effected: float = 0.0
    intended: float = 0.0
    updated: int = 0
    unchanged: int = 0
    cast: float = 0.0

    @property
    def squared(self) -> float:
        """The squared distance of what was written from what was there."""
        return self.effected + self.cast

    def plus(self, other: Change) -> Change:
        """Both together."""
        return Change(
            self.effected + other.effected,
            self.intended + other.intended,
            self.updated + other.updated,
            self.unchanged + other.unchanged,
            self.cast + other.cast,
        )


class Changes:
    """The changes of the blocks of a tensor, whose sums do not depend on the order of the blocks.

    They are those of exact numbers, rounded once in the end.
    """

    def __init__(self) -> None:
        self._sums: tuple[list[float], list[float], list[float]] = ([], [], [])
        self._updated = self._unchanged = 0

    def add(self, change: Change) -> None:
        """Take note of what was done to a block."""
        effected, intended, cast = self._sums
        effected.append(change.effected)
        intended.append(change.intended)
        cast.append(change.cast)
        self._updated += change.updated
        self._unchanged += change.unchanged
        if len(cast) > MAX_TERMS:
            for terms in self._sums:
                terms[:] = _condensed(terms)

    def take(self, other: Changes) -> None:
        """Take note of all that another one has."""
        for terms, more in zip(self._sums, other._sums, strict=True):
            terms[:] = _condensed([*terms, *more])
        self._updated += other._updated
        self._unchanged += other._unchanged

    def total(self) -> Change:
        """All together."""
        effected, intended, cast = map(math.fsum, self._sums)
        return Change(effected, intended, self._updated, self._unchanged, cast)


def _condensed(terms: Sequence[float]) -> list[float]:
    """A few numbers of exactly the same sum (Shewchuk 1997, as in `math.fsum`)."""
    partials: list[float] = []
    for term in terms:
        high, kept = term, 0
        for partial in partials:
            large, small = (high, partial) if abs(high) >= abs(partial) else (partial, high)
            high = large + small
            low = small - (high - large)
            if low:
                partials[kept] = low
                kept += 1
        partials[kept:] = [high]
    return partials


def count_not_finite(block: Bytes, dtype: str) -> int:
    """How many numbers in the bytes of `block` are infinite or NaN; 0 for dtypes without these."""
    if dtype not in NOT_FINITE:
        return 0
    unsigned, mask, value = NOT_FINITE[dtype]
    kind = np.dtype(unsigned).type
    return int(np.count_nonzero((block.view(kind) & kind(mask)) == kind(value)))


_BITS_16 = np.uint32(16)
_ONE = np.uint32(1)
_HALF_BELOW = np.uint32(0x7FFF)


def widen(values: Elements, dtype: str, out: Float32) -> None:
    """Elements of `dtype` (an array of `FLOATS[dtype]`) as fp32, exactly, into `out`."""
    if dtype == "BF16":
        bits = out.view(np.uint32)
        np.copyto(bits, values)
        np.left_shift(bits, _BITS_16, out=bits)
    else:
        np.copyto(out, values)


def narrow(values: Float32, dtype: str, out: Elements, rounded: Float32) -> None:
    """Round fp32 to the nearest element of `dtype`, ties to even, into `out`.

    `rounded` (the shape of `values`) gets the same values as fp32. A NaN may become something
    else; infinities do not.
    """
    if dtype == "BF16":
        bits, shifted = values.view(np.uint32), rounded.view(np.uint32)
        np.right_shift(bits, _BITS_16, out=shifted)
        np.bitwise_and(shifted, _ONE, out=shifted)
        np.add(shifted, bits, out=shifted)
        np.add(shifted, _HALF_BELOW, out=shifted)
        np.right_shift(shifted, _BITS_16, out=shifted)
        np.copyto(out, shifted, casting="unsafe")
        np.left_shift(shifted, _BITS_16, out=shifted)
    elif dtype == "F16":
        with np.errstate(over="ignore"):  # the caller sees the infinity
            np.copyto(out, values, casting="unsafe")
        np.copyto(rounded, out)
    else:
        np.copyto(out, values)
        np.copyto(rounded, values)


def add_and_round(
    old: Elements,
    old_dtype: str,
    update: Float32 | None,
    new: Elements,
    dtype: str,
    scratch: Callable[[str, int, int], Float32],
    scale: Float64 | None = None,
) -> Change:
    """Round `(old + update) * scale` to `dtype` into `new`, which may be `old` itself.

    All are matrices of one shape; `scale` is a column of one factor for each row, or a row of one
    for each column. Sums are in fp32, products with `scale` in fp64. `scratch` gives fp32
    matrices by name. The sums are finite only if every element of both is.
    """
    by_row = scale is None or scale.shape == (len(old), 1)
    as_kernel = by_row and old_dtype == dtype == "BF16"
    if _kernels is not None and as_kernel and update is not None and old.size:
        factors = None if scale is None else np.ascontiguousarray(scale[:, 0])
        effected, intended, unchanged = _kernels.add_bf16(old, update, factors, new)
        return Change(effected, intended, old.size, unchanged)
    base = scratch("base", *old.shape)
    total = scratch("total", *old.shape)
    change = scratch("change", *old.shape)
    widen(old, old_dtype, base)
    if update is None:
        np.copyto(total, base)
    else:
        np.add(base, update, out=total)
        if scale is not None:
            np.multiply(total, scale, out=total, casting="same_kind")
    narrow(total, dtype, new, change)
    if update is None:
        return Change(cast=_squares(np.subtract(change, base, out=change)))
    unchanged = int(np.count_nonzero(change.view(np.uint32) == base.view(np.uint32)))
    np.subtract(change, base, out=change)
    if scale is not None:
        update = np.subtract(total, base, out=total)
    squares = _squares_by_lanes if as_kernel else _squares
    return Change(squares(change), squares(update), old.size, unchanged)


def add_row_squares(
    old: Elements,
    old_dtype: str,
    update: Float32,
    sums: Float64,
    scratch: Callable[[str, int, int], Float32],
) -> None:
    """Add the squares of each row of `old + update` (added in fp32) to `sums`, in fp64."""
    if _kernels is not None and old_dtype == "BF16" and old.size:
        _kernels.squares_bf16(old, update, sums)
        return
    total = scratch("total", *old.shape)
    widen(old, old_dtype, total)
    np.add(total, update, out=total)
    exact = total.astype(np.float64)
    if old_dtype == "BF16" and old.size:
        lanes = np.add.reduce(_in_lanes(exact * exact), axis=1)
        sums += np.add.accumulate(lanes, axis=1)[:, -1]
    else:
        sums += np.einsum("ij,ij->i", exact, exact)


def _squares(values: Float32) -> float:
    exact = values.astype(np.float64).reshape(-1)
    return float(np.dot(exact, exact))


def _squares_by_lanes(values: Float32) -> float:
    exact = values.astype(np.float64)
    return _sum_by_lanes(exact * exact)


def _sum_by_lanes(values: Float64) -> float:
    """The sum of a matrix, in the order in which the kernel adds."""
    if not values.size:
        return 0.0
    # Over the first axis of a C-ordered array numpy adds row after row.
    lanes = np.add.reduce(_in_lanes(values).reshape(-1, LANES), axis=0)
    return float(np.add.accumulate(lanes)[-1])


def _in_lanes(values: Float64) -> Float64:
    """Each row of a matrix as rows of `LANES`; what is left over comes one by one, beside zeros."""
    rows, columns = values.shape
    groups, left = divmod(columns, LANES)
    if not left:
        return np.ascontiguousarray(values).reshape(rows, groups, LANES)
    padded = np.zeros((rows, groups + left, LANES))
    padded[:, :groups] = values[:, : groups * LANES].reshape(rows, groups, LANES)
    padded[:, groups:, 0] = values[:, groups * LANES :]
    return padded


def squared_distance_bf16(one: Elements, other: Elements) -> float:
    """Sum in fp64 of the squared differences of two arrays of bfloat16 (as uint16)."""
    if _kernels is not None:
        return _kernels.distance_bf16(one, other)
    left, right = np.empty(one.shape, np.float32), np.empty(other.shape, np.float32)
    widen(one, "BF16", left)
    widen(other, "BF16", right)
    with np.errstate(invalid="ignore"):
        change = (left.astype(np.float64) - right).reshape(1, -1)
        return _sum_by_lanes(change * change)
