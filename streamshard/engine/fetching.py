"""What is far is fetched before it is read: how much that is, whether there is room, and doing it."""

from __future__ import annotations

import itertools
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path

from streamshard.checkpoint.shards import Shard
from streamshard.disk.existence import found
from streamshard.disk.far import Far, far_at, is_any
from streamshard.disk.folders import disk_free, exists
from streamshard.disk.together import together
from streamshard.engine.workers import OnStep, Stop
from streamshard.errors import HubError, WriteError, both_bytes, printable
from streamshard.tensors.lazy import Lazy, Stored
from streamshard.values import frozen

__all__ = ["Fetching", "far_among", "fetch", "fetching", "read_by", "stored", "wrong"]

AT_ONCE = 4


@frozen
class Fetching:
    """Files that are far and are to be fetched; all of them into one store."""

    files: Sequence[Far] = ()

    @property
    def nbytes(self) -> int:
        """How many bytes that are."""
        return sum(file.nbytes for file in self.files)

    @property
    def free_nbytes(self) -> int | None:
        """How many may be written where they are put; None if nothing is, or the disk does not tell."""
        return disk_free(self.files[0].store) if self.files else None

    def check_room(self, output: Path | None = None, output_nbytes: int = 0) -> None:
        """Raise `WriteError` if there is no room for them, and, on the same disk, for an output."""
        free = self.free_nbytes
        if free is None:
            return
        store = self.files[0].store
        both = output is not None and _device(store) == _device(output)
        needed = self.nbytes + (output_nbytes if both else 0)
        if needed > free:
            beside = f" and written to {printable(str(output))}, on the same disk," if both else ""
            wanted, there = both_bytes(needed, free)
            raise WriteError(
                f"{printable(str(store))}: {wanted} are to be downloaded{beside} but {there} "
                "are free. Free some space, choose another cache with --cache-dir, or read a base "
                "without storing it (--stream)."
            )

    def run(self, on_step: OnStep | None) -> None:
        """Fetch them, several at once; `on_step` is told how many of all bytes are done."""
        _each(self.files, lambda file, told: file.fetch(told), "downloading", on_step)


def _each(
    files: Sequence[Far],
    do: Callable[[Far, Callable[[int], None]], None],
    step: str,
    on_step: OnStep | None,
) -> None:
    """Do something with files, several at once, which tells of the bytes of each."""
    if not files:
        return
    total, done = sum(file.nbytes for file in files), 0
    lock, stop = threading.Lock(), Stop()

    def told(nbytes: int) -> None:
        nonlocal done
        stop.check()  # whoever is interrupted does not wait for the rest of a file
        with lock:
            done += nbytes
            if on_step is not None:
                on_step(step, total, done)

    told(0)
    try:
        together(files, lambda file: do(file, told), min(AT_ONCE, len(files)))
    except BaseException as error:
        stop.fail(error)
        raise


def stored(tensor: Lazy) -> Iterator[Stored]:
    """What a tensor is made of."""
    for one in tensor.inputs():
        yield one.tensor


def read_by(
    shards: Iterable[Shard], reference: Iterable[Lazy], files: Iterable[object]
) -> Iterator[str]:
    """The paths of everything that is read to write these shards and files, as often as it is."""
    tensors = itertools.chain(reference, *(shard.tensors.values() for shard in shards))
    yield from (one.path for tensor in tensors for one in stored(tensor))
    yield from (str(file) for file in files if isinstance(file, Path))


def fetching(paths: Iterable[str | Path]) -> Fetching:
    """Which of the files at these paths are to be fetched before much of them is read."""
    return Fetching([file for file in far_among(paths) if file.kept])


def fetch(paths: Iterable[str | Path], on_step: OnStep | None, *, check: bool = False) -> None:
    """Fetch what is far of the files at these paths, if there is room for it.

    With `check` copies that were here before are read whole, and must be what they are copies of;
    raises `HubError` if not.
    """
    files = far_among(paths)
    wanted = Fetching([file for file in files if file.kept])
    wanted.check_room()
    wanted.run(on_step)
    if check:
        problems = wrong(files, on_step)
        if problems:
            raise HubError(problems[0])


def wrong(files: Iterable[Far], on_step: OnStep | None) -> list[str]:
    """What is wrong with copies that were here before."""
    found: list[str] = []

    def look(file: Far, told: Callable[[int], None]) -> None:
        problem = file.wrong(told)
        if problem is not None:
            found.append(problem)

    _each([file for file in files if file.local() is not None], look, "checking", on_step)
    return sorted(found)


def far_among(paths: Iterable[str | Path]) -> list[Far]:
    """The files that these paths stand for."""
    if not is_any():  # then no path is asked for: there are some of each tensor
        return []
    return [*{str(path): file for path in paths if (file := far_at(path)) is not None}.values()]


def _device(path: Path) -> int | None:
    path = path.absolute()
    while not exists(path) and path != path.parent:
        path = path.parent
    there = found(path)
    return None if there is None else there.st_dev
