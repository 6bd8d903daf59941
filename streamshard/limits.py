"""The memory that this process may still take: asked before something dies of not getting it.

BLAS, for one, ends the process, or crashes, when it cannot have its buffers, and so does the kernel
when a container has taken all that it may. So before numpy or torch is imported, and before threads
start, the kernel is asked whether there is room for what they are known to take. Where there is no
limit the answer is yes, and costs microseconds.

That is why it stands outside of the rooms: the package's face and the command line ask here before any
room is imported, and it may import none.
"""

from __future__ import annotations

import contextlib
import errno
import functools
import mmap
import os
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

from streamshard.errors import OutOfMemoryError, bytes_text
from streamshard.values import frozen

if sys.platform != "win32":
    import resource

__all__ = [
    "STACK_NBYTES",
    "Need",
    "check_room",
    "fitting",
    "group_room",
    "import_numpy",
    "processors",
    "told",
]


Function = TypeVar("Function", bound=Callable[..., object])


@frozen
class Need:
    """Bytes of private memory, of addresses (with libraries), and of what is touched."""

    private: int
    mapped: int
    resident: int


# Measured with OpenBLAS, which numpy brings along.
_NUMPY = Need(44_000_000, 88_000_000, 16_000_000)
BLAS_NBYTES = 34_000_000
"""What OpenBLAS takes for each thread that multiplies; it touches a small part."""
STACK_NBYTES = 2 << 20
"""The stack of one of our threads; limits count all of it."""
_REST_NBYTES = 10_000_000
"""Our own modules, and the few others that they import later."""
_SPARE_NBYTES = 4_000_000


def told(function: Function) -> Function:
    """A public function that raises `OutOfMemoryError` whatever it was that ran out of memory."""

    @functools.wraps(function)
    def telling(*arguments: object, **options: object) -> object:
        try:
            return function(*arguments, **options)
        except OutOfMemoryError:
            raise
        except Exception as error:
            if not _is_shortage(error):
                raise
            raise OutOfMemoryError(_ended(error)) from error

    return telling  # type: ignore[return-value]


def _is_shortage(error: Exception) -> bool:
    if isinstance(error, OSError):
        return error.errno == errno.ENOMEM
    return isinstance(error, MemoryError) or (
        isinstance(error, RuntimeError) and "can't start new thread" in str(error)
    )


def _ended(error: Exception) -> str:
    how = str(error) or "an allocation failed"
    return f"not enough memory: {how}. {_advice()}"


def import_numpy() -> None:
    """Import numpy and have BLAS take its buffers, if that does not end the process.

    Raises `OutOfMemoryError` where a limit leaves too little room.
    """
    if (
        not _is_limited() or "streamshard.tensors.rounding" in sys.modules
    ):  # it was imported by then
        return
    need = Need(_REST_NBYTES + BLAS_NBYTES, _REST_NBYTES + BLAS_NBYTES, _REST_NBYTES)
    if "numpy" not in sys.modules:
        more = (_blas_threads() - 1) * (BLAS_NBYTES + _stack_nbytes())
        need = Need(
            need.private + _NUMPY.private + more,
            need.mapped + _NUMPY.mapped + more,
            need.resident + _NUMPY.resident,
        )
    check_room("numpy", need)
    import numpy as np

    square = np.ones((128, 128))
    np.matmul(square, square)


def check_room(what: str, need: Need) -> None:
    """Raise `OutOfMemoryError`, naming what for, if there is no room."""
    if not _has_room(need):
        raise OutOfMemoryError(f"not enough memory for {what}. {_advice(need)}")


def fitting(threads: int, nbytes: int, *, blas: bool = False) -> int:
    """How many of up to `threads` threads have room, each with buffers of `nbytes`.

    `blas` says that they multiply by it. Raises `OutOfMemoryError` if not even one has.
    """
    while threads > 1 and not _has_room(_of_threads(threads, nbytes, blas=blas)):
        threads -= 1
    if threads == 1:
        check_room("one worker", _of_threads(1, nbytes, blas=blas))
    return threads


def _of_threads(threads: int, nbytes: int, *, blas: bool) -> Need:
    buffers = threads * nbytes + _SPARE_NBYTES
    # One more thread waits for the disk. The first worker has the buffer that BLAS has already.
    private = buffers + (threads + 1) * STACK_NBYTES + (threads - 1) * BLAS_NBYTES * blas
    return Need(private, private, buffers)


def _has_room(need: Need) -> bool:
    if sys.platform == "win32":
        return True
    # The kernel itself is asked: it knows every limit on addresses and private memory, and whether
    # it may promise more than there is.
    asked = ((need.private, mmap.PROT_READ | mmap.PROT_WRITE), (need.mapped, mmap.PROT_READ))
    for nbytes, protection in asked:
        flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS
        try:
            mmap.mmap(-1, nbytes, flags=flags, prot=protection).close()
        except (OSError, MemoryError, OverflowError):
            return False
    group = group_room()
    return group is None or need.resident <= group


