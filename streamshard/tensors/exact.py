"""Exact numbers: what a merged element is, told by integers, and how it is rounded once.

Floats are whole multiples of a power of two, so sums and products of them are integers with an
exponent, of any size. This is what kernels hand over what they cannot decide to (`kernel.py`), and the
definition of all that they do: `docs/exactness.md`.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from itertools import starmap
from operator import mul
from typing import NamedTuple

__all__ = ["FORMATS", "Format", "Scaled", "dyadic", "integers", "root", "rounded", "total"]


class Format(NamedTuple):
    """Significant digits in base 2, the exponent of the smallest normal number, the largest number."""

    digits: int
    least: int
    most: float


FORMATS = {
    "BF16": Format(8, -126, math.ldexp(255, 120)),
    "F16": Format(11, -14, 65504.0),
    "F32": Format(24, -126, math.ldexp(2**24 - 1, 104)),
}
# Elements of all formats are multiples of 2**-149.
UNIT = 149


class Scaled(NamedTuple):
    """`number * 2**exponent`.

    >>> dyadic(0.75).times(dyadic(-2.0)).nearest(), dyadic(0.1).minus(dyadic(0.1)).number
    (-1.5, 0)
    """

    number: int
    exponent: int

    def times(self, other: Scaled) -> Scaled:
        """The product."""
        return Scaled(self.number * other.number, self.exponent + other.exponent)

    def minus(self, other: Scaled) -> Scaled:
        """The difference."""
        least = min(self.exponent, other.exponent)
        mine, theirs = (one.number << (one.exponent - least) for one in (self, other))
        return Scaled(mine - theirs, least)

    def nearest(self) -> float:
        """As fp64, infinite if that is too large."""
        try:
            if self.exponent < 0:
                return self.number / (1 << -self.exponent)
            return float(self.number << self.exponent)
        except OverflowError:
            return -math.inf if self.number < 0 else math.inf


def dyadic(value: float) -> Scaled:
    """A finite float, exactly."""
    number, below = value.as_integer_ratio()
    return Scaled(number, 1 - below.bit_length())


def integers(values: Iterable[float]) -> list[int]:
    """fp32 numbers as multiples of `2**-UNIT`."""
    return [int(math.ldexp(value, UNIT)) for value in values]


def total(
    base: float, terms: Iterable[tuple[Scaled, Sequence[int], Sequence[int]]]
) -> tuple[Scaled, bool]:
    """`base + sum of scale * (left . right)`, and whether anything is added to the base.

    Each term is its scale, a row of B and a column of A as `integers` tells them.

    >>> total(1.0, [(Scaled(3, -1), integers([0.5]), integers([2.0]))])[0].nearest()
    2.5
    """
    added = [
        Scaled(scale.number * sum(starmap(mul, zip(left, right, strict=True))), scale.exponent)
        for scale, left, right in terms
    ]
    least = min((one.exponent for one in added), default=0)
    least = min(least, 0)
    update = sum(one.number << (one.exponent - least) for one in added)
    exponent = least - 2 * UNIT
    whole = int(math.ldexp(base, UNIT)) << (UNIT - least)
    return Scaled(whole + update, exponent), update != 0


def rounded(value: Scaled, dtype: str, *, more: bool = False) -> float:
    """`value` as the nearest number of `dtype`, ties to even; infinite if it is too large.

    `more` says that the true size is larger by less than one of `number`, which must then have more
    digits than the format.

    >>> rounded(Scaled(0x101, -8), "BF16"), rounded(Scaled(0x101, -8), "BF16", more=True)
    (1.0, 1.0078125)
    """
    size = abs(value.number)
    digits, least, most = FORMATS[dtype]
    last = max(size.bit_length() - 1 + value.exponent, least) - digits + 1
    drop = last - value.exponent
    if drop > 0:
        part = size & ((1 << drop) - 1)
        size >>= drop
        half = 1 << (drop - 1)
        size += part > half or (part == half and (more or size & 1 == 1))
    else:
        size <<= -drop
    found = math.ldexp(size, last) if size.bit_length() + last < 1000 else math.inf
    found = found if found <= most else math.inf
    return -found if value.number < 0 else found


def root(above: Scaled, below: Scaled) -> tuple[Scaled, bool]:
    """The root of a quotient to at least 60 digits, rounded down, and whether it is more than that.

    >>> root(dyadic(1.0), dyadic(4.0))[0].nearest(), root(dyadic(2.0), dyadic(1.0))[1]
    (0.5, True)
    """
    number, divisor, exponent = above.number, below.number, above.exponent - below.exponent
    if exponent % 2:
        number, exponent = 2 * number, exponent - 1
    shift = 64 - (number.bit_length() - divisor.bit_length()) // 2
    if shift >= 0:
        number <<= 2 * shift
    else:
        divisor <<= -2 * shift
    found = math.isqrt(number // divisor)
    return Scaled(found, exponent // 2 - shift), found * found * divisor != number
