"""What lies in the folder that parts share: told from what is not ours, and removed by who may.

Any number of processes are at work there: what is gone by the time that it is looked at is no error.
"""

from __future__ import annotations

import contextlib
import errno
import stat
import time
from collections.abc import Collection, Iterator
from pathlib import Path, PurePosixPath

from streamshard.disk.folders import exists, held, rename, sync_folder
from streamshard.disk.held import Held
from streamshard.disk.new_files import write_new
from streamshard.disk.system import system, writing
from streamshard.engine.claims import strangers
from streamshard.engine.leftovers import refuse_strangers
from streamshard.engine.lock import locked
from streamshard.engine.ours import Ours
from streamshard.engine.parts_files import (
    PLAN_FILE,
    PLAN_FOLDER,
    SEEN_FILE,
    Shared,
    final_names,
    fresh_token,
    lock_name,
    names_of,
    plan_line,
    plan_temporary,
    read_plan,
    tokens_in,
)
from streamshard.errors import BusyError, StreamshardError, WriteError

__all__ = [
    "PAUSE_SECONDS",
    "PLAN",
    "TAKEN",
    "TRIES",
    "agreed",
    "checked",
    "held_parts",
    "is_gone",
    "is_of",
    "listed_in",
    "refuse_writers",
    "remove",
    "remove_dead",
    "remove_folder",
    "remove_if_unused",
    "remove_own",
]


TRIES = 100
PAUSE_SECONDS = 0.01
GONE = (errno.ENOENT, errno.ESTALE, errno.ENOTDIR)
TAKEN = (errno.ENOTEMPTY, errno.EEXIST)

PLAN = f"{PLAN_FOLDER}/{PLAN_FILE}"


def is_gone(error: BaseException) -> bool:
    """Whether an error says that the folder, or something in it, was removed meanwhile."""
    return is_of(error, GONE)


def is_of(error: BaseException, numbers: Collection[int]) -> bool:
    """Whether an error is one of these of the system."""
    cause = error.__cause__
    return isinstance(cause, OSError) and cause.errno in numbers


@contextlib.contextmanager
def held_parts(folder: Path) -> Iterator[Held]:
    """Hold the folder, which must be one of ours."""
    ours = Ours(folder.parent)
    with held(folder, lambda found: ours.check(found, folder, folder=True)) as kept:
        yield kept


def checked(folder: Path) -> Shared | None:
    """The plan of what is in a folder that is held; `OutputError` if something there is not ours."""
    ours, found = Ours(folder.parent), []
    for _ in range(TRIES):
        shared = read_plan(folder)
        shards = () if shared is None else shared.shards
        try:
            found = strangers(folder, names_of(shards, tokens_in(listed_in(folder))), ours)
        except WriteError as error:
            if not (is_gone(error) and exists(folder)):
                raise
            continue
        # Others may have come, and put the plan there, between these calls.
        known = names_of(shards, tokens_in(found))
        found = [name for name in found if name not in known and not _is_in(name, known)]
        if not found:
            return shared
        if shared is not None:
            break
        time.sleep(PAUSE_SECONDS)
    refuse_strangers(folder, found)
    return None


def _is_in(folder: str, names: Collection[str]) -> bool:
    return any(name.startswith(f"{folder}/") for name in names)


def listed_in(folder: Path) -> list[str]:
    """The names in a folder."""
    with writing(folder, 0):
        return system.listdir(folder)


def remove(folder: Path, names: Collection[str]) -> None:
    """Remove files of these names, as far as they are there, and the folders in which they were."""
    there = set(listed_in(folder))
    for name in sorted(names):
        first = PurePosixPath(name).parts[0]
        if first not in there:
            continue
        path = folder / name
        with writing(path, 0):
            with contextlib.suppress(FileNotFoundError):
                if stat.S_ISREG(system.lstat(path).st_mode):
                    system.unlink(path)
            if first != name:
                with contextlib.suppress(FileNotFoundError):
                    system.rmdir(folder / first)


def agreed(folder: Path, shared: Shared, token: str) -> Shared | None:
    """The plan of the parts, which is ours if there was none; None if it was removed just now."""
    there = read_plan(folder)
    if there is not None:
        return there
    temporary = folder / plan_temporary(token)
    with writing(temporary, 0):
        system.mkdir(temporary)
    write_new(temporary / PLAN_FILE, [plan_line(shared)])
    sync_folder(temporary)
    try:
        rename(temporary, folder / PLAN_FOLDER)
    except WriteError as error:
        if not is_of(error, TAKEN):
            raise
        remove(folder, {f"{temporary.name}/{PLAN_FILE}"})  # another one was faster
    sync_folder(folder)
    return read_plan(folder)


def remove_folder(folder: Path) -> None:
    """Remove a folder that is held, in which nothing but the plan is left, which goes last.

    Whoever writes there may put something in until it is gone. That must not be without the plan, or
    nobody could tell that it is ours: the plan is put back then, and the error raised.
    """
    shared = read_plan(folder)
    remove(folder, {PLAN})
    try:
        with writing(folder, 0):
            system.rmdir(folder)
    except WriteError as error:
        if shared is not None and is_of(error, TAKEN):
            agreed(folder, shared, fresh_token())
        raise


def remove_own(folder: Path, token: str) -> None:
    """Remove what is not finished of our own; what cannot be removed, who completes the output does."""
    with contextlib.suppress(OSError, StreamshardError):
        shared = read_plan(folder)
        shards = () if shared is None else shared.shards
        remove(folder, names_of(shards, {token}) - {PLAN, lock_name(token), *final_names(shards)})


def remove_if_unused(folder: Path) -> None:
    """Remove a folder in which nobody has finished anything, and nobody else is at work."""
    with contextlib.suppress(OSError, StreamshardError):
        if not set(listed_in(folder)) - {PLAN_FOLDER, SEEN_FILE}:
            remove(folder, {SEEN_FILE})
            remove_folder(folder)


def remove_dead(folder: Path, shards: Collection[str], target: Path) -> None:
    """Remove what processes that are no longer there have not finished."""
    for token in sorted(tokens_in(listed_in(folder))):
        try:
            with locked(folder / lock_name(token), target):
                own = {PLAN, lock_name(token), *final_names(shards)}
                remove(folder, names_of(shards, {token}) - own)
        except BusyError:
            continue


def refuse_writers(folder: Path, target: Path) -> None:
    """Raise `BusyError` if a process is writing in a folder."""
    for token in sorted(tokens_in(listed_in(folder))):
        with locked(folder / lock_name(token), target):
            pass
