"""The largest magnitudes of many small tensors: an adapter of every expert has some 70,000 of them.

They lie side by side in a file, so they are seen together, and as whole numbers: of floats without their
sign those are in the same order.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping

import numpy as np

from streamshard.disk.files import ByteRange
from streamshard.tensors.dtypes import DTYPE_BITS, NOT_FINITE
from streamshard.tensors.lazy import Lazy, Stored
from streamshard.tensors.workspace import Workspace

__all__ = ["peaks_of"]

SMALL_NBYTES = 64 * 1024
SEEN_NBYTES = 1024 * 1024
_FLOATS = {"F32": np.float32, "F16": np.float16, "BF16": None}


def peaks_of(tensors: Mapping[str, Lazy], keys: Iterable[str], work: Workspace) -> dict[str, float]:
    """The largest magnitude in each of those tensors that are small, lie in files, and are finite."""
    small = [
        (key, one)
        for key in keys
        if isinstance(one := tensors[key], Stored)
        and one.dtype in _FLOATS
        and 0 < one.nbytes <= SMALL_NBYTES
    ]
    small.sort(key=lambda one: (one[1].path, one[1].offset))
    found: dict[str, float] = {}
    for run in _runs(small):
        names = [key for key, _ in run]
        found.update(zip(names, _peaks([tensor for _, tensor in run], work), strict=True))
    return {key: peak for key, peak in found.items() if peak < np.inf}


def _runs(stored: Iterable[tuple[str, Stored]]) -> Iterator[list[tuple[str, Stored]]]:
    """Tensors of one dtype that follow each other."""
    run: list[tuple[str, Stored]] = []
    for key, tensor in stored:
        if run:
            first, last = run[0][1], run[-1][1]
            follows = (last.path, last.offset + last.nbytes) == (tensor.path, tensor.offset)
            room = tensor.offset + tensor.nbytes - first.offset <= SEEN_NBYTES
            if not (follows and room and last.dtype == tensor.dtype):
                yield run
                run = []
        run.append((key, tensor))
    if run:
        yield run


def _peaks(run: list[Stored], work: Workspace) -> list[float]:
    """The largest magnitude in each; infinity where one is not finite."""
    first, dtype = run[0], run[0].dtype
    unsigned, _, infinity = NOT_FINITE[dtype]
    kind = np.dtype(unsigned)
    begins = np.array([tensor.offset - first.offset for tensor in run]) // kind.itemsize
    nbytes = run[-1].offset + run[-1].nbytes - first.offset
    span = ByteRange(first.path, first.offset, nbytes, first.file_nbytes)
    with work.view(span, "peaks", DTYPE_BITS[dtype] // 8) as found:
        sign = kind.type(1 << (8 * kind.itemsize - 1))
        sizes = np.maximum.reduceat(found.view(kind) & ~sign, begins)
    sizes = np.minimum(sizes, kind.type(infinity))
    as_float = _FLOATS[dtype]
    if as_float is None:
        sizes, as_float = sizes.astype(np.uint32) << np.uint32(16), np.float32
    return [float(size) for size in sizes.view(as_float)]
