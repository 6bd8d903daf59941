"""Floating-point formats of checkpoints and fp32, both ways, on blocks.

numpy has no bfloat16. Widening it to fp32 is a shift by 16 bits; rounding fp32 to it, to
nearest with ties to even, is an integer addition and a shift.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from streamshard.tensors.arrays import Bytes, Elements, Float32
from streamshard.tensors.dtypes import FLOATS, NOT_FINITE

__all__ = [
    "Change",
    "Changes",
    "count_not_finite",
    "has_not_finite",
    "narrow",
    "narrowed",
    "round_block",
    "widen",
]


# So many blocks are remembered before their sums are condensed.
MAX_TERMS = 4096


class Change(NamedTuple):
    """What updates and casts did: sums in fp64 of squares, and counts of elements.

    `effected` is of what was written less what was there, `intended` of what was to be added
    before rounding. Of `updated` elements `unchanged` have the value that they had. `cast` is of
    what rounding alone did, where there was no update. `rechecked` elements were near a boundary
    between two roundings, and computed again.
    """

    effected: float = 0.0
    intended: float = 0.0
    updated: int = 0
    unchanged: int = 0
    cast: float = 0.0
    rechecked: int = 0

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
            self.rechecked + other.rechecked,
        )


class Changes:
    """The changes of the blocks of a tensor, whose sums do not depend on the order of the blocks.

    They are those of exact numbers, rounded once in the end.
    """

    def __init__(self) -> None:
        self._sums: tuple[list[float], list[float], list[float]] = ([], [], [])
        self._updated = self._unchanged = self._rechecked = 0

    def add(self, change: Change) -> None:
        """Take note of what was done to a block."""
        effected, intended, cast = self._sums
        effected.append(change.effected)
        intended.append(change.intended)
        cast.append(change.cast)
        self._updated += change.updated
        self._unchanged += change.unchanged
        self._rechecked += change.rechecked
        if len(cast) > MAX_TERMS:
            for terms in self._sums:
                terms[:] = _condensed(terms)

    def take(self, other: Changes) -> None:
        """Take note of all that another one has."""
        for terms, more in zip(self._sums, other._sums, strict=True):
            terms[:] = _condensed([*terms, *more])
        self._updated += other._updated
        self._unchanged += other._unchanged
        self._rechecked += other._rechecked

    def total(self) -> Change:
        """All together."""
        effected, intended, cast = map(math.fsum, self._sums)
        return Change(effected, intended, self._updated, self._unchanged, cast, self._rechecked)


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


def has_not_finite(block: Bytes, dtype: str) -> bool:
    """Whether a number in the bytes of `block` is infinite or NaN, several times as fast.

    Of most formats these are the numbers of the largest exponent: the largest ones of either sign, if
    the bits are read as whole numbers.
    """
    if dtype not in NOT_FINITE:
        return False
    unsigned, mask, value = NOT_FINITE[dtype]
    kind = np.dtype(unsigned)
    sign = 1 << (8 * kind.itemsize - 1)
    if mask != value or mask & sign:
        return count_not_finite(block, dtype) > 0
    bits = block.view(kind)
    signed = block.view(kind.name.removeprefix("u"))
    return bool(bits.size) and (int(signed.max()) >= mask or int(bits.max()) >= sign | mask)


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


def narrowed(values: Float32, dtype: str) -> Elements:
    """Values that `dtype` has just so, as its elements."""
    out = np.empty(values.shape, FLOATS[dtype])
    narrow(values, dtype, out, np.empty_like(values))
    return out


def round_block(
    old: Elements, old_dtype: str, new: Elements, dtype: str, base: Float32, rounded: Float32
) -> float:
    """Round a matrix to `dtype` into `new`; returns the sum in fp64 of the squares of the changes.

    It is finite only if every element of both is. `base` and `rounded` are matrices of the same
    shape to work in.
    """
    widen(old, old_dtype, base)
    narrow(base, dtype, new, rounded)
    change = np.subtract(rounded, base, out=rounded).astype(np.float64)
    return float(np.sum(np.square(change, out=change)))
