"""What a merged element is, from the definition: real numbers as integers, rounded once by hand.

Nothing here uses the package, or rounds before the end. `docs/exactness.md` is what it is written from.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from fractions import Fraction
from typing import Any, NamedTuple

import numpy as np

FORMATS = {"BF16": (8, -126, 127), "F16": (11, -14, 15), "F32": (24, -126, 127)}
UNIT = 2**149  # every fp32 number is a whole number of 2**-149


class Term(NamedTuple):
    """`weight * scale * B @ A`; factors as fp32 numbers."""

    scale: float
    B: np.ndarray
    A: np.ndarray
    weight: float = 1.0


def nearest(value: Fraction, dtype: str) -> float:
    """The nearest number of a format, ties to even; infinite beyond the largest."""
    digits, least, most = FORMATS[dtype]
    size = abs(value)
    if not size:
        return 0.0
    exponent = size.numerator.bit_length() - size.denominator.bit_length()
    if Fraction(2) ** exponent > size:
        exponent -= 1
    step = Fraction(2) ** (max(exponent, least) - digits + 1)
    found = round(size / step) * step  # to the even one of two that are as near
    if found >= Fraction(2) ** (most + 1):
        return -math.inf if value < 0 else math.inf
    return -float(found) if value < 0 else float(found)


def root_to_nearest(square: Fraction, dtype: str) -> float:
    """The like of the root of a fraction."""
    digits, least, _ = FORMATS[dtype]
    number, divisor = square.numerator, square.denominator
    exponent = (number.bit_length() - divisor.bit_length()) // 2 + 1
    while Fraction(4) ** exponent > square:
        exponent -= 1
    half = Fraction(2) ** (max(exponent, least) - digits)  # half a step
    scaled = square / (half * half)
    count = math.isqrt(scaled.numerator // scaled.denominator)  # halves, rounded down
    steps, odd = divmod(count, 2)
    if odd and (Fraction(count * count) != scaled or steps % 2):
        steps += 1
    return nearest(steps * 2 * half, dtype)


def whole(values: np.ndarray) -> np.ndarray:
    """fp32 numbers in units of 2**-149."""
    flat = [int(Fraction(v) * UNIT) for v in values.astype(np.float64).ravel().tolist()]
    out = np.empty(len(flat), object)
    out[:] = flat
    return out.reshape(values.shape)


def sums(W: np.ndarray, terms: Sequence[Term]) -> tuple[np.ndarray, np.ndarray, Fraction]:
    """The exact values and updates of a matrix, as whole numbers of a unit."""
    scales = [Fraction(t.weight) * Fraction(t.scale) for t in terms]
    below = math.lcm(*(s.denominator for s in scales), 1)
    unit = Fraction(1, below * UNIT * UNIT)
    update = np.zeros(W.shape, object)
    for term, scale in zip(terms, scales, strict=True):
        update = update + int(scale * below) * (whole(term.B) @ whole(term.A))
    return whole(W) * (below * UNIT) + update, update, unit


def merged(
    W: np.ndarray,
    terms: Sequence[Term],
    dtype: str,
    magnitude: np.ndarray | None = None,
    *,
    by_row: bool = True,
) -> np.ndarray:
    """The merged matrix as fp32 (infinite where it does not fit), DoRA's with a magnitude."""
    values, updates, unit = sums(W, terms)
    norms: Any = None
    if magnitude is not None:
        norms = (values * values).sum(axis=1 if by_row else 0)
    out = np.empty(W.shape, np.float32)
    negative = np.signbit(W) & (W == 0)
    for place, value in np.ndenumerate(values):
        if magnitude is None:
            found = nearest(value * unit, dtype)
        else:
            at = place[0] if by_row else place[1]
            m = Fraction(float(magnitude[at]))
            found = 0.0
            if m and value:
                size = root_to_nearest(m * m * value * value / norms[at], dtype)
                found = -size if (m < 0) != (value < 0) else size
        if found == 0 and not value:
            found = -0.0 if negative[place] and not updates[place] else 0.0
        elif found == 0 and magnitude is not None and not m:
            found = 0.0
        out[place] = found
    return out


def bits(values: np.ndarray, dtype: str) -> np.ndarray:
    """fp32 numbers that a format has, as its elements."""
    if dtype == "BF16":
        return (np.ascontiguousarray(values).view(np.uint32) >> 16).astype(np.uint16)
    with np.errstate(over="ignore"):
        return values.astype({"F16": np.float16, "F32": np.float32}[dtype])


def bits64(values: np.ndarray, dtype: str) -> np.ndarray:
    """fp64 numbers, rounded by numpy."""
    return values.astype({"F16": np.float16, "F32": np.float32}[dtype])


def numbers(elements: np.ndarray, dtype: str) -> np.ndarray:
    """Elements as fp32."""
    if dtype == "BF16":
        return (elements.astype(np.uint32) << 16).view(np.float32)
    return elements.astype(np.float32)
