"""Memory and processors: how many workers, and what was used."""

from __future__ import annotations

import contextlib
import os
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from streamshard.errors import UsageError, printable
from streamshard.limits import fitting
from streamshard.tensors import Lazy
from streamshard.updates import (
    BLOCK_ELEMENTS,
    CHUNK_ROWS,
    HELD_NBYTES,
    TILE_COLUMNS,
    TILE_ROWS,
    Columns,
    Computed,
    LowRank,
    Transposed,
)

if TYPE_CHECKING:
    from streamshard.writer import Shard

__all__ = ["memory_estimate", "parse_size", "peak_rss_bytes", "worker_count", "workers_or_default"]

DEFAULT_WORKERS = 8
MAX_WORKERS = 64
# Measured: interpreter, numpy with BLAS, and a plan of some thousand tensors.
_PROCESS_NBYTES = 48_000_000
_READER_NBYTES = 6_000_000
_NO_SIZE = 2**63  # bytes that no system can count

_UNITS = {"": 1, "B": 1}
for _place, _letter in enumerate("KMGT", start=1):
    _UNITS |= {_letter: 1000**_place, f"{_letter}B": 1000**_place, f"{_letter}IB": 1024**_place}


def parse_size(size: int | str) -> int:
    """Bytes of "5GB", "500 MB" (decimal), "1GiB" (binary) or a plain number.

    >>> parse_size("1.5GB"), parse_size("1 KiB"), parse_size(7)
    (1500000000, 1024, 7)
    """
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([a-zA-Z]*)\s*", str(size))
    if match is None or match[2].upper() not in _UNITS:
        raise ValueError(f"{printable(repr(size))} is no size; write it like 5GB or 500MB")
    number = float(match[1]) * _UNITS[match[2].upper()]
    if number >= _NO_SIZE:
        raise ValueError(f"{printable(str(size))} is more than any disk has")
    nbytes = int(number)
    if nbytes < 1:
        raise ValueError(f"{size!r} is no size greater than 0")
    return nbytes


def worker_count(shards: Sequence[Shard], workers: int | None, max_memory: int | None) -> int:
    """How many threads to use: as asked, else one a processor, fewer for a memory budget.

    Fewer also where a limit of this process leaves room for fewer. Raises `UsageError` if the budget
    does not allow a single one, `OutOfMemoryError` if such a limit does not.
    """
    count = _asked(workers)
    if max_memory is None:
        return fitting(count, _worker_nbytes(shards))
    least = memory_estimate(shards, 1)
    if least > max_memory:
        raise UsageError(
            f"--max-memory is {max_memory:,} bytes, but one worker needs about {least:,} for this "
            "model and adapter. Allow more, or leave the option out."
        )
    count = min(count, 1 + (max_memory - least) // _worker_nbytes(shards))
    return fitting(count, _worker_nbytes(shards))


def workers_or_default(workers: int | None) -> int:
    """How many threads that only read: as asked, else one a processor; fewer under a limit of memory.

    Raises `UsageError` for an absurd number, `OutOfMemoryError` if there is no room for one.
    """
    return fitting(_asked(workers), _READER_NBYTES)


def _asked(workers: int | None) -> int:
    if workers is not None and not 1 <= workers <= MAX_WORKERS:
        raise UsageError(f"--workers is {workers}; 1 to {MAX_WORKERS} can be chosen.")
    return workers or min(_processors(), DEFAULT_WORKERS)


def memory_estimate(shards: Sequence[Shard], workers: int) -> int:
    """About how many bytes of resident memory a run takes at most."""
    return _PROCESS_NBYTES + workers * _worker_nbytes(shards)


def _worker_nbytes(shards: Sequence[Shard]) -> int:
    """Bytes of the buffers of one worker: blocks in fp32 and fp64, a row block, the factors."""
    largest = 0
    for shard in shards:
        for tensor in shard.tensors.values():
            for piece in tensor.pieces:
                if isinstance(piece, Computed):
                    rows = TILE_ROWS * (piece.row_nbytes + piece.source.row_nbytes)
                    if piece.magnitude is not None:  # a whole row of updates in fp32
                        rows += TILE_ROWS * 4 * piece.columns
                    factors = sum(
                        _factor_nbytes(term.A) + _held_nbytes(term) for term in piece.terms
                    )
                    largest = max(largest, rows + factors)
    return 24 * BLOCK_ELEMENTS + 1_000_000 + largest


def _factor_nbytes(A: Lazy) -> int:
    # All of A as stored and in fp32, rows of B likewise, and what is multiplied in fp64.
    return A.nbytes + A.rows * (4 * A.columns + 20 * CHUNK_ROWS + 8 * TILE_COLUMNS)


def _held_nbytes(term: LowRank) -> int:
    """Bytes of the factors of fused experts that stay in memory, two of them at most."""
    views = [f.source if isinstance(f, Transposed) else f for f in (term.A, term.B)]
    held = [view.source.nbytes for view in views if isinstance(view, Columns)]
    return 2 * min(max(held, default=0), HELD_NBYTES)


def _processors() -> int:
    try:
        return len(os.sched_getaffinity(0))
    except AttributeError:  # macOS, Windows
        return os.cpu_count() or 1


def peak_rss_bytes() -> int:
    """The largest resident memory of this process so far, in bytes."""
    if sys.platform == "win32":
        import psutil

        return int(psutil.Process().memory_info().peak_wset)
    with contextlib.suppress(OSError):
        # Where there is one: a process that was started by a large one inherits its `ru_maxrss`.
        peak = re.search(r"VmHWM:\s*(\d+) kB", Path("/proc/self/status").read_text())
        if peak is not None:
            return int(peak[1]) * 1024
    import resource

    used = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return used if sys.platform == "darwin" else used * 1024
