"""Floating-point formats of checkpoints and fp32, both ways, on blocks.

numpy has no bfloat16. Widening it to fp32 is a shift by 16 bits; rounding fp32 to it, to
nearest with ties to even, is an integer addition and a shift.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

__all__ = ["FLOATS", "narrow", "widen"]

Bytes = npt.NDArray[np.uint8]
Float32 = npt.NDArray[np.float32]

# dtypes that widen to fp32 without loss, and how numpy stores their elements
FLOATS: dict[str, type[np.generic]] = {"BF16": np.uint16, "F16": np.float16, "F32": np.float32}

_BITS_16 = np.uint32(16)
_ONE = np.uint32(1)
_HALF_BELOW = np.uint32(0x7FFF)


def widen(values: npt.NDArray[np.generic], dtype: str, out: Float32) -> None:
    """Elements of `dtype` (an array of `FLOATS[dtype]`) as fp32, exactly, into `out`."""
    if dtype == "BF16":
        bits = out.view(np.uint32)
        np.copyto(bits, values)
        np.left_shift(bits, _BITS_16, out=bits)
    else:
        np.copyto(out, values)


def narrow(values: Float32, dtype: str, out: npt.NDArray[np.generic], scratch: Float32) -> None:
    """Round fp32 to the nearest element of `dtype`, ties to even, into `out`.

    Afterwards `scratch` (the shape of `values`) holds the rounded values as fp32. Values must
    not be NaN with a payload that all but fills the mantissa; infinities and the NaN that
    hardware produces survive.
    """
    if dtype == "BF16":
        bits, rounded = values.view(np.uint32), scratch.view(np.uint32)
        np.right_shift(bits, _BITS_16, out=rounded)
        np.bitwise_and(rounded, _ONE, out=rounded)
        np.add(rounded, bits, out=rounded)
        np.add(rounded, _HALF_BELOW, out=rounded)
        np.right_shift(rounded, _BITS_16, out=rounded)
        np.copyto(out, rounded, casting="unsafe")
        np.left_shift(rounded, _BITS_16, out=rounded)
    elif dtype == "F16":
        with np.errstate(over="ignore"):
            np.copyto(out, values, casting="unsafe")
        np.copyto(scratch, out)
    else:
        np.copyto(out, values)
        np.copyto(scratch, values)
