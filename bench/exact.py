"""Compare merged elements with exact integers: tens of millions, of every kind, by every kernel.

    python bench/exact.py --millions 50

An element is right if the exact value lies between the middles to both of its neighbours, or is the
middle and the element is the even one of the two: found out in integers, from the definition
(docs/exactness.md), without any rounding. Prints a line for each kind, and ends with 1 if one element
is wrong.
"""

from __future__ import annotations

import argparse
import math
import os
import sys
import time
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from streamshard.disk.files import Files
from streamshard.tensors.constructors import add_low_rank, cast, with_magnitude
from streamshard.tensors.kernel import VARIABLE, available
from streamshard.tensors.lazy import Array
from streamshard.tensors.low_rank import LowRank
from streamshard.tensors.workspace import Workspace

__all__ = ["main"]

Integers = npt.NDArray[np.object_]
Matrix = npt.NDArray[np.float32]

FLOATS = ("BF16", "F16", "F32")
BITS = 149
ROWS, COLUMNS = 128, 2048
_whole = np.frompyfunc(int, 1, 1)


class Kind(NamedTuple):
    """Dtypes of base, factors and output; ranks; how large updates are; in what way it is hard."""

    base: str
    factors: str
    output: str
    ranks: Sequence[int]
    size: float = 0.1
    how: str = "ordinary"
    dora: str = ""


KINDS = [
    *(Kind(base, "F32", base, (r,)) for base in FLOATS for r in (1, 8, 16)),
    *(Kind(base, "BF16", out, (8,)) for base in FLOATS for out in FLOATS),
    Kind("BF16", "F32", "BF16", (64,)),
    Kind("BF16", "F32", "BF16", (8, 4, 2)),
    Kind("F16", "F16", "F16", (8,), 1e-4),
    *(Kind(base, "F32", base, (4,), 1.0, "few digits") for base in FLOATS),
    *(Kind(base, "F32", base, (3,), 1.0, "cancelling") for base in FLOATS),
    *(Kind(base, "F32", base, (3,), 1.0, "subnormal") for base in FLOATS),
    *(Kind(base, "F32", base, (4,), dora=by) for base in FLOATS for by in ("row", "column")),
]


