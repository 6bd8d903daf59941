"""The folder beside an output that all of its parts write to, at once, on machines that share a disk.

Nobody locks it: every file appears by a rename, complete, and is the same whoever has made it. So any
number of processes may be at the same shard, any of them may be killed, and a record says that its shard
is on disk. It is made by who comes first and removed by who completes the output; whoever still writes
then finds that out when it next makes a file. Nothing but our own is ever removed (see `claims.py`).
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path

from streamshard.disk import folders
from streamshard.disk.folders import exists, inode_of, remove_empty, rename, sync_folder
from streamshard.disk.held import Held
from streamshard.disk.new_files import write_new
from streamshard.disk.system import system, writing
from streamshard.engine.beside_output import places_beside
from streamshard.engine.fingerprint import differences
from streamshard.engine.journal import Elsewhere, FinishedShard
from streamshard.engine.lock import locked
from streamshard.engine.marks import Mark
from streamshard.engine.parts_cleanup import (
    PAUSE_SECONDS,
    PLAN,
    TAKEN,
    TRIES,
    agreed,
    checked,
    held_parts,
    is_gone,
    is_of,
    listed_in,
    refuse_writers,
    remove,
    remove_dead,
    remove_folder,
    remove_if_unused,
    remove_own,
)
from streamshard.engine.parts_files import (
    SEEN_FILE,
    Shared,
    checked_line,
    checked_name,
    fresh_token,
    lock_name,
    names_of,
    read_checked,
    read_plan,
    read_seen,
    read_sent,
    read_shard,
    record_name,
    seen_line,
    sent_line,
    sent_name,
    shard_line,
    temporary_name,
    tokens_in,
)
from streamshard.errors import BusyError, OutputError, WriteError, printable

__all__ = [
    "PartsFolder",
    "discard_parts",
    "is_gone",
    "opened_parts",
    "refuse_parts",
    "shared_parts",
]


class PartsFolder:
    """The shared folder, held; a `Destination` for whoever has a token."""

    def __init__(self, folder: Held, shared: Shared, token: str = "") -> None:
        self.folder = Path(folder.path)
        self.shared = shared
        self._inode = folder.inode
        self._token = token
        self._finished: dict[str, FinishedShard] = {}
        self._settled: set[str] = set()
        self._noted = Elsewhere()
        self.look()

    @property
    def finished(self) -> Mapping[str, FinishedShard]:
        """The shards that were finished when that was last looked at."""
        return self._finished

    def look(self) -> Collection[str]:
        """Look which shards are finished by now, whoever has written them.

        Returns those of which nothing is left to be done: which are sent, too, if they are to be.
        """
        for name in self.shared.shards:
            if name not in self._settled:
                self._look_at(name)
        return self._settled

    def _look_at(self, name: str) -> None:
        digest, noted = self.shared.digest, self._noted
        record = self._finished.get(name) or read_shard(self.folder, name, digest)
        if record is None:
            return
        here = self._has(record)
        if self.shared.sends:  # after the file was looked for: who removes it has noted that before
            found = read_sent(self.folder, name, digest)
            noted.sent.update(found.sent)
            noted.stays.update(found.stays)
        if not (here or (self.shared.goes and noted.has(record))):
            return
        self._finished[name] = record
        if not self.shared.sends or noted.has(record) or name in noted.stays:
            self._settled.add(name)

    def _has(self, record: FinishedShard) -> bool:
        path = self.folder / record.name
        with writing(path, 0), contextlib.suppress(FileNotFoundError):
            return system.lstat(path).st_size == record.nbytes
        return False

    def temporary(self, name: str) -> Path:
        """Where a file is written until it is complete and gets its name."""
        return self.folder / temporary_name(name, self._token)

    def add(self, shard: FinishedShard) -> None:
        """Note that a shard is finished, has its name, and is on disk."""
        self._put(record_name(shard.name), shard_line(shard, self.shared.digest))
        self._finished[shard.name] = shard
        if not self.shared.sends:
            self._settled.add(shard.name)

    def checked(self, shard: FinishedShard) -> Mark | None:
        """What the file of a shard was like when somebody has read it again; None if nobody did."""
        return read_checked(self.folder, shard, self.shared.digest)

    def add_checked(self, shard: FinishedShard, mark: Mark) -> None:
        """Note that a shard was read again, and is right."""
        self._put(checked_name(shard.name), checked_line(shard, mark, self.shared.digest))

    def elsewhere(self, key: str) -> Elsewhere:
        """What is noted of the store that all of it is sent to: the plan says which one that is."""
        self.look()
        self._noted.seen = read_seen(self.folder, self.shared.digest)
        return self._noted

    def add_elsewhere(self, key: str, noted: Elsewhere) -> None:
        """Note what was sent there, or that it is put there with all the rest."""
        digest = self.shared.digest
        if noted.seen is not None:
            self._put(SEEN_FILE, seen_line(noted.seen, digest))
        for name in (*noted.sent, *noted.stays):
            self._put(sent_name(name), sent_line(name, noted.sent.get(name), digest))

    def drop(self, name: str) -> None:
        """Remove a shard, if it is there."""
        path = self.folder / name
        with writing(path, 0), contextlib.suppress(FileNotFoundError):
            system.unlink(path)

    def check_there(self) -> None:
        """Raise `OutputError` if the folder was removed, or put elsewhere."""
        if inode_of(self.folder) != self._inode:
            raise OutputError.at(self.folder, _MOVED)

    def _put(self, name: str, line: bytes) -> None:
        """Write a record, which is there as a whole or not at all."""
        self.check_there()
        write_new(self.temporary(name), [line])
        rename(self.temporary(name), self.folder / name)
        sync_folder(self.folder)


_MOVED = (
    "is no longer the folder in which this part was writing: the output was completed, or something "
    "has moved that folder. Run the same command again."
)


@contextlib.contextmanager
def shared_parts(
    target: Path, shared: Shared, *, overwrite: bool, anew: bool = True
) -> Iterator[PartsFolder]:
    """The folder of the parts of `target` (a resolved path), to write in.

    If there is none it is made, or, unless it may be begun `anew`, refused. What processes that are no
    longer there have left unfinished is removed. When the block ends nothing unfinished of our own is
    left, nor the folder if nothing was finished in it. Raises `OutputError` if it was begun with another
    plan (which `overwrite` discards), or holds what is not ours.
    """
    with contextlib.ExitStack() as stack:
        kept, token = _joined(stack, target, shared, overwrite=overwrite, anew=anew)
        remove_dead(Path(kept.path), shared.shards, target)
        yield PartsFolder(kept, shared, token)


@contextlib.contextmanager
def opened_parts(target: Path) -> Iterator[PartsFolder | None]:
    """What parts have written so far, to be looked at; None if there is nothing of any."""
    folder, parts = places_beside(target)["parts"], None
    with contextlib.ExitStack() as stack:
        try:
            if exists(folder):
                kept = stack.enter_context(held_parts(folder))
                shared = checked(folder)
                parts = None if shared is None else PartsFolder(kept, shared)
        except WriteError as error:
            if not is_gone(error):  # else it was completed or discarded just now
                raise
        yield parts


def refuse_parts(target: Path, *, overwrite: bool) -> None:
    """Raise `OutputError` if parts of an output are there, for a run that makes all of it.

    With `overwrite` they are discarded instead, unless somebody is writing them.
    """
    if overwrite:
        discard_parts(target)
        return
    with opened_parts(target) as parts:
        folder = places_beside(target)["parts"]
        if not exists(folder):
            return
        done = 0 if parts is None else len(parts.finished)
        raise OutputError(
            f"{printable(str(target))}: parts of it ({done} finished weight files) are in "
            f"{printable(str(folder))}, written by the same or another command with --part. Add --part "
            "finish to that command to complete it, or pass --overwrite to discard them."
        )


def discard_parts(target: Path, *, writers: bool = False) -> bool:
    """Remove what parts have written, and their folder; returns whether that is gone.

    Raises `BusyError` if somebody is writing there, unless `writers` do not count: what those are
    at is finished by others.
    """
    folder = places_beside(target)["parts"]
    for _ in range(TRIES):
        try:
            if not exists(folder):
                return True
            with held_parts(folder):
                shared = checked(folder)
                shards = () if shared is None else shared.shards
                if not writers:
                    refuse_writers(folder, target)
                remove(folder, names_of(shards, tokens_in(listed_in(folder))) - {PLAN})
                sync_folder(folder)
                remove_folder(folder)
            sync_folder(folder.parent)
        except WriteError as error:
            if not (is_gone(error) or is_of(error, TAKEN)):
                raise
            time.sleep(PAUSE_SECONDS)  # somebody came, or another one removes it, too
    return False


def _joined(
    stack: contextlib.ExitStack, target: Path, shared: Shared, *, overwrite: bool, anew: bool
) -> tuple[Held, str]:
    """The folder, held as long as the stack, with our lock in it and the same plan as ours."""
    folder = places_beside(target)["parts"]
    for _ in range(TRIES):
        with contextlib.ExitStack() as tried:
            try:
                kept, token = _entered(tried, folder, target, anew=anew)
                there = agreed(folder, shared, token) if anew else read_plan(folder)
            except WriteError as error:
                if not is_gone(error):
                    raise
                there = None
            if there is not None:
                found = differences(there.identity, shared.identity)
                if not found:
                    stack.push(tried.pop_all())
                    return kept, token
                if not overwrite:
                    raise _other_plan(target, folder, found)
        if there is not None:
            discard_parts(target)
        if not anew:
            raise OutputError.at(folder, _MOVED)
        time.sleep(PAUSE_SECONDS)  # it was completed or discarded just now
    raise OutputError.at(
        folder,
        "is made and removed by others again and again. Wait for them to end, or choose another output.",
    )


def _other_plan(target: Path, folder: Path, found: list[str]) -> OutputError:
    shown = "; ".join(found[:5]) + (f"; and {len(found) - 5} more" * (len(found) > 5))
    return OutputError(
        f"{printable(str(target))}: parts of it in {printable(str(folder))} were begun otherwise: "
        f"{shown}. All parts need the same version, inputs and options: give this one those of the "
        "others, or pass --overwrite to discard what is there."
    )


def _entered(
    stack: contextlib.ExitStack, folder: Path, target: Path, *, anew: bool
) -> tuple[Held, str]:
    """Hold the folder, made if there is none, and a lock in it under a token of our own."""
    if anew:
        with writing(folder, 0):
            made = folders.make_folders(folder.parent)
            stack.callback(remove_empty, made)
            for one in made:
                sync_folder(one.parent)
            with contextlib.suppress(FileExistsError):
                system.mkdir(folder)
    kept = stack.enter_context(held_parts(folder))
    checked(folder)
    stack.callback(remove_if_unused, folder)
    while True:
        token = fresh_token()
        try:
            stack.enter_context(locked(folder / lock_name(token), target))
        except BusyError:  # somebody took it for that of a process that is no longer there
            continue
        stack.callback(remove_own, folder, token)
        return kept, token
