"""From a job to its plan: workers, memory, room on the disk. Reads no weight."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from streamshard.checkpoint.shards import Shard
from streamshard.disk.files import file_nbytes
from streamshard.disk.folders import disk_free
from streamshard.engine.beside_output import staged_nbytes
from streamshard.engine.budget import memory_estimate, parse_size, worker_count
from streamshard.engine.job import Job, Options, Plan
from streamshard.errors import InputError, UsageError, WriteError, printable
from streamshard.tensors.constructors import cast
from streamshard.tensors.dtypes import DTYPES
from streamshard.tensors.lazy import Lazy

__all__ = ["cast_all", "planned", "size_option"]


def cast_all(tensors: Mapping[str, Lazy], dtype: str) -> Mapping[str, Lazy]:
    """All tensors in the dtype of that option."""
    if dtype == "keep":
        return tensors
    if dtype not in DTYPES:
        raise UsageError(f"--dtype is {dtype!r}; keep, {', '.join(DTYPES)} can be chosen.")
    out = {}
    for name, tensor in tensors.items():
        try:
            out[name] = cast(tensor, DTYPES[dtype])
        except InputError as error:
            raise InputError(f"tensor '{printable(name)}': {error}") from error
    return out


def size_option(size: int | str | None, option: str) -> int | None:
    """The bytes that an option says; None where it is not given."""
    if size is None:
        return None
    try:
        return parse_size(size)
    except ValueError as error:
        raise UsageError(f"{option}: {error}") from error


def planned(job: Job, shards: Sequence[Shard], options: Options) -> Plan:
    """What writing these shards would take; `WriteError` if the disk has no room for them."""
    nbytes = sum(shard.nbytes for shard in shards)
    free = disk_free(job.output.absolute())
    side = sum(file_nbytes(file) for file in job.files.values() if isinstance(file, Path))
    needed = nbytes + side + 64 * 1024 * len(shards)
    # What an interrupted run has left is continued, or makes room.
    if free is not None and needed > free + staged_nbytes(job.output):
        raise WriteError(
            f"{printable(str(job.output))}: {needed:,} bytes are needed but {free:,} are free. "
            "Free some space, or choose an output on another disk."
        )
    count = worker_count(shards, options.workers, size_option(options.max_memory, "--max-memory"))
    return Plan(job.output, tuple(shards), nbytes, free, count, memory_estimate(shards, count))
