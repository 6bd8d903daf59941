"""An output takes its place: what was there is renamed away, and removed when the new one is there.

Between the two renames a run may be killed; the lock then notes which folder was moved, and which was
to take its place, so that the next run can finish or undo that and touches nothing else.
"""

from __future__ import annotations

import errno
from collections.abc import Mapping
from pathlib import Path

from streamshard.checkpoint.file_names import REPORT_NAME
from streamshard.disk.folders import exists, held, inode_of, sync_folder
from streamshard.disk.held import Inode
from streamshard.disk.system import system, writing
from streamshard.engine.claims import Replaceable, recorded_names, remove_listed
from streamshard.engine.lock import Lock
from streamshard.errors import InputError, OutputError, WriteError, listed, printable

__all__ = ["discard", "recover", "refuse_old", "swap"]


_TAKEN = {errno.ENOTEMPTY, errno.EEXIST, errno.ENOTDIR}


def swap(folder: Path, built: Inode, target: Path, old: Path, replaced: Replaceable | None) -> None:
    """Give the folder that was `built` its name, and another to what has that and is `replaced`."""
    if replaced is not None:
        refuse_old(old)
    try:
        if replaced is not None:
            replaced.check()
            system.rename(target, old)
            _check_is(replaced.inode, old, target)
        _place(folder, built, target)
    except BaseException as error:
        if replaced is not None and exists(old) and not exists(target):
            system.rename(old, target)
        if isinstance(error, OSError) and error.errno in _TAKEN:
            raise _appeared(target) from error
        raise


def _place(folder: Path, built: Inode, target: Path) -> None:
    # Fails if something else has been put there in the meantime.
    system.rename(folder, target)
    try:
        _check_is(built, target, target)
    except OutputError:  # something else had been put in the place of what was built
        if not exists(folder):
            system.rename(target, folder)
        raise


def _check_is(expected: Inode, path: Path, target: Path) -> None:
    """Raise `OutputError` if what was renamed to `path` was not what should have been."""
    if inode_of(path) != expected:
        raise _appeared(target)


def _appeared(target: Path) -> OutputError:
    return OutputError(
        f"{printable(str(target))}: appeared while this run was writing. Choose another output."
    )


def refuse_old(old: Path) -> None:
    """Raise `OutputError` if something has the name to which a replaced output is moved."""
    if exists(old):
        raise OutputError(
            f"{printable(str(old))}: is where an output that is replaced is kept meanwhile, and no "
            "interrupted run is known to have put this there. It was left alone: move or remove it, or "
            "choose another output."
        )


def recover(target: Path, beside: Mapping[str, Path], lock: Lock) -> None:
    """Finish or undo what a run was doing that was killed while it replaced an output."""
    old = beside["old"]
    with writing(target, 0):
        found = inode_of(old)
        if found is not None:
            before, after = lock.moved or (None, None)
            if found[1] != before:
                refuse_old(old)
            there = inode_of(target)
            if there is None:
                system.rename(old, target)
                sync_folder(target.parent)
            elif there[1] == after:
                discard(old, found, _names_left(old), target)
            else:
                raise OutputError(
                    f"{printable(str(target))}: {printable(str(old))} is what an interrupted run was "
                    "replacing, and something else is in its place now. Remove one of the two."
                )
        if not exists(beside["partial"]):  # of which the note may tell whose it is
            lock.settle()


def _names_left(old: Path) -> set[str]:
    """The files of a replaced output; none if so much is removed already that there is no record."""
    with held(old):
        try:
            return recorded_names(old)
        except InputError:
            return set()


def discard(old: Path, inode: Inode, names: set[str], target: Path) -> None:
    """Remove a replaced output; what is not of it stays, and is told."""
    try:
        with held(old) as folder:
            if folder.inode != inode:  # it is not what was moved there
                refuse_old(old)
            stays = remove_listed(old, names, last=REPORT_NAME)
            if not stays:
                system.rmdir(old)
        sync_folder(target.parent)
    except OSError as error:
        raise WriteError(
            f"{printable(str(old))}: cannot be removed: {error.strerror}. Check permissions and disk."
        ) from error
    if stays:
        raise OutputError(
            f"{printable(str(old))}: holds {listed(stays)}, which has come there since and is not "
            "removed: move it away, and remove that folder."
        )
