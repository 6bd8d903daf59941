"""An output appears complete or not at all: it is built beside its place and renamed there.

For an output NAME there may be, beside it: `.NAME.partial`, where it is built, with the journal of
what is finished; `.NAME.old`, what it replaces, between two renames; and `.NAME.lock`.

Nothing but our own is continued, replaced or removed: what is in `.NAME.partial` must be listed by the
journal there (or, right before the end, by the record), `.NAME.old` must be the folder that a run has
noted in the lock, and a replaced output is what its own record lists. The folder in which a run
builds is held open: putting something else in its place leads no call elsewhere.
"""

from __future__ import annotations

import contextlib
import functools
import logging
from collections.abc import Callable, Collection, Iterator
from pathlib import Path

from streamshard.checkpoint.file_names import JOURNAL_NAME
from streamshard.disk import folders
from streamshard.disk.folders import exists, held, inode_of, remove_empty, sync_folder
from streamshard.disk.held import Held
from streamshard.disk.remote_digest import WrongDigestError
from streamshard.disk.system import system, writing
from streamshard.engine.beside_output import places_beside
from streamshard.engine.claims import (
    Replaceable,
    check_replaceable,
    recorded_names,
    remove_listed,
    replaceable,
    strangers,
)
from streamshard.engine.fingerprint import Identity
from streamshard.engine.journal import Journal
from streamshard.engine.leftovers import Left, changed, left_in, refuse_strangers
from streamshard.engine.lock import Lock, locked
from streamshard.engine.ours import Ours
from streamshard.engine.parts_folder import refuse_parts
from streamshard.engine.staging_folder import Staging
from streamshard.engine.swap import discard, recover, swap
from streamshard.errors import (
    ChangedError,
    HubError,
    OutputError,
    ReadError,
    StreamshardError,
    WriteError,
    add_to,
    listed,
    printable,
)

__all__ = ["Staging", "output_folder", "place_completed"]

_log = logging.getLogger(__name__)


@contextlib.contextmanager
def output_folder(
    target: Path,
    plan: Identity,
    *,
    names: Collection[str],
    overwrite: bool,
    adopt: Callable[[Staging], None] | None = None,
    keeps: bool = True,
) -> Iterator[Staging]:
    """A staging folder that takes the place of `target` when the block succeeds.

    Unless it `keeps` what was written: then it is removed. `names` are all files that may be made in it,
    relative to it. If a run with the same `plan` was interrupted, its staging folder is continued;
    `adopt` puts there what the parts of the output have finished. Whatever happens, `target` is either as
    it was or complete. What is finished is kept if the block ends by a signal or because a disk failed;
    otherwise nothing is left. Raises `OutputError` if `target` is more than an empty folder and not to be
    overwritten, or is not ours, if another run writes it, if it was begun with another plan, or if
    something that no run of ours has made is in the way.
    """
    target = folders.resolved(target)
    beside = places_beside(target)
    with writing(target, 0):
        made = folders.make_folders(target.parent)
    try:
        for folder in made:
            sync_folder(folder.parent)
        with locked(beside["lock"], target) as lock:
            recover(target, beside, lock)
            there = _check_free(target, overwrite=overwrite)
            if adopt is None:
                refuse_parts(target, overwrite=overwrite)
            with _opened(beside["partial"]) as (kept, ours):
                left = left_in(kept, ours, lock.moved)
                staging = _begun(kept, left, target, plan, names, overwrite=overwrite)
                lock.settle()
                replaces = functools.partial(_replaced, target, there=there, overwrite=overwrite)
                if keeps:
                    yield from _built(staging, target, beside["old"], lock, replaces, adopt)
                else:
                    yield from _sent(staging, lock, adopt)
    except BaseException:
        remove_empty(made)
        raise


def place_completed(target: Path, *, overwrite: bool, is_complete: Callable[[Path], bool]) -> None:
    """Give an output its name that was complete when a run was killed, or lost its disk, right before.

    There is no journal then, or one that is not to be relied on: that the lock notes this folder says
    that all of it was written, and `is_complete` whether all of it is still there and wanted. Raises
    what `output_folder` does.
    """
    target = folders.resolved(target)
    beside = places_beside(target)
    if not (exists(beside["lock"]) and exists(beside["partial"])):
        return
    with locked(beside["lock"], target) as lock:
        recover(target, beside, lock)
        found = inode_of(beside["partial"])
        if found is None or lock.moved is None or found[1] != lock.moved[1]:
            return
        there = _check_free(target, overwrite=overwrite)
        with _opened(beside["partial"]) as (kept, ours):
            path = Path(kept.path)
            if not is_complete(path) or strangers(
                path, {*recorded_names(path), JOURNAL_NAME}, ours
            ):
                return
            staging = Staging(kept, Journal(path, ours))
            with (
                writing(target, 0),
                _replaced(target, there=there, overwrite=overwrite) as replaced,
            ):
                _place(staging, target, beside["old"], lock, replaced)
                _placed(target, beside["old"], replaced)
        lock.settle()


def _check_free(target: Path, *, overwrite: bool) -> bool:
    """Whether there is something that may be replaced; `OutputError` if it may not be."""
    there = exists(target)
    if there:
        check_replaceable(target, overwrite=overwrite)
    return there


@contextlib.contextmanager
def _opened(folder: Path) -> Iterator[tuple[Held, Ours]]:
    """The folder in which an output is built, held; made if there is none."""
    ours = Ours(folder.parent)
    with writing(folder, 0), contextlib.suppress(FileExistsError):
        system.mkdir(folder)
    ours.check_folder(folder)
    with held(folder, lambda found: ours.check(found, folder, folder=True)) as kept:
        yield kept, ours


