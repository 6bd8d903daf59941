"""An output appears complete or not at all: it is built beside its place and renamed there.

For an output NAME there may be, beside it: `.NAME.partial`, where it is built, with the journal of
what is finished; `.NAME.old`, what it replaces, between two renames; and `.NAME.lock`.
"""

from __future__ import annotations

import contextlib
import errno
import json
from collections.abc import Iterator, Mapping
from pathlib import Path

from streamshard.errors import (
    ChangedError,
    OutputError,
    ReadError,
    StreamshardError,
    WriteError,
    printable,
)
from streamshard.files import (
    exists,
    make_folders,
    remove_empty,
    remove_tree,
    sync_folder,
    system,
    writing,
)
from streamshard.identity import Identity, differences
from streamshard.journal import JOURNAL_NAME, FinishedShard, Journal
from streamshard.locks import locked
from streamshard.report import REPORT_NAME

__all__ = ["Staging", "output_folder", "places_beside", "staged_nbytes", "tidy"]


class Staging:
    """A folder in which an output is built, and what an earlier run has finished of it."""

    def __init__(self, folder: Path, journal: Journal) -> None:
        self.folder = folder
        self._journal = journal

    @property
    def finished(self) -> Mapping[str, FinishedShard]:
        """The shards that are finished, by name; their content is for the reader to check."""
        return self._journal.finished

    def add(self, shard: FinishedShard) -> None:
        """Note that a shard is finished and on disk."""
        self._journal.add(shard)

    def forget(self, name: str) -> None:
        """Remove a shard whose content is not what was noted."""
        self._journal.finished.pop(name, None)
        with writing(self.folder / name, 0), contextlib.suppress(FileNotFoundError):
            system.unlink(self.folder / name)

    def clear(self) -> None:
        """Remove everything but the journal and finished shards."""
        if not exists(self._journal.path):
            self._journal.restore()
        keep = {JOURNAL_NAME, *self._journal.finished}
        for name in system.listdir(self.folder):
            if name not in keep:
                remove_tree(self.folder / name)

    def remove_journal(self) -> None:
        """Remove the journal, which a complete output does not have."""
        self.close()
        system.unlink(self._journal.path)
        sync_folder(self.folder)

    def close(self) -> None:
        """Close the journal."""
        self._journal.close()


def places_beside(target: Path) -> dict[str, Path]:
    """Where an output is built, where what it replaces is kept meanwhile, and its lock."""
    return {what: target.with_name(f".{target.name}.{what}") for what in ("partial", "old", "lock")}


def staged_nbytes(target: Path) -> int:
    """Bytes that an earlier run has left where `target` is built."""
    folder = places_beside(target.resolve())["partial"]
    nbytes = 0
    with writing(folder, 0), contextlib.suppress(FileNotFoundError):  # a run may be at it just now
        for name in system.listdir(folder):
            nbytes += system.lstat(folder / name).st_size
    return nbytes


@contextlib.contextmanager
def output_folder(target: Path, plan: Identity, *, overwrite: bool) -> Iterator[Staging]:
    """A staging folder that takes the place of `target` when the block succeeds.

    If a run with the same `plan` was interrupted, its staging folder is continued. Whatever happens,
    `target` is either as it was or complete. What is finished is kept if the block ends by a signal
    or because a disk failed; otherwise nothing is left. Raises `OutputError` if `target` exists and is
    not to be overwritten, if another run writes it, or if it was begun with another plan.
    """
    target = target.resolve()  # "." has no name
    beside = places_beside(target)
    with writing(target, 0):
        made = make_folders(target.parent)
    try:
        for folder in made:
            sync_folder(folder.parent)
        with locked(beside["lock"], target):
            _recover(target, beside["old"])
            _check_free(target, overwrite=overwrite)
            staging = _open(beside["partial"], target, plan, overwrite=overwrite)
            yield from _built(staging, target, beside["old"], overwrite=overwrite)
    except BaseException:
        remove_empty(made)
        raise


def tidy(target: Path) -> None:
    """Remove what a run that was killed at its very end has left beside a complete output."""
    beside = places_beside(target.resolve())
    with contextlib.suppress(StreamshardError):
        if exists(beside["lock"]) or exists(beside["old"]):
            with locked(beside["lock"], target):
                _recover(target, beside["old"])


def _check_free(target: Path, *, overwrite: bool) -> None:
    if exists(target) and not overwrite:
        raise OutputError(
            f"{printable(str(target))}: exists. Choose another output, or pass --overwrite."
        )


