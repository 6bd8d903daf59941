"""What numpy's arrays are called in type annotations, told once."""

from __future__ import annotations

from typing import TypeAlias

import numpy as np
import numpy.typing as npt

__all__ = ["Bytes", "Elements", "Float32", "Float64"]


Bytes: TypeAlias = npt.NDArray[np.uint8]
"""Elements of any dtype as they lie in a file."""
Elements: TypeAlias = npt.NDArray[np.generic]
"""Elements of one of `FLOATS`, by the type that stores them."""
Float32: TypeAlias = npt.NDArray[np.float32]
Float64: TypeAlias = npt.NDArray[np.float64]
