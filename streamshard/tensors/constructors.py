"""How computed tensors are made: `cast`, `add_low_rank`, `with_magnitude`.

Each pushes the computation to the parts that preserve bytes, so that a tree is never deeper than that.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace

from streamshard.errors import InputError
from streamshard.tensors.computed import Computed, Magnitude
from streamshard.tensors.dtypes import FLOATS
from streamshard.tensors.joined import concat
from streamshard.tensors.lazy import Lazy
from streamshard.tensors.low_rank import LowRank

__all__ = ["add_low_rank", "cast", "with_magnitude"]


def cast(tensor: Lazy, dtype: str) -> Lazy:
    """`tensor` rounded to a float `dtype`; integers and other non-floats stay what they are.

    Raises `InputError` for floats that do not widen to fp32 without loss.
    """
    if tensor.dtype == dtype or not tensor.dtype.startswith(("F", "BF")):
        return tensor
    if tensor.dtype not in FLOATS or dtype not in FLOATS:
        raise InputError(
            f"cannot convert {tensor.dtype} to {dtype}; only {', '.join(FLOATS)} can be converted. "
            "Keep the dtype, or dequantize the checkpoint first."
        )
    if isinstance(tensor, Computed):
        return replace(tensor, dtype=dtype)
    if len(tensor.pieces) > 1:
        return concat([cast(piece, dtype) for piece in tensor.pieces]).reshape(tensor.shape)
    columns = tensor.shape[-1] if len(tensor.shape) > 1 else 1
    matrix = (math.prod(tensor.shape) // max(columns, 1), columns)
    return Computed(tensor.reshape(matrix), (), dtype, tensor.shape)


def add_low_rank(tensor: Lazy, terms: Sequence[LowRank]) -> Lazy:
    """`tensor` plus the sum of `terms` (each with as many rows), rounded once to its dtype.

    Raises `ValueError` if a term's shape does not fit.
    """
    for term in terms:
        if (term.stop - term.start, term.A.columns) != (tensor.rows, tensor.columns):
            raise ValueError(f"a {term.B.shape} x {term.A.shape} update on {tensor.shape}")
        if term.B.columns != term.A.rows:
            raise ValueError(f"ranks of {term.B.shape} and {term.A.shape} differ")
    if isinstance(tensor, Computed):
        if tensor.magnitude is not None:
            raise ValueError("an update on what DoRA has scaled")
        matrix = (tensor.shape[0], math.prod(tensor.shape[1:]))
        return replace(tensor, source=tensor.source.reshape(matrix), terms=(*tensor.terms, *terms))
    if tensor.ranges() is None and len(tensor.pieces) > 1:
        parts, first = [], 0
        for piece in tensor.pieces:
            height = piece.shape[0]
            parts.append(add_low_rank(piece, [t.take(first, first + height) for t in terms]))
            first += height
        return concat(parts)
    source = tensor.reshape((tensor.rows, tensor.columns))
    return Computed(source, tuple(terms), tensor.dtype, tensor.shape)


def with_magnitude(tensor: Lazy, term: LowRank, vector: Lazy, *, by_row: bool) -> Lazy:
    """`m * V / |V|` with `V = tensor + term`: DoRA (arXiv:2402.09353, PEFT `DoraLinearLayer`).

    `vector` is `m`: one number for each row, with norms over rows, or for each column, with norms
    over columns. Raises `ValueError` if a shape does not fit.
    """
    count = tensor.rows if by_row else tensor.columns
    if vector.rows * vector.columns != count:
        raise ValueError(f"{vector.shape} magnitudes on {tensor.shape}")
    whole = add_low_rank(tensor, [term])
    if not isinstance(whole, Computed):
        raise ValueError("DoRA on what is computed already")  # noqa: TRY004
    vector = vector.reshape((count,))
    return replace(whole, magnitude=Magnitude(vector, 0, None if by_row else whole))
