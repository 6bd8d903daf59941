"""Which of the inner loops this process uses: compiled ones for this processor, or numpy's.

All of them give the same bytes. `STREAMSHARD_KERNEL` forces one, for comparison.
"""

from __future__ import annotations

import functools
import os
from typing import Any

import numpy as np
import numpy.typing as npt

from streamshard.errors import UsageError, printable
from streamshard.tensors import numpy_kernel
from streamshard.tensors.arrays import Elements, Float32, Float64
from streamshard.tensors.numpy_kernel import Found, Job

try:
    from streamshard.tensors import _kernels
except ImportError:  # installed without a compiler
    _kernels = None  # type: ignore[assignment]

__all__ = [
    "CHOICES",
    "VARIABLE",
    "Found",
    "Job",
    "available",
    "chosen",
    "distance_bf16",
    "keep_subnormals",
    "merge",
    "needs_fp64",
    "pack_rows",
    "scale_rows",
]


VARIABLE = "STREAMSHARD_KERNEL"
CHOICES = ("auto", "avx512", "avx2", "baseline", "numpy")


def available() -> tuple[str, ...]:
    """What this machine can run, the best first."""
    compiled = () if _kernels is None else tuple(_kernels.names())
    return (*compiled, "numpy")


def chosen() -> str:
    """The kernel in use. Raises `UsageError` for one that is unknown, or that cannot run here."""
    return _of(os.environ.get(VARIABLE, "") or "auto")


@functools.cache
def _of(asked: str) -> str:
    if asked not in CHOICES:
        raise UsageError(
            f"{VARIABLE} is {printable(repr(asked))}; one of {', '.join(CHOICES)} was expected."
        )
    found = available()
    if asked == "auto":
        return found[0]
    if asked not in found:
        why = "was installed without a compiler" if _kernels is None else "has no such processor"
        raise UsageError(
            f"{VARIABLE} is {asked}, but this machine {why}: {', '.join(found)} can be chosen. "
            "All of them give the same bytes."
        )
    return asked


def needs_fp64(dtype: str) -> bool:
    """Whether factors are wanted in fp64: where fp32 proves too little, and for numpy."""
    return dtype != "BF16" or chosen() == "numpy"


def keep_subnormals() -> None:
    """Have this thread compute as the proofs want it, for as long as it lives.

    Threads inherit what other code of the process has set: libraries made with `-ffast-math` have the
    processor take subnormal numbers for zeros. Raises `UsageError` where that cannot be undone.
    """
    if _kernels is not None:
        _kernels.keep_subnormals()
    smallest = np.float32(2.0**-126)
    if smallest * np.float32(0.5) * np.float32(2) != smallest:
        raise UsageError(
            "Other code of this process has the processor take subnormal numbers for zeros, so that "
            "nothing can be computed exactly. Run streamshard in a process of its own."
        )


def merge(job: Job) -> Found:
    """Do what `_kernels.merge` tells, by the kernel in use."""
    name = chosen()
    if name == "numpy":
        return numpy_kernel.merge(job)
    return Found(*_kernels.merge(name, *job))


def scale_rows(
    rows: Float32,
    scale: float,
    scaled: npt.NDArray[Any],
    norms: Float64,
    least: float,
    tiny: float,
) -> None:
    """Put `rows * scale` into `scaled` (fp32 or fp64), and their norms together with those in `norms`.

    That of a row is at least `least` if the row is not zero, and `tiny` more if fp32 loses some of it.
    """
    if chosen() == "numpy":
        numpy_kernel.scale_rows(rows, scale, scaled, norms, least, tiny)
    else:
        count, rank = rows.shape
        wide = scaled.dtype == np.float64
        _kernels.scale_rows(rows, count, rank, scale, scaled, wide, norms, least, tiny)


def pack_rows(rows: Float32, first: int, panels: Float32, at: int, squares: Float64) -> None:
    """Put `rows`, of columns from `first` on, into `panels` as ranks from `at` on; add their squares."""
    if chosen() == "numpy":
        numpy_kernel.pack_rows(rows, first, panels, at, squares)
    else:
        count, columns = rows.shape
        _kernels.pack_rows(rows, count, columns, first, panels, panels.shape[1], at, squares)


def distance_bf16(one: Elements, other: Elements) -> float:
    """Sum in fp64 of the squared differences of two arrays of bfloat16 (as uint16)."""
    if chosen() == "numpy":
        return numpy_kernel.distance_bf16(one, other)
    return _kernels.distance_bf16(one, other)
