"""Tensors in memory, of plain numbers."""

from __future__ import annotations

from typing import Any

import numpy as np

from streamshard.tensors.lazy import Array

KINDS = {"F16": np.float16, "F32": np.float32, "F64": np.float64, "I8": np.int8, "U64": np.uint64}


def array(values: Any, dtype: str = "F32") -> Array:
    found = np.ascontiguousarray(values, KINDS[dtype])
    return Array(found.reshape(-1).view(np.uint8), found.shape, dtype)
