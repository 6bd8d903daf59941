"""Why a computed element is not finite, said of the row that it is in."""

from __future__ import annotations

import numpy as np

from streamshard.tensors.arrays import Float32, Float64
from streamshard.tensors.dtypes import FLOATS
from streamshard.tensors.lazy import Lazy, NotFiniteError, Shape, read_float32
from streamshard.tensors.rounding import narrow
from streamshard.tensors.workspace import Workspace

__all__ = ["why_not_finite", "zero_norm"]


def why_not_finite(
    source: Lazy,
    dtype: str,
    row: int,
    column: int,
    shape: Shape,
    update: Float32 | None,
    work: Workspace,
    scale: Float64 | None,
) -> NotFiniteError:
    """Which row of a block of `dtype` is not finite, and why.

    The block begins at `row` and `column` of `source`, to which `update` was added.
    """
    # The block may be overwritten already: its source is read again.
    across = column, column + shape[1]
    base = read_float32(source, row, row + shape[0], work, across)
    total = base if update is None else base + update
    if scale is not None:
        total = (total * scale).astype(np.float32)
    rounded = np.empty_like(base)
    narrow(total, dtype, np.empty(shape, FLOATS[dtype]), rounded)
    bad = int(np.argmin(np.isfinite(rounded - base).all(axis=1)))
    if not np.isfinite(base[bad]).all():
        detail = "the base weight is not finite (NaN or infinite)"
    elif np.isfinite(total[bad]).all():
        detail = (
            f"a value of magnitude {np.abs(total[bad]).max():g} does not fit in {dtype}; "
            "write --dtype bf16 or fp32 instead"
        )
    else:
        detail = "the merged weight is not finite (NaN or infinite)"
    return NotFiniteError(row + bad, detail)


def zero_norm(row: int, what: str) -> NotFiniteError:
    """That something has the norm 0, told of a row."""
    return NotFiniteError(row, f"the norm of {what} is zero, so DoRA's scale of it is infinite")
