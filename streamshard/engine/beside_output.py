"""What lies beside an output: where it is built, what it replaces, its lock.

And what a killed run may have left there.
"""

from __future__ import annotations

import contextlib
import errno
import stat
from collections.abc import Callable, Collection, Iterator, Mapping
from pathlib import Path
from typing import NamedTuple

from streamshard.disk.folders import exists, held, inode_of, resolved
from streamshard.disk.system import system, writing
from streamshard.engine import long_names
from streamshard.engine.fingerprint import Identity
from streamshard.engine.journal import Elsewhere
from streamshard.engine.leftovers import changed, left_in, refuse_strangers
from streamshard.engine.lock import Moved, locked, look
from streamshard.engine.ours import Ours
from streamshard.engine.swap import recover, refuse_old
from streamshard.errors import InputError, StreamshardError, WriteError

__all__ = [
    "Kept",
    "check_beside",
    "check_writable",
    "finished_beside",
    "places_beside",
    "staged_nbytes",
    "tidy",
]


class Kept(NamedTuple):
    """What an interrupted run has left that the same run would keep."""

    finished: Collection[str] = ()
    """Files that are finished, by name."""
    elsewhere: Mapping[str, Elsewhere] = {}
    """What was noted of stores that they are sent to."""


def places_beside(target: Path) -> dict[str, Path]:
    """Where an output is built, where what it replaces is kept meanwhile, its lock, and its parts."""
    return {
        what: target.with_name(long_names.beside(".", target.name, f".{what}"))
        for what in ("partial", "old", "lock", "parts")
    }


def staged_nbytes(target: Path) -> int:
    """Bytes that an earlier run has left where `target` is built."""
    beside = places_beside(resolved(target))
    nbytes = 0
    for folder in (beside["parts"], beside["partial"]):  # the way that files are moved by others
        with writing(folder, 0), contextlib.suppress(FileNotFoundError):
            if stat.S_ISDIR(system.lstat(folder).st_mode):
                for name in system.listdir(folder):
                    with contextlib.suppress(FileNotFoundError):  # a run may be at it just now
                        nbytes += system.lstat(folder / name).st_size
    return nbytes


def tidy(target: Path) -> None:
    """Remove what a run that was killed at its very end has left beside a complete output."""
    with contextlib.suppress(StreamshardError):
        beside = places_beside(resolved(target))
        if exists(beside["lock"]):
            with locked(beside["lock"], target) as lock:
                recover(target, beside, lock)


def check_beside(target: Path, identity: Callable[[], Identity], *, overwrite: bool) -> Kept:
    """What an interrupted run has finished and a run with this identity would keep.

    Changes nothing. Raises `OutputError` as that run would: if something that is not ours is in the way,
    if another run is at it, or if what an interrupted run has left cannot be continued.
    """
    beside = places_beside(resolved(target))
    moved = None
    with _nobody_else():
        moved = look(beside["lock"], target)
        there = inode_of(beside["old"])
        if there is not None and (moved is None or there[1] != moved[0]):
            refuse_old(beside["old"])
    return finished_beside(target, identity, overwrite=overwrite, moved=moved)


def finished_beside(
    target: Path, identity: Callable[[], Identity], *, overwrite: bool, moved: Moved | None = None
) -> Kept:
    """The like of the folder alone in which the output is built, whoever is at it just now."""
    beside = places_beside(resolved(target))
    with _nobody_else():
        if exists(beside["partial"]):
            ours = Ours(resolved(target).parent)
            ours.check_folder(beside["partial"])
            with held(beside["partial"]) as kept:
                left = left_in(kept, ours, moved)
                refuse_strangers(beside["partial"], left.strangers)
                # The identity takes a look at every input, which only this is worth.
                if left.journal.plan is not None and not changed(
                    target, beside["partial"], left.journal.plan, identity(), overwrite=overwrite
                ):
                    return Kept(left.journal.finished, left.journal.elsewhere)
    return Kept()


@contextlib.contextmanager
def _nobody_else() -> Iterator[None]:
    """What a run that is at it just now removes counts as not there."""
    try:
        yield
    except (InputError, WriteError) as error:
        if not isinstance(error.__cause__, FileNotFoundError):
            raise


def check_writable(target: Path) -> None:
    """Raise `WriteError` if nothing can be made where an output is to be; makes nothing itself."""
    folder = resolved(target).parent
    while not exists(folder) and folder != folder.parent:
        folder = folder.parent
    with writing(folder, 0):
        if not stat.S_ISDIR(system.stat(folder).st_mode):
            raise NotADirectoryError(errno.ENOTDIR, "is no folder", str(folder))
        if not system.may_change(folder):
            raise PermissionError(errno.EACCES, "nothing can be made in this folder", str(folder))
