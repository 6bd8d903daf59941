"""Why an element is not finite, said of the row that it is in."""

from __future__ import annotations

import math

import numpy as np

from streamshard.tensors.dtypes import FLOATS
from streamshard.tensors.exact import FORMATS, Scaled
from streamshard.tensors.lazy import Lazy, NotFiniteError, Shape, read_float32
from streamshard.tensors.rounding import narrow
from streamshard.tensors.workspace import Workspace

__all__ = ["base_not_finite", "too_large", "why_cast_fails", "zero_norm"]


def why_cast_fails(
    source: Lazy, dtype: str, row: int, column: int, shape: Shape, work: Workspace
) -> NotFiniteError:
    """Which row of a block is not finite in `dtype`, and why; it begins at `row` and `column`."""
    # The block may be overwritten already: its source is read again.
    base = read_float32(source, row, row + shape[0], work, (column, column + shape[1]))
    rounded = np.empty_like(base)
    narrow(base, dtype, np.empty(shape, FLOATS[dtype]), rounded)
    bad = int(np.argmin(np.isfinite(rounded).all(axis=1)))
    if not np.isfinite(base[bad]).all():
        return base_not_finite(row + bad)
    return _does_not_fit(row + bad, float(np.abs(base[bad]).max()), dtype)


def base_not_finite(row: int) -> NotFiniteError:
    """That a weight of the base is not."""
    return NotFiniteError(row, "the base weight is not finite (NaN or infinite)")


def too_large(row: int, value: Scaled, dtype: str) -> NotFiniteError:
    """That an exact number does not fit."""
    size, exponent = abs(value.number), value.exponent
    drop = max(size.bit_length() - 64, 0)
    about = (
        math.ldexp(size >> drop, exponent + drop)
        if size.bit_length() + exponent < 1000
        else math.inf
    )
    return _does_not_fit(row, about, dtype)


def _does_not_fit(row: int, size: float, dtype: str) -> NotFiniteError:
    if size > FORMATS["F32"].most or dtype == "F32":
        return NotFiniteError(row, "the merged weight is not finite (NaN or infinite)")
    return NotFiniteError(
        row,
        f"a value of magnitude {size:g} does not fit in {dtype}; "
        "write --dtype bf16 or fp32 instead",
    )


def zero_norm(row: int, what: str) -> NotFiniteError:
    """That something has the norm 0, told of a row."""
    return NotFiniteError(row, f"the norm of {what} is zero, so DoRA's scale of it is infinite")
