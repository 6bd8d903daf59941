"""Comparing tensors, block by block: equal bytes, and L2 distances in fp64.

Blocks whose bytes and dtypes are equal are at distance 0 and are not converted.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from streamshard.tensors.arrays import Bytes, Float64
from streamshard.tensors.computed import Computed
from streamshard.tensors.dtypes import DTYPE_BITS, FLOATS, NUMPY
from streamshard.tensors.kernel import distance_bf16
from streamshard.tensors.lazy import READ_NBYTES, Lazy, blocks
from streamshard.tensors.rounding import widen
from streamshard.tensors.workspace import Workspace

__all__ = [
    "Distances",
    "equal_bytes",
    "is_comparable",
    "squared_distance",
    "squared_norm",
    "tensor_distance",
]


# What is widened to fp64 at a time: stays in the processor's cache, and costs little memory.
PART_ELEMENTS = 16 * 1024


@dataclass
class Distances:
    """The distances of a set of tensors from a reference.

    `squared` maps each compared tensor to its squared distance, `parameters` counts their elements,
    `skipped` names what only one side has or what cannot be compared.
    """

    reference: str | None
    squared: dict[str, float] = field(default_factory=dict)
    parameters: int = 0
    skipped: list[str] = field(default_factory=list)

    def norms(self) -> Iterator[tuple[str, float | None]]:
        """The L2 norm of every difference that is not zero, by tensor; None where it is not finite."""
        for name, value in self.squared.items():
            if value:
                yield name, math.sqrt(value) if math.isfinite(value) else None

    def report(self) -> dict[str, Any] | None:
        """The `l2` part of a report; None without a reference.

        `sum` and `per_parameter` are what InternVL's conversion tools print as total and average.
        """
        if self.reference is None:
            return None
        total = math.fsum(math.sqrt(value) for value in self.squared.values())
        return {
            "reference": self.reference,
            "sum": total,
            "per_parameter": total / max(self.parameters, 1),
            "global": math.sqrt(math.fsum(self.squared.values())),
            "compared": len(self.squared),
            "skipped": self.skipped,
        }


def is_comparable(one: Lazy, other: Lazy) -> bool:
    """Whether two tensors have one shape, and dtypes that are numbers."""
    return one.shape == other.shape and all(
        dtype in NUMPY or dtype in FLOATS for dtype in (one.dtype, other.dtype)
    )


def squared_distance(one: Bytes, one_dtype: str, other: Bytes, other_dtype: str) -> float:
    """Sum of the squared differences of two blocks of as many elements, given as bytes.

    The result is NaN where a NaN stands in one of them and the blocks differ.
    """
    if one_dtype == other_dtype == "BF16":
        squared = distance_bf16(one.view(np.uint16), other.view(np.uint16))
        # Of equal infinities and NaNs the difference is NaN.
        return 0.0 if math.isnan(squared) and np.array_equal(one, other) else squared
    if one_dtype == other_dtype and np.array_equal(one, other):
        return 0.0
    width, other_width = DTYPE_BITS[one_dtype] // 8, DTYPE_BITS[other_dtype] // 8
    total = 0.0
    with np.errstate(invalid="ignore"):
        for start in range(0, one.nbytes // width, PART_ELEMENTS):
            stop = start + PART_ELEMENTS
            difference = _float64(one[start * width : stop * width], one_dtype)
            difference -= _float64(other[start * other_width : stop * other_width], other_dtype)
            total += float(np.sum(np.square(difference, out=difference)))
    return total


def tensor_distance(one: Lazy, other: Lazy, work: Workspace) -> tuple[float, float]:
    """Squared distance of two comparable tensors, read block by block, and the second's squared norm."""
    total = norm = 0.0
    for mine, theirs in blocks(work, one, other):
        total += squared_distance(mine, one.dtype, theirs, other.dtype)
        norm += squared_distance(theirs, other.dtype, np.zeros_like(theirs), other.dtype)
    return total, norm


def _float64(block: Bytes, dtype: str) -> Float64:
    if dtype in NUMPY:
        return block.view(NUMPY[dtype]).astype(np.float64)
    values = np.empty(block.nbytes * 8 // DTYPE_BITS[dtype], np.float32)
    widen(block.view(FLOATS[dtype]), dtype, values)
    return values.astype(np.float64)


def equal_bytes(one: Lazy, other: Lazy, work: Workspace) -> bool:
    """Whether two tensors have one shape, one dtype and the same bytes, which are read block by block."""
    if (one.shape, one.dtype) != (other.shape, other.dtype):
        return False
    pairs = blocks(work, one, other, nbytes=READ_NBYTES)
    return all(np.array_equal(left, right) for left, right in pairs)


def squared_norm(tensor: Lazy, work: Workspace) -> float:
    """The squared L2 norm of a tensor of numbers, read block by block.

    Of what is computed by `cast` or an update, it is that of what this is made from.
    """
    total = 0.0
    for piece in tensor.pieces:
        before = piece.source if isinstance(piece, Computed) else piece
        for (block,) in blocks(work, before):
            zeros = np.zeros_like(block)
            total += squared_distance(block, before.dtype, zeros, before.dtype)
    return total
