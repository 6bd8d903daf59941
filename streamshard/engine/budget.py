"""Memory and processors: how many workers, and what was used."""

from __future__ import annotations

import contextlib
import heapq
import re
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING

from streamshard.disk.direct import CHUNK_NBYTES
from streamshard.disk.system import system
from streamshard.engine.option_values import MAX_WORKERS, PROCESS_NBYTES, check_workers
from streamshard.engine.shard_task import parts_of
from streamshard.engine.workers import SENDERS
from streamshard.errors import UsageError, both_bytes
from streamshard.limits import fitting, group_room, processors
from streamshard.tensors.kernel import chosen
from streamshard.tensors.workspace import Held
from streamshard.values import frozen

if TYPE_CHECKING:
    from streamshard.checkpoint.shards import Shard

__all__ = [
    "Needs",
    "goes_around_cache",
    "peak_rss_bytes",
    "worker_count",
    "workers_or_default",
]


DEFAULT_WORKERS = 8
# Measured: what a plan has of each tensor, and a worker's blocks in fp32 and fp64.
_TENSOR_NBYTES = 1000
_CLIENT_NBYTES = 35_000_000  # of a hub, with its connections and what comes by them
_WORKER_NBYTES = 4_000_000
_READER_NBYTES = 6_000_000
# Where writing goes around the page cache: chunks that are being written, and those that have a place
# for the ends of tensors.
_DIRECT_NBYTES = (SENDERS + 1) * CHUNK_NBYTES
_DIRECT_WORKER_NBYTES = 3 * CHUNK_NBYTES
_SMALL_NBYTES = 16_000_000  # so little is written that nothing has to make way for it


@frozen
class Needs:
    """What the tensors of a run need of memory, found in one walk over them."""

    process: int
    shared: tuple[int, ...]
    """What is kept as a whole for all workers, the largest first."""
    own: tuple[int, ...]
    """What single workers need for a tensor or a part of one, the largest first."""

    @classmethod
    def of(cls, shards: Sequence[Shard], *, hub: bool = False) -> Needs:
        """Those of all tensors of these files; `hub` if inputs are from one, or the output goes there."""
        held: dict[int, int] = {}
        tensors = 0
        # There may be fewer parts of large ones than workers.
        own = [0] * MAX_WORKERS
        for shard in shards:
            tensors += len(shard.tensors)
            for tensor in shard.tensors.values():
                nbytes = tensor.buffer_nbytes()
                if nbytes > own[0]:
                    for _ in range(min(parts_of(tensor), MAX_WORKERS)):
                        heapq.heappushpop(own, nbytes)
                for node in tensor.held():
                    held[id(node)] = node.nbytes
        shared = heapq.nlargest(Held.count_for(MAX_WORKERS), held.values())
        process = PROCESS_NBYTES + tensors * _TENSOR_NBYTES + hub * _CLIENT_NBYTES
        return cls(process, tuple(shared), tuple(sorted(own, reverse=True)))

    def nbytes(self, workers: int, *, direct: bool = False) -> int:
        """About how many bytes of resident memory so many workers take at most."""
        each = _WORKER_NBYTES + direct * _DIRECT_WORKER_NBYTES
        held = sum(self.shared[: Held.count_for(workers)]) + sum(self.own[:workers])
        return self.process + direct * _DIRECT_NBYTES + held + workers * each


def worker_count(
    needs: Needs, workers: int | None, max_memory: int | None, *, direct: bool = False
) -> int:
    """How many threads to use: as asked, else one a processor, fewer for a memory budget.

    Fewer also where a limit of this process leaves room for fewer. Raises `UsageError` if the budget
    does not allow a single one, `OutOfMemoryError` if such a limit does not.
    """
    count, one = _asked(workers), needs.nbytes(1, direct=direct)
    if max_memory is not None:
        if one > max_memory:
            allowed, needed = both_bytes(max_memory, one)
            raise UsageError(
                f"--max-memory is {allowed}, but one worker needs about {needed} for "
                "this model and adapter. Allow more, or leave the option out."
            )
        while needs.nbytes(count, direct=direct) > max_memory:
            count -= 1
    return fitting(count, one - needs.nbytes(0, direct=direct), blas=chosen() == "numpy")


def workers_or_default(workers: int | None) -> int:
    """How many threads that only read: as asked, else one a processor; fewer under a limit of memory.

    Raises `UsageError` for an absurd number, `OutOfMemoryError` if there is no room for one.
    """
    return fitting(_asked(workers), _READER_NBYTES)


def _asked(workers: int | None) -> int:
    check_workers(workers)
    return workers or min(processors(), DEFAULT_WORKERS)


def goes_around_cache(io: str, nbytes: int, needs: Needs, max_memory: int | None = None) -> bool:
    """Whether files of `nbytes` are written around the page cache, with that `--io`.

    By default if they are more than a sixteenth of the memory that is free. The cache is good for those
    who read the output next, but takes twice the processor time to write, and what others have in it
    would have to go; before a tenth of it is to be written, Linux begins to write in any case.
    """
    if io != "auto" or nbytes < _SMALL_NBYTES:
        return io == "direct"
    if max_memory is not None and needs.nbytes(1, direct=True) > max_memory:
        return False
    free, group = _free_memory(), group_room()
    return nbytes > (free if group is None else min(free, group)) // 16


def _free_memory() -> int:
    """Bytes of memory that programs could have."""
    with contextlib.suppress(OSError):  # psutil reads the same, but takes a while to be imported
        found = re.search(r"MemAvailable:\s*(\d+) kB", system.read_text("/proc/meminfo"))
        if found is not None:
            return int(found[1]) * 1024
    import psutil

    return int(psutil.virtual_memory().available)


def peak_rss_bytes() -> int:
    """The largest resident memory of this process so far, in bytes."""
    if sys.platform == "win32":
        import psutil

        return int(psutil.Process().memory_info().peak_wset)
    with contextlib.suppress(OSError):
        # Where there is one: a process that was started by a large one inherits its `ru_maxrss`.
        peak = re.search(r"VmHWM:\s*(\d+) kB", system.read_text("/proc/self/status"))
        if peak is not None:
            return int(peak[1]) * 1024
    import resource

    used = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return used if sys.platform == "darwin" else used * 1024
