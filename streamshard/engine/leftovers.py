"""What an earlier run has left in its staging folder, told from what is somebody else's.

Only the journal there tells: its first record, which is on disk before anything else, lists all files
that the run may make. Where none can be read, a run of ours has left nothing but the beginning of one;
or it was about to rename the folder, as the lock notes, and all is there that the output's record lists.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Collection
from pathlib import Path

from streamshard.checkpoint.file_names import JOURNAL_NAME, REPORT_NAME
from streamshard.disk.held import Held
from streamshard.engine.claims import recorded_names, strangers
from streamshard.engine.fingerprint import Identity, differences
from streamshard.engine.journal import Journal
from streamshard.engine.lock import Moved
from streamshard.engine.ours import Ours
from streamshard.errors import InputError, OutputError, listed, printable
from streamshard.values import frozen

__all__ = ["Left", "changed", "left_in", "refuse_strangers"]


@frozen
class Left:
    """What a staging folder holds: files of our own by `names`, and `strangers`.

    Of our own `last` must be the last to be removed, as it tells what is.
    """

    ours: Ours
    journal: Journal
    names: Collection[str]
    last: str
    strangers: Collection[str]


def left_in(folder: Held, ours: Ours, moved: Moved | None) -> Left:
    """What there is in a staging folder; `moved` is what the lock notes (see `streamshard.locks`)."""
    path = Path(folder.path)
    journal = Journal(path, ours)
    names: Collection[str] = journal.names
    last = JOURNAL_NAME
    if journal.plan is None and journal.is_begun:
        names = {JOURNAL_NAME}
    if journal.plan is None and moved is not None and moved[1] == folder.inode[1]:
        # It was complete, and about to get its name.
        with contextlib.suppress(InputError):
            names, last = {*recorded_names(path), JOURNAL_NAME}, REPORT_NAME
    return Left(ours, journal, names, last, strangers(path, names, ours))


def refuse_strangers(folder: Path, names: Collection[str]) -> None:
    """Raise `OutputError` if there are names that are not ours."""
    if names:
        raise OutputError(
            f"{printable(str(folder))}: holds {listed(names)}, which no run of ours is known to have "
            "made. It was left alone: move or remove it, or choose another output."
        )


def changed(target: Path, folder: Path, old: Identity, new: Identity, *, overwrite: bool) -> bool:
    """Whether what a run has left in a folder is of no use for this one, and may be removed.

    Raises `OutputError`, which says why, if it is of no use and that was not allowed.
    """
    found = differences(old, json.loads(json.dumps(new)))
    if found and not overwrite:
        shown = "; ".join(found[:5]) + (f"; and {len(found) - 5} more" * (len(found) > 5))
        raise OutputError(
            f"{printable(str(target))}: an interrupted run left {printable(str(folder))}, which "
            f"cannot be continued: {shown}. Run the same command as then to continue it, or remove "
            "that folder (or pass --overwrite) to begin anew."
        )
    return bool(found)
