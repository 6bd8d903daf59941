"""What `_kernels.c` does, by numpy: for machines without a compiler, and to compare with.

Products are those of BLAS, in fp64: in whatever order it adds, an element is proven right by its bound
or left to exact integers, so the bytes are the same.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from streamshard.tensors.arrays import Elements, Float32, Float64
from streamshard.tensors.exact import FORMATS
from streamshard.tensors.rounding import narrow, widen

__all__ = ["Found", "Job", "distance_bf16", "merge", "pack_rows", "scale_rows"]


HEIGHT, WIDTH = 64, 1024
_SMALLEST = 2.0**-900


class Job(NamedTuple):
    """What a kernel is asked for, in the order of the arguments of `_kernels.merge`, which tells it.

    A window of `rows` and `columns`, the first of which is column `first` of the panels.
    """

    rows: int
    columns: int
    first: int
    old: Elements
    old_dtype: str
    out: Elements | None
    dtype: str
    wide: bool
    rank: int
    panels: Float32
    norms: Float32
    left: Float32
    scaled: npt.NDArray[Any]
    row_norms: Float32
    ends: npt.NDArray[np.int64]
    scales: Float64
    safe: bool
    bound: float
    tiny: float
    bound_wide: float
    factor: Float64 | None
    by_row: bool
    slack: float
    sums: Float64 | None


class Found(NamedTuple):
    """Sums of squares of what was changed and of what was to be added, counts, and what is open.

    The latter are row and column, uint32 each, of elements that must be computed exactly.
    """

    effected: float
    intended: float
    unchanged: int
    rechecked: int
    open: bytes


def merge(job: Job) -> Found:
    """As `_kernels.merge`; always in fp64."""
    dtype, sums, factor = job.dtype, job.sums, job.factor
    effected = intended = 0.0
    unchanged, left = 0, []
    for row in range(0, job.rows, HEIGHT):
        for column in range(0, job.columns, WIDTH):
            end = min(column + WIDTH, job.columns)
            block = np.s_[row : min(row + HEIGHT, job.rows), column:end]
            place = np.s_[job.first + column : job.first + end]
            W = np.empty(job.old[block].shape, np.float32)
            widen(job.old[block], job.old_dtype, W)
            update = job.scaled[block[0]] @ _columns(job, place)
            V = W + update
            added = job.row_norms[block[0], None].astype(np.float64) * job.norms[place]
            size = added + np.abs(W)
            if sums is not None:
                own, axis = (sums[block[0]], 1) if job.by_row else (sums[block[1]], 0)
                _add_exactly(own, np.sum(V * V, axis=axis))
                own[:, 2] += np.sum(size * size, axis=axis)
                continue
            if job.out is None:
                raise ValueError("either elements or sums are wanted")
            error = job.bound_wide * size
            by = None
            if factor is not None:
                by = factor[block[0], None] if job.by_row else factor[place]
                V *= by
                error = error * np.abs(by) + job.slack * np.abs(V)
                update = V - W
            found, proven = _round(V, error, dtype)
            found, proven = _special(found, proven, W, added, by, dtype)
            result: Float32 = np.where(proven, found, W).astype(np.float32)
            places = np.argwhere(~proven)
            left.append((places + np.array([row, column])).astype(np.uint32))
            same = (result.view(np.uint32) == W.view(np.uint32)) & proven
            unchanged += int(np.count_nonzero(same))
            change = result.astype(np.float64) - W
            change[~proven] = 0
            effected += float(np.sum(change * change))
            intended += float(np.sum(update * update))
            narrow(result, dtype, job.out[block], W)
    open_ones = np.concatenate(left) if left else np.empty((0, 2), np.uint32)
    return Found(effected, intended, unchanged, len(open_ones), open_ones.tobytes())


def _columns(job: Job, place: slice) -> Float64:
    """Some columns of the panels as a matrix."""
    panel = job.panels.shape[2]
    low, high = place.start // panel, -(-place.stop // panel)
    whole = job.panels[low:high].transpose(1, 0, 2).reshape(job.rank, -1)
    part: Float32 = whole[:, place.start - low * panel : place.stop - low * panel]
    return part.astype(np.float64)


def _special(
    found: Float64,
    proven: npt.NDArray[np.bool_],
    W: Float32,
    added: Float64,
    by: Float64 | None,
    dtype: str,
) -> tuple[Float64, npt.NDArray[np.bool_]]:
    """The same where nothing is added, so that the base is the exact value, or DoRA's factor is 0."""
    same = (added == 0) & ((W == 0) | (by is None)) & np.isfinite(W)
    if same.any():
        alone, fits = _round(W.astype(np.float64), np.zeros(W.shape), dtype)
        found = np.where(same, np.where(W == 0, W, alone), found)
        proven = np.where(same, fits | (W == 0), proven)
    if by is not None and not by.all():
        zero = (np.broadcast_to(by, W.shape) == 0) & (W != 0) & np.isfinite(W)
        found, proven = np.where(zero, 0, found), proven | zero
    return found, proven