def main() -> int:
    """Compare; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--millions",
        type=float,
        default=50,
        help="elements in all, at least a block of each kind [50]",
    )
    parser.add_argument("--seed", type=int, default=0)
    asked = parser.parse_args()
    blocks = max(math.ceil(asked.millions * 1e6 / (ROWS * COLUMNS)), len(KINDS))
    print(f"{blocks * ROWS * COLUMNS:,} elements, each by {', '.join(available())}", flush=True)
    wrong = count = 0
    for place, kind in enumerate(KINDS):
        own = blocks // len(KINDS) + (place < blocks % len(KINDS))
        started, bad, again = time.perf_counter(), 0, 0
        for number in range(own):
            found, computed_again = block(kind, [asked.seed, place, number])
            bad, again = bad + found, again + computed_again
        elements = own * ROWS * COLUMNS
        seconds = time.perf_counter() - started
        print(
            f"{kind.base:>4} + {kind.factors:>4} {kind.how:10} r={'+'.join(map(str, kind.ranks)):5} "
            f"{kind.dora:6} -> {kind.output:4}: {elements:>10,} elements, {bad} wrong, "
            f"{again / max(elements, 1):.1e} computed again, {seconds:.0f} s",
            flush=True,
        )
        wrong, count = wrong + bad, count + elements
    print(f"{wrong} of {count:,} elements are wrong")
    return 1 if wrong else 0


def block(kind: Kind, seed: Sequence[int]) -> tuple[int, int]:
    """How many elements of a block are wrong by some kernel, and how many the first computed again."""
    random = np.random.default_rng(seed)
    W, terms = inputs(kind, random)
    m = None
    if kind.dora:
        count = ROWS if kind.dora == "row" else COLUMNS
        m = np.abs(random.standard_normal(count)).astype(np.float32) + np.float32(0.01)
    work = Workspace(Files())
    made = [
        LowRank(stored(A, kind.factors), stored(B, kind.factors), s, 0, ROWS, w)
        for s, w, B, A in terms
    ]
    base = stored(W, kind.base)
    tensor = add_low_rank(base, made)
    if m is not None:
        tensor = with_magnitude(base, made[0], stored(m, "F32"), by_row=kind.dora == "row")
    tensor = cast(tensor, kind.output)
    results, again = [], 0
    for name in available():
        os.environ[VARIABLE] = name
        out = np.empty(tensor.nbytes, np.uint8)
        work.forget()
        tensor.window(0, ROWS, 0, COLUMNS, out, work)
        results.append(out)
        again = again or work.changes.total().rechecked
    different = sum(int((out != results[0]).sum()) for out in results)
    return different + wrong_ones(numbers(results[0], kind.output), kind, W, terms, m), again


def inputs(kind: Kind, random: np.random.Generator) -> tuple[Matrix, list[Any]]:
    """A base and terms (scale, weight, B, A)."""
    W = rounded(random.standard_normal((ROWS, COLUMNS)) * 0.02, kind.base)
    terms: list[Any] = []
    for r in kind.ranks:
        B = random.standard_normal((ROWS, r)) * kind.size
        A = random.standard_normal((r, COLUMNS)) * 0.02
        s, w = float(random.choice([2.0, 1.0, 16 / 3, 2 / 7])), 1.0
        if len(kind.ranks) > 1:
            w = float(random.uniform(-1, 1))
        if kind.how == "few digits":
            B, A = np.round(B * 8) / 512, np.round(A * 256) / 64
            s = 1.0
        if kind.how == "cancelling":
            s = 1.0
        if kind.how == "subnormal":
            B = B * float(random.choice([2.0**-100, 2.0**-126, 2.0**-20]))
        terms.append((s, w, rounded(B, kind.factors), rounded(A, kind.factors)))
    if kind.how == "cancelling":
        W = rounded(-(terms[0][2].astype(np.float64) @ terms[0][3]), kind.base)
    if kind.how == "subnormal":
        least = 2.0**-24 if kind.base == "F16" else 2.0**-133
        W = rounded(random.integers(-200, 200, W.shape) * least, kind.base)
    return W, terms


def wrong_ones(found: Matrix, kind: Kind, W: Matrix, terms: list[Any], m: Matrix | None) -> int:
    """How many elements are not the nearest, by integers."""
    shifts = [fraction(s)[1] + fraction(w)[1] for s, w, _, _ in terms]
    shift = max(shifts)
    update: Integers = np.zeros(W.shape, np.int64).astype(object)
    for (s, w, B, A), own in zip(terms, shifts, strict=True):
        scale = fraction(s)[0] * fraction(w)[0] << (shift - own)
        update = update + scale * np.dot(integers(B, BITS), integers(A, BITS))
    unit = 2 * BITS + shift  # all is in units of 2**-unit
    value = integers(W, unit) + update
    low, high = middles(found, kind.output)
    below, above = integers(low, unit), integers(high, unit)
    if m is not None:
        # Squares with their signs: (m V)^2 against the square of a middle times that of the norm.
        by_row = kind.dora == "row"
        by = integers(m, BITS)
        norms = np.sum(value * value, axis=1 if by_row else 0, keepdims=True)
        scaled = (by[:, None] if by_row else by[None, :]) * value
        # The left side has units of m^2 V^2, the right one of a middle^2 V^2.
        scaled = scaled * abs(scaled) << 2 * (unit - BITS)
        below, above = (middle * abs(middle) * norms for middle in (below, above))
        value, exact = scaled, value
    else:
        exact = value
    even = bits(found, kind.output) & 1 == 0
    inside = (value > below) & (value < above)
    tied = ((value == below) | (value == above)) & even
    negative = np.signbit(found)
    # A 0 has the sign of what was rounded; of nothing it is +, or the base's if nothing is added.
    kept = np.signbit(W) & (W == 0) & (exact == 0) & (update == 0)
    sign = (found != 0) | (negative == ((value < 0) | kept).astype(bool))
    return int(np.count_nonzero(~((inside | tied).astype(bool) & sign)))


def middles(found: Matrix, dtype: str) -> tuple[npt.NDArray[np.float64], npt.NDArray[np.float64]]:
    """The middles to the next smaller and the next larger number; both of them fit into fp64."""
    exact = found.astype(np.float64)
    unsigned = bits(np.abs(found), dtype).astype(np.int64)
    size = np.abs(exact)
    up = from_bits(unsigned + 1, dtype)
    down = np.where(
        unsigned > 0, from_bits(np.maximum(unsigned - 1, 0), dtype), -from_bits(unsigned + 1, dtype)
    )
    low, high = (size + down) / 2, (size + up) / 2
    flip = exact < 0
    return np.where(flip, -high, low), np.where(flip, -low, high)


def from_bits(patterns: npt.NDArray[np.int64], dtype: str) -> npt.NDArray[np.float64]:
    if dtype == "F32":
        return patterns.astype(np.uint32).view(np.float32).astype(np.float64)
    return (
        numbers(patterns.astype(np.uint16).view(np.uint8), dtype)
        .reshape(patterns.shape)
        .astype(np.float64)
    )


def bits(values: Matrix, dtype: str) -> npt.NDArray[Any]:
    """Patterns of numbers that a dtype has."""
    if dtype == "F16":
        return values.astype(np.float16).view(np.uint16)
    raw = np.ascontiguousarray(values, np.float32).view(np.uint32)
    return raw >> np.uint32(16) if dtype == "BF16" else raw


def numbers(raw: npt.NDArray[np.uint8], dtype: str) -> Matrix:
    """Elements as fp32."""
    raw = np.ascontiguousarray(raw).reshape(-1)
    found: Matrix
    if dtype == "BF16":
        found = (raw.view(np.uint16).astype(np.uint32) << np.uint32(16)).view(np.float32)
    else:
        found = raw.view({"F16": np.float16, "F32": np.float32}[dtype]).astype(np.float32)
    return found.reshape(-1, COLUMNS) if found.size == ROWS * COLUMNS else found


def rounded(values: npt.NDArray[Any], dtype: str) -> Matrix:
    """Numbers of a dtype near to some; how they are rounded does not matter."""
    narrow = values.astype(np.float32)
    if dtype == "BF16":
        narrow = (narrow.view(np.uint32) & np.uint32(0xFFFF0000)).view(np.float32)
    return narrow.astype(np.float16).astype(np.float32) if dtype == "F16" else narrow


def stored(values: Matrix, dtype: str) -> Array:
    """As a tensor."""
    patterns = bits(values, dtype).astype(np.uint32 if dtype == "F32" else np.uint16)
    return Array(patterns.reshape(-1).view(np.uint8), values.shape, dtype)


def integers(values: npt.NDArray[Any], unit: int) -> Integers:
    """Numbers in units of `2**-unit`, of which they are whole multiples."""
    step = min(unit, 700)
    found: Any = _whole(np.ldexp(values.astype(np.float64), step))
    larger: Integers = found * (1 << (unit - step))
    return larger


def fraction(value: float) -> tuple[int, int]:
    """Numerator, and the exponent of the denominator, which is a power of 2."""
    above, below = value.as_integer_ratio()
    return above, below.bit_length() - 1


if __name__ == "__main__":
    sys.exit(main())
