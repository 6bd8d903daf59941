"""An update added to windows of a matrix and rounded once: by kernels, or exactly where they cannot."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from functools import partial

import numpy as np
import numpy.typing as npt

from streamshard.tensors import kernel
from streamshard.tensors.arrays import Elements, Float64
from streamshard.tensors.exact import Scaled, integers
from streamshard.tensors.kernel import Found, Job
from streamshard.tensors.low_rank import LowRank
from streamshard.tensors.magnitudes import Scale
from streamshard.tensors.open_elements import element
from streamshard.tensors.panels import PANEL, Panels, Rows, panels_of, rows_of
from streamshard.tensors.rounding import Change, narrowed, widen
from streamshard.tensors.workspace import Workspace
from streamshard.values import frozen

__all__ = ["Addition"]


@frozen
class Addition:
    """The sum of terms, to be added to matrices and rounded once to `dtype`.

    `wide` says that sums are in fp64 from the beginning.
    """

    terms: tuple[LowRank, ...]
    dtype: str
    wide: bool

    def merge(
        self,
        old_dtype: str,
        old: Elements,
        new: Elements,
        at: tuple[int, int],
        strip: tuple[int, int],
        work: Workspace,
        scale: Scale | None,
    ) -> None:
        """Compute a window that begins at a row and column, all of it in one strip.

        `new` may be `old` itself.
        """
        for part in self._parts(len(old), at, strip, work):
            base, place = old[part.inner], new[part.inner]
            own = None if scale is None else scale.of_rows(part.inner)
            found = self._run(part, old_dtype, base, place, own, None)
            effected, unchanged = found.effected, found.unchanged
            if found.open:
                more, same = self._settle(part, old_dtype, base, place, found.open, own)
                effected, unchanged = effected + more, unchanged + same
            if not math.isfinite(effected):
                raise ArithmeticError("a number that is not finite was not noticed")
            work.changes.add(
                Change(effected, found.intended, place.size, unchanged, 0.0, found.rechecked)
            )

    def square(
        self,
        dtype: str,
        old: Elements,
        at: tuple[int, int],
        strip: tuple[int, int],
        work: Workspace,
        sums: Float64,
        *,
        by_row: bool = True,
    ) -> None:
        """Add the squares of what is added up, for all columns of a strip, to those of its rows.

        Or (`by_row` False) to those of its columns. `sums` has a high and a low part, and squares of
        the bounds of what was squared.
        """
        for part in self._parts(len(old), at, strip, work):
            own = sums[part.inner[0]] if by_row else sums
            self._run(part, dtype, old[part.inner], None, None, own, by_row=by_row)

    def _parts(
        self, height: int, at: tuple[int, int], strip: tuple[int, int], work: Workspace
    ) -> Iterator[_Part]:
        """A window by the rows of B that are at hand at a time."""
        row, end = at[0], at[0] + height
        panels = panels_of(self.terms, strip, work)
        while row < end:
            rows = rows_of(self.terms, row, work, wide=self.wide)
            stop = min(end, rows.first + len(rows.left))
            yield _Part(row, stop, at[0], at[1] - strip[0], panels, rows)
            row = stop

    def _run(
        self,
        part: _Part,
        old_dtype: str,
        old: Elements,
        new: Elements | None,
        scale: Scale | None,
        sums: Float64 | None,
        *,
        by_row: bool = True,
    ) -> Found:
        """Hand a part over to the kernel, to be rounded or (with `sums`) squared."""
        bounds, rows, low = part.panels.bounds, part.rows, part.row - part.rows.first
        panel, first = divmod(part.column, PANEL)
        factor, slack = None, 0.0
        if scale is not None:
            factor, by_row, slack = scale.told(panel * PANEL)
        return kernel.merge(
            Job(
                rows=part.stop - part.row,
                columns=old.shape[1],
                first=first,
                old=old,
                old_dtype=old_dtype,
                out=new,
                dtype=self.dtype,
                wide=self.wide,
                rank=rows.left.shape[1],
                panels=part.panels.values[panel:],
                norms=part.panels.norms[panel * PANEL :],
                left=rows.left[low:],
                scaled=rows.scaled[low:],
                row_norms=rows.norms[low:],
                ends=bounds.ends,
                scales=bounds.scales,
                safe=bounds.safe and (scale is None or scale.safe),
                bound=bounds.narrow,
                tiny=bounds.tiny,
                bound_wide=bounds.wide,
                factor=factor,
                by_row=by_row,
                slack=slack,
                sums=sums,
            )
        )

    def _settle(
        self,
        part: _Part,
        old_dtype: str,
        old: Elements,
        new: Elements,
        left: bytes,
        scale: Scale | None,
    ) -> tuple[float, int]:
        """Decide what the kernel could not; returns the squared changes, and how many are none."""
        places: npt.NDArray[np.uint32] = np.frombuffer(left, np.uint32).reshape(-1, 2)
        places = places[np.lexsort((places[:, 1], places[:, 0]))]
        bases = np.empty((1, len(places)), np.float32)
        widen(old[places[:, 0], places[:, 1]].reshape(1, -1), old_dtype, bases)
        scales = part.panels.bounds.exact
        found = np.empty_like(bases)
        for number, (row, column) in enumerate(places.tolist()):
            terms = part.factors(self.terms, scales, row, column)
            at = part.row + row, part.column + column
            scaling = None if scale is None else partial(scale.exactly, row, at[1])
            found[0, number] = element(at[0], float(bases[0, number]), terms, self.dtype, scaling)
        new[places[:, 0], places[:, 1]] = narrowed(found, self.dtype)[0]
        change = found.astype(np.float64) - bases
        same = int(np.count_nonzero(found.view(np.uint32) == bases.view(np.uint32)))
        return float(np.sum(change * change)), same


@frozen
class _Part:
    """Rows `[row, stop)` of a window that begins at row `first` and at `column` of the strip."""

    row: int
    stop: int
    first: int
    column: int
    panels: Panels
    rows: Rows

    @property
    def inner(self) -> tuple[slice, slice]:
        """Where it is in the window."""
        return np.s_[self.row - self.first : self.stop - self.first, :]

    def factors(
        self, terms: Sequence[LowRank], scales: Sequence[Scaled], row: int, column: int
    ) -> list[tuple[Scaled, list[int], list[int]]]:
        """What is multiplied for an element of this part."""
        panel, inner = divmod(self.column + column, PANEL)
        left = integers(self.rows.left[self.row - self.rows.first + row].tolist())
        right = integers(self.panels.values[panel, :, inner].tolist())
        found, at = [], 0
        for term, scale in zip(terms, scales, strict=True):
            end = at + term.A.rows
            found.append((scale, left[at:end], right[at:end]))
            at = end
        return found