def _round(values: Float64, error: Float64, dtype: str) -> tuple[Float64, npt.NDArray[np.bool_]]:
    """`values` in a format, and where that is proven: no boundary is within `error`."""
    digits, least, most = FORMATS[dtype]
    size = np.abs(values)
    last = np.maximum(np.frexp(size)[1] - 1, least) - digits + 1
    steps = np.ldexp(size, -last)
    found = np.ldexp(np.rint(steps), last)
    distance = np.ldexp(np.abs(steps - np.floor(steps) - 0.5), last)
    proven = ((distance > error) & (np.ldexp(0.25, last) > error)) | (error == 0)
    proven &= (size > error) & (size > _SMALLEST) & (found <= most)
    return np.copysign(found, values), proven


def _add_exactly(sums: Float64, more: Float64) -> None:
    """Add to high parts, and what that loses to low parts (Knuth's two-sum)."""
    before = sums[:, 0].copy()
    after = before + more
    back = after - before
    sums[:, 0] = after
    sums[:, 1] += (before - (after - back)) + (more - back)


def scale_rows(
    rows: Float32,
    scale: float,
    scaled: npt.NDArray[Any],
    norms: Float64,
    least: float,
    tiny: float,
) -> None:
    """As `_kernels.scale_rows`."""
    with np.errstate(over="ignore", invalid="ignore", under="ignore"):
        exact = np.multiply(rows, scale, dtype=np.float64)
        scaled[:] = exact
        size = np.sqrt(np.square(rows, dtype=np.float64).sum(1)) * abs(scale)
        size = np.where(rows.any(1), np.maximum(size, least), 0)
        size += np.where(((np.abs(exact) < 2.0**-126) & (rows != 0)).any(1), tiny, 0)
        norms[:] = np.hypot(norms, size)


def pack_rows(rows: Float32, first: int, panels: Float32, at: int, squares: Float64) -> None:
    """As `_kernels.pack_rows`."""
    end, width = first + rows.shape[1], panels.shape[2]
    with np.errstate(over="ignore", invalid="ignore", under="ignore"):
        squares[first:end] += np.square(rows, dtype=np.float64).sum(0)
    for panel in range(first // width, -(-end // width)):
        low, high = max(first, panel * width), min(end, (panel + 1) * width)
        place = panels[panel, at : at + len(rows), low - panel * width : high - panel * width]
        place[:] = rows[:, low - first : high - first]


# The compiled loop keeps so many sums: element i is added to sum i modulo this, those that are left
# over to the first; in the end the sums are added up in their order.
LANES = 16


def distance_bf16(one: Elements, other: Elements) -> float:
    """As `_kernels.distance_bf16`, added in the same order."""
    left, right = np.empty(one.shape, np.float32), np.empty(other.shape, np.float32)
    widen(one, "BF16", left)
    widen(other, "BF16", right)
    with np.errstate(invalid="ignore"):
        change = left.astype(np.float64) - right
        squares = change * change
        whole = squares.size // LANES * LANES
        rows = np.zeros((whole // LANES + squares.size - whole, LANES))
        rows[: whole // LANES] = squares[:whole].reshape(-1, LANES)
        rows[whole // LANES :, 0] = squares[whole:]
        # Over the first axis of a C-ordered array numpy adds row after row.
        return float(np.add.accumulate(np.add.reduce(rows, axis=0))[-1])