def _open(folder: Path, target: Path, plan: Identity, *, overwrite: bool) -> Staging:
    with writing(folder, 0):
        if folder.is_symlink():
            raise OutputError(
                f"{printable(str(folder))}: is a symbolic link where {printable(str(target))} is to be "
                "built. Remove it."
            )
        if not exists(folder):
            system.mkdir(folder)
    plan = json.loads(json.dumps(plan))
    journal = Journal(folder)
    if journal.plan is not None and (changed := differences(journal.plan, plan)):
        if not overwrite:
            shown = "; ".join(changed[:5]) + (f"; and {len(changed) - 5} more" * (len(changed) > 5))
            raise OutputError(
                f"{printable(str(target))}: an interrupted run left {printable(str(folder))}, which "
                f"cannot be continued: {shown}. Run the same command as then to continue it, or remove "
                "that folder (or pass --overwrite) to begin anew."
            )
        # The journal goes first: without it nothing counts as finished.
        with writing(folder, 0):
            system.unlink(journal.path)
            sync_folder(folder)
        journal = Journal(folder)
    staging = Staging(folder, journal)
    try:
        journal.open(plan)
        with writing(folder, 0):
            staging.clear()
        sync_folder(folder)
        sync_folder(folder.parent)
    except BaseException as error:
        staging.close()
        _leave(staging, error)
        raise
    return staging


def _built(staging: Staging, target: Path, old: Path, *, overwrite: bool) -> Iterator[Staging]:
    placed = False
    try:
        yield staging
        with writing(target, 0):
            staging.remove_journal()
            _swap(staging.folder, target, old, overwrite=overwrite)
            placed = True
            sync_folder(target.parent)
        _discard(old, target)
    except BaseException as error:
        # A rename may have been done and yet be told as failed, as on NFS.
        if placed or _is_there(staging.folder) is False:
            _add_to(error, f"{printable(str(target))} is complete.")
            if _is_there(old):
                _add_to(error, f"What it replaced, {printable(str(old))}, the next run removes.")
        else:
            _leave(staging, error)
            if _is_there(old):
                _add_to(error, f"What was there, {printable(str(old))}, the next run puts back.")
        raise
    finally:
        staging.close()


def _is_there(path: Path) -> bool | None:
    """Whether something has this name; None if the disk does not even tell that."""
    try:
        return exists(path)
    except WriteError:
        return None


def _leave(staging: Staging, error: BaseException) -> None:
    """Keep what can be continued, and say so in the error; remove everything else."""
    # Not if the same would happen again, nor what is of an input that is no longer there.
    passing = isinstance(error, (ReadError, WriteError, MemoryError)) and not isinstance(
        error, ChangedError
    )
    if (passing or not isinstance(error, Exception)) and staging.finished:
        with contextlib.suppress(OSError, StreamshardError):
            staging.clear()
        _add_to(
            error,
            f"What is finished ({len(staging.finished)} of the weight files) is kept in "
            f"{printable(str(staging.folder))}: run the same command again to continue, or remove "
            "that folder.",
        )
    else:
        try:
            remove_tree(staging.folder)
        except (OSError, StreamshardError):
            where = printable(str(staging.folder))
            _add_to(error, f"{where} cannot be removed now; the next run does that.")


def _add_to(error: BaseException, text: str) -> None:
    error.args = (" ".join([*(str(part) for part in error.args[:1]), text]), *error.args[1:])


def _swap(folder: Path, target: Path, old: Path, *, overwrite: bool) -> None:
    try:
        if overwrite and exists(target):
            system.rename(target, old)
        # Fails if something else has been put there in the meantime.
        system.rename(folder, target)
    except BaseException as error:
        if exists(old) and not exists(target):
            system.rename(old, target)
        if isinstance(error, OSError) and error.errno in (errno.ENOTEMPTY, errno.EEXIST):
            raise OutputError(
                f"{printable(str(target))}: appeared while this run was writing. Choose another output."
            ) from error
        raise


def _recover(target: Path, old: Path) -> None:
    """Finish or undo what a run was doing that was killed while it replaced an output."""
    with writing(target, 0):
        if not exists(old):
            return
        if not exists(target):
            system.rename(old, target)
            sync_folder(target.parent)
            return
    if not exists(target / REPORT_NAME):
        raise OutputError(
            f"{printable(str(target))}: {printable(str(old))} is what an interrupted run was replacing, "
            "and something else is in its place now. Remove one of the two."
        )
    _discard(old, target)


def _discard(old: Path, target: Path) -> None:
    if not exists(old):
        return
    try:
        remove_tree(old)
        sync_folder(target.parent)
    except OSError as error:
        raise WriteError(
            f"{printable(str(old))}: cannot be removed: {error.strerror}. Check permissions and disk."
        ) from error
