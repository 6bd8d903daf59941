"""The dtypes of safetensors: one row each, and what is asked of them by name.

Types of numpy and torch are told by their names: the command line has its choices from here, and
must not load either for its help.
"""

from __future__ import annotations

from typing import NamedTuple

__all__ = ["DTYPES", "DTYPE_BITS", "FLOATS", "NOT_FINITE", "NUMPY", "TORCH_DTYPES"]


class _Dtype(NamedTuple):
    """What is known of a dtype.

    `numpy` is the type that understands its elements as numbers. `not_finite` is how infinities and
    NaNs are told: of elements of an unsigned type (of each half of C64) the bits of a mask are a value.
    `option` is what `--dtype` calls it, and `torch` what torch does, of those that widen to fp32
    without loss.
    """

    bits: int
    numpy: str | None = None
    not_finite: tuple[str, int, int] | None = None
    option: str | None = None
    torch: str | None = None


# In the order of the format's own enumeration: files are laid out widest first by this order
# (safetensors `Dtype`, safetensors/src/tensor.rs).
_TABLE = {
    "BOOL": _Dtype(8),
    "F4": _Dtype(4),
    "F6_E2M3": _Dtype(6),
    "F6_E3M2": _Dtype(6),
    "U8": _Dtype(8, "uint8"),
    "I8": _Dtype(8, "int8"),
    "F8_E5M2": _Dtype(8, None, ("uint8", 0x7C, 0x7C)),
    "F8_E4M3": _Dtype(8, None, ("uint8", 0x7F, 0x7F)),
    "F8_E8M0": _Dtype(8, None, ("uint8", 0xFF, 0xFF)),
    "F8_E4M3FNUZ": _Dtype(8, None, ("uint8", 0xFF, 0x80)),
    "F8_E5M2FNUZ": _Dtype(8, None, ("uint8", 0xFF, 0x80)),
    "I16": _Dtype(16, "int16"),
    "U16": _Dtype(16, "uint16"),
    "F16": _Dtype(16, "float16", ("uint16", 0x7C00, 0x7C00), "fp16", "float16"),
    "BF16": _Dtype(16, None, ("uint16", 0x7F80, 0x7F80), "bf16", "bfloat16"),
    "I32": _Dtype(32, "int32"),
    "U32": _Dtype(32, "uint32"),
    "F32": _Dtype(32, "float32", ("uint32", 0x7F800000, 0x7F800000), "fp32", "float32"),
    "C64": _Dtype(64, None, ("uint32", 0x7F800000, 0x7F800000)),
    "F64": _Dtype(64, "float64", ("uint64", 0x7FF0000000000000, 0x7FF0000000000000)),
    "I64": _Dtype(64, "int64"),
    "U64": _Dtype(64, "uint64"),
}

DTYPE_BITS = {name: row.bits for name, row in _TABLE.items()}
"""Bits an element, in the order of the format."""

NUMPY = {name: row.numpy for name, row in _TABLE.items() if row.numpy is not None}
"""What numpy calls elements that it understands itself; the other floats go through fp32."""

NOT_FINITE = {name: row.not_finite for name, row in _TABLE.items() if row.not_finite is not None}
"""Unsigned type, mask and value by which infinities and NaNs are told."""

DTYPES = {row.option: name for name, row in sorted(_TABLE.items()) if row.option is not None}
"""The choices of `--dtype`."""

FLOATS = {name: _TABLE[name].numpy or f"uint{_TABLE[name].bits}" for name in DTYPES.values()}
"""dtypes that widen to fp32 without loss, and how numpy stores their elements."""

TORCH_DTYPES = {name: row.torch for name, row in _TABLE.items() if row.torch is not None}
"""What torch, and so `torch_dtype` in a config, calls these."""
