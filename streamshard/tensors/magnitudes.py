"""DoRA's factors `m / |V|` with a bound of their errors, and exactly where that is asked for."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import field, replace

import numpy as np

from streamshard.tensors.arrays import Float32, Float64
from streamshard.tensors.exact import Scaled, dyadic, root
from streamshard.tensors.open_elements import Scaling
from streamshard.tensors.panels import PANEL
from streamshard.values import frozen

__all__ = ["Scale", "scale_of"]


# What sums of squares have lost: up to 64 of them are added plainly, then without losses.
_SUMMED = 2.0**-47
# A norm that is known less well than this is taken from exact numbers.
_KNOWN = 2.0**-42
# Squares below may have lost what is too small for fp64, and factors beyond are left to exact numbers.
_LEAST = 2.0**-900
_SAFE = (2.0**-300, 2.0**300)
_NARROW = (2.0**-100, 2.0**100)


@frozen
class Scale:
    """Factors of rows of a window, or of the columns of a strip; each is off by `slack` at most.

    `safe` says that all of them are known in fp64, `narrow` that fp32 has them as well. `square` gives
    the exact square of the norm of one of them, remembered in `squares`.
    """

    factors: Float64
    slack: float
    safe: bool
    by_row: bool
    magnitudes: Float32
    square: Callable[[int], Scaled]
    narrow: bool = False
    first: int = 0
    squares: dict[int, Scaled] = field(default_factory=dict)

    def of_rows(self, inner: tuple[slice, slice]) -> Scale:
        """The like for some rows of the window."""
        if not self.by_row:
            return self
        start = inner[0].start
        return replace(self, factors=self.factors[inner[0]], first=self.first + start)

    def told(self, column: int) -> tuple[Float64, bool, float]:
        """What the kernel wants to know; for columns from a panel on that begins at `column`."""
        return self.factors if self.by_row else self.factors[column:], self.by_row, self.slack

    def exactly(self, row: int, column: int) -> Scaling:
        """Of an element: its row in the window, its column in the strip."""
        place = self.first + row if self.by_row else column
        if place not in self.squares:
            self.squares[place] = self.square(place)
        return Scaling(float(self.magnitudes[place]), self.squares[place])


def scale_of(
    magnitudes: Float32,
    sums: Float64,
    bound: float,
    square: Callable[[int], Scaled],
    *,
    by_row: bool,
) -> Scale:
    """Factors from sums of squares (high part, low part, squared bounds of what was squared).

    What was squared is off by `bound` times its bound, so the norm is by that of the bounds at most.
    """
    squares = sums[:, 0] + sums[:, 1]
    norms = np.sqrt(squares)
    with np.errstate(all="ignore"):
        off = 1.001 * bound * np.sqrt(sums[:, 2]) / norms + _SUMMED
        factors = magnitudes.astype(np.float64) / norms
        known = np.isfinite(norms) & (squares > _LEAST) & (off < max(_KNOWN, 16 * bound))
    scale = Scale(factors, 0.0, True, by_row, magnitudes, square)  # noqa: FBT003
    for place in np.flatnonzero(~known).tolist():
        exact = scale.exactly(*((place, 0) if by_row else (0, place)))
        m = dyadic(exact.magnitude)
        size = root(m.times(m), exact.square)[0].nearest() if m.number else 0.0
        factors[place] = math.copysign(size, exact.magnitude)
    sizes = np.abs(factors[magnitudes != 0])
    safe = bool(np.all((sizes > _SAFE[0]) & (sizes < _SAFE[1])))
    slack = float(off[known].max(initial=0.0)) + 2.0**-50
    if not by_row:
        padded = np.zeros(-(-len(factors) // PANEL) * PANEL)
        padded[: len(factors)] = factors
        factors = padded
    narrow = bool(np.all((sizes > _NARROW[0]) & (sizes < _NARROW[1])))
    return replace(scale, factors=factors, slack=slack, safe=safe, narrow=narrow)