def _begun(
    folder: Held,
    left: Left,
    target: Path,
    plan: Identity,
    names: Collection[str],
    *,
    overwrite: bool,
) -> Staging:
    """What an earlier run has left, if it can be continued, or a new beginning."""
    path, journal = Path(folder.path), left.journal
    refuse_strangers(path, left.strangers)
    if journal.plan is None or changed(target, path, journal.plan, plan, overwrite=overwrite):
        remove_listed(path, left.names, last=left.last)
        journal = Journal(path, left.ours)
    staging = Staging(folder, journal)
    try:
        if journal.plan is None:
            journal.begin(plan, {*names, JOURNAL_NAME})
        else:
            journal.open()
        staging.clear()
        sync_folder(path)
        sync_folder(path.parent)
    except BaseException as error:
        _leave(staging, error)
        staging.close()
        raise
    return staging


def _built(
    staging: Staging,
    target: Path,
    old: Path,
    lock: Lock,
    replaces: Callable[[], contextlib.AbstractContextManager[Replaceable | None]],
    adopt: Callable[[Staging], None] | None,
) -> Iterator[Staging]:
    placed = False
    try:
        if adopt is not None:
            adopt(staging)
        yield staging
        with writing(target, 0), replaces() as replaced:
            staging.check_content()
            _place(staging, target, old, lock, replaced)
            placed = True
            _placed(target, old, replaced)
        lock.settle()
    except BaseException as error:
        _tell(staging, target, old, lock, error, placed=placed)
        raise
    finally:
        staging.close()


def _place(
    staging: Staging, target: Path, old: Path, lock: Lock, replaced: Replaceable | None
) -> None:
    """Give what was built its name."""
    lock.note(None if replaced is None else replaced.inode, staging.inode)
    sync_folder(target.parent)  # the note must be there if what is moved now is not
    staging.remove_journal()
    staging.check_place()
    swap(staging.folder, staging.inode, target, old, replaced)


def _placed(target: Path, old: Path, replaced: Replaceable | None) -> None:
    """Have it on disk, and remove what was replaced."""
    sync_folder(target.parent)
    if replaced is not None:
        discard(old, replaced.inode, replaced.names, target)


def _sent(
    staging: Staging, lock: Lock, adopt: Callable[[Staging], None] | None
) -> Iterator[Staging]:
    """Have everything removed once it is elsewhere."""
    gone = False
    try:
        if adopt is not None:
            adopt(staging)
        yield staging
        with writing(staging.folder, 0):
            staging.check_place()
            stays = staging.discard()
        if stays:
            where = printable(str(staging.folder))
            _log.warning("%s stays: there is %s, which is not ours", where, listed(stays))
        gone = True
        lock.settle()
    except BaseException as error:
        if not gone and _leave(staging, error):
            with contextlib.suppress(WriteError):
                lock.settle()
        raise
    finally:
        staging.close()


def _replaced(
    target: Path, *, there: bool, overwrite: bool
) -> contextlib.AbstractContextManager[Replaceable | None]:
    """What is to be replaced, held until it is; None if nothing is, or was when the run began."""
    if (there or overwrite) and exists(target):
        return replaceable(target, overwrite=overwrite)
    return contextlib.nullcontext()


def _tell(
    staging: Staging, target: Path, old: Path, lock: Lock, error: BaseException, *, placed: bool
) -> None:
    """Say in an error what there is now, after having kept or removed what is finished."""
    # A rename may have been done and yet be told as failed, as on NFS.
    if placed or _is_at(staging, target):
        add_to(error, f"{printable(str(target))} is complete.")
        if not isinstance(error, OutputError) and _is_moved(old, lock):
            add_to(error, f"What it replaced, {printable(str(old))}, the next run removes.")
        return
    left = _leave(staging, error)
    if _is_moved(old, lock) is not False:
        add_to(error, f"What was there, {printable(str(old))}, the next run puts back.")
    elif left:
        with contextlib.suppress(WriteError):
            lock.settle()


def _is_moved(old: Path, lock: Lock) -> bool | None:
    """Whether what was to be replaced has this name; None if the disk does not even tell that."""
    if lock.moved is None or lock.moved[0] is None:
        return False
    try:
        found = inode_of(old)
    except WriteError:
        return None
    return found is not None and found[1] == lock.moved[0]


def _is_at(staging: Staging, path: Path) -> bool | None:
    """Whether what was built has this name; None if the disk does not even tell that."""
    try:
        return staging.is_at(path)
    except WriteError:
        return None


def _leave(staging: Staging, error: BaseException) -> bool:
    """Keep what can be continued, and say so in the error; remove everything else.

    Returns whether that could be done.
    """
    where = printable(str(staging.folder))
    # Not if the same would happen again, nor what is of an input that is no longer there.
    passing = isinstance(error, (OutputError, ReadError, WriteError, HubError, MemoryError))
    passing = passing and not isinstance(error, (ChangedError, WrongDigestError))
    keeps = (passing or not isinstance(error, Exception)) and staging.finished
    if _is_at(staging, staging.folder) is False:
        add_to(error, f"What was written was not removed: it is where {where} was moved.")
        return False
    stays: list[str] = []
    done = False
    with contextlib.suppress(OSError, StreamshardError):
        if keeps:
            staging.clear()
        else:
            stays = staging.discard()
        done = True
    if keeps:
        text = (
            f"What is finished ({len(staging.finished)} of the weight files) is kept in {where}: run "
            "the same command again to continue, or remove that folder."
        )
    elif not done:
        text = f"{where} cannot be removed now; the next run does that."
    else:
        text = f"{where} stays: there is {listed(stays)}, which is not ours." if stays else ""
    add_to(error, text)
    return done
