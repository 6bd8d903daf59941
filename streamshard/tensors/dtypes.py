"""The dtypes of safetensors: how wide, what numpy and torch call them, which are floats."""

from __future__ import annotations

from typing import Any

import numpy as np

__all__ = ["DTYPES", "DTYPE_BITS", "FLOATS", "NOT_FINITE", "NUMPY", "TORCH_DTYPES"]


# dtypes that widen to fp32 without loss, and how numpy stores their elements
FLOATS: dict[str, type[np.generic]] = {"BF16": np.uint16, "F16": np.float16, "F32": np.float32}


# How infinities and NaNs of a dtype are told: the bits of `mask` are `value` (of each half of C64).
NOT_FINITE: dict[str, tuple[type[np.unsignedinteger[Any]], int, int]] = {
    "BF16": (np.uint16, 0x7F80, 0x7F80),
    "F16": (np.uint16, 0x7C00, 0x7C00),
    "F32": (np.uint32, 0x7F800000, 0x7F800000),
    "F64": (np.uint64, 0x7FF0000000000000, 0x7FF0000000000000),
    "C64": (np.uint32, 0x7F800000, 0x7F800000),
    "F8_E5M2": (np.uint8, 0x7C, 0x7C),
    "F8_E4M3": (np.uint8, 0x7F, 0x7F),
    "F8_E8M0": (np.uint8, 0xFF, 0xFF),
    "F8_E4M3FNUZ": (np.uint8, 0xFF, 0x80),
    "F8_E5M2FNUZ": (np.uint8, 0xFF, 0x80),
}

# Elements that numpy itself understands; the other floats go through fp32.
NUMPY: dict[str, type[np.generic]] = {
    "U8": np.uint8,
    "I8": np.int8,
    "I16": np.int16,
    "U16": np.uint16,
    "I32": np.int32,
    "U32": np.uint32,
    "I64": np.int64,
    "U64": np.uint64,
    "F16": np.float16,
    "F32": np.float32,
    "F64": np.float64,
}
TORCH_DTYPES = {"BF16": "bfloat16", "F16": "float16", "F32": "float32"}

DTYPES = {"bf16": "BF16", "fp16": "F16", "fp32": "F32"}

# Bits an element, in the order of the format's own enumeration: files are laid out widest
# first by this order (safetensors `Dtype`, safetensors/src/tensor.rs).
DTYPE_BITS: dict[str, int] = {
    "BOOL": 8,
    "F4": 4,
    "F6_E2M3": 6,
    "F6_E3M2": 6,
    "U8": 8,
    "I8": 8,
    "F8_E5M2": 8,
    "F8_E4M3": 8,
    "F8_E8M0": 8,
    "F8_E4M3FNUZ": 8,
    "F8_E5M2FNUZ": 8,
    "I16": 16,
    "U16": 16,
    "F16": 16,
    "BF16": 16,
    "I32": 32,
    "U32": 32,
    "F32": 32,
    "C64": 64,
    "F64": 64,
    "I64": 64,
    "U64": 64,
}