def _is_limited() -> bool:
    if sys.platform == "win32":
        return False
    return bool(_limits()) or group_room() is not None or _promises_no_more()


def _limits() -> list[tuple[str, str, int]]:
    """The limits of this process that are set: name, option of the shell's `ulimit`, bytes."""
    if sys.platform == "win32":
        return []
    known = (("RLIMIT_DATA", "-d"), ("RLIMIT_AS", "-v"))
    found = []
    for name, option in known:
        soft = resource.getrlimit(getattr(resource, name))[0]
        if soft != resource.RLIM_INFINITY:
            found.append((name, option, soft))
    return found


def _promises_no_more() -> bool:
    """Whether Linux was told to promise no more memory than there is."""
    with contextlib.suppress(OSError):
        return Path("/proc/sys/vm/overcommit_memory").read_text().strip() == "2"
    return False


def _advice(need: Need | None = None) -> str:
    """Which limits there are, how much is taken, what is needed, and what to do."""
    known = {"RLIMIT_DATA": ("VmData", "private"), "RLIMIT_AS": ("VmSize", "mapped")}
    parts = []
    for name, option, limit in _limits():
        key, kind = known[name]
        taken = _status(key)
        part = f"{name} (ulimit {option}) is {bytes_text(limit)}"
        if taken is not None:
            part += f", {bytes_text(taken)} are taken"
            if need is not None:
                part += f", and about {bytes_text(taken + getattr(need, kind))} must be allowed"
        parts.append(part)
    room = group_room()
    if room is not None:
        part = f"the control group of this process has room for {bytes_text(room)}"
        parts.append(
            part if need is None else f"{part}, about {bytes_text(need.resident)} are needed"
        )
    told_limits = "".join(f" {part[:1].upper()}{part[1:]}." for part in parts)
    return (
        f"{told_limits} Allow more, or use fewer --workers, and run the same command again.".strip()
    )


def _status(key: str) -> int | None:
    with contextlib.suppress(OSError, MemoryError):
        found = re.search(rf"{key}:\s*(\d+) kB", Path("/proc/self/status").read_text())
        return int(found[1]) * 1024 if found else None
    return None


def processors() -> int:
    """How many of them this process may use."""
    try:
        return len(os.sched_getaffinity(0))
    except AttributeError:  # macOS, Windows
        return os.cpu_count() or 1


def _blas_threads() -> int:
    """How many threads OpenBLAS will have: as many as its environment or the processors say."""
    for name in ("OPENBLAS_NUM_THREADS", "OMP_NUM_THREADS"):
        text = os.environ.get(name, "")
        if text.isdecimal() and int(text):
            return min(int(text), 64)
    return min(os.cpu_count() or 1, 64)


def _stack_nbytes() -> int:
    soft = resource.getrlimit(resource.RLIMIT_STACK)[0] if sys.platform != "win32" else 0
    return 8 << 20 if soft in (0, -1) else soft


# --- control groups of Linux ----------------------------------------------------------------------

_GROUPS = Path("/sys/fs/cgroup")
_MEMBERSHIP = Path("/proc/self/cgroup")
# In version 2 and 1: the limit, what is taken, and what of that the kernel gives up when asked to.
_V2 = ("memory.max", "memory.current", ("inactive_file", "active_file", "slab_reclaimable"))
_V1 = (
    "memory.limit_in_bytes",
    "memory.usage_in_bytes",
    ("total_inactive_file", "total_active_file"),
)
_UNLIMITED = 1 << 60  # version 1 writes a huge number where there is no limit


def group_room() -> int | None:
    """Bytes that the control groups of this process leave; None where no limit can be read."""
    if sys.platform != "linux":
        return None
    rooms = []
    with contextlib.suppress(OSError, ValueError):
        for line in _MEMBERSHIP.read_text().splitlines():
            _, controllers, path = line.split(":", 2)
            if not controllers:
                rooms += _rooms(_GROUPS, path, _V2)
            elif "memory" in controllers.split(","):
                rooms += _rooms(_GROUPS / "memory", path, _V1)
    return min(rooms, default=None)


def _rooms(root: Path, path: str, files: tuple[str, str, tuple[str, ...]]) -> list[int]:
    """What the group at `path` leaves, and each of those around it."""
    group = root / path.lstrip("/")
    rooms = []
    # Within a container the path may be that of the host, which is not there: its root is ours.
    for folder in (group, *group.parents):
        if not folder.is_relative_to(root):
            break
        with contextlib.suppress(OSError, ValueError):
            limit = int((folder / files[0]).read_text())  # "max" is none
            if limit < _UNLIMITED:
                taken = int((folder / files[1]).read_text())
                counts = dict(
                    line.split(" ", 1) for line in (folder / "memory.stat").read_text().splitlines()
                )
                kept = sum(int(counts.get(key, 0)) for key in files[2])
                rooms.append(max(limit - taken + kept, 0))
    return rooms
