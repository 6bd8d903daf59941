"""Finished files on their way to a store elsewhere: weights while others are written, then all the rest.

Of an output that does not stay here a file goes once it is sent, and only so many are here at a time.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Collection, Sequence
from functools import partial
from typing import Any

from streamshard.checkpoint.sent_files import MovedError, SentFile, described
from streamshard.disk.folders import exists
from streamshard.engine.destination import Destination
from streamshard.engine.journal import Elsewhere, FinishedShard
from streamshard.engine.outlet import Outlet, Target
from streamshard.engine.workers import Background, OnStep, Stop
from streamshard.errors import ReadError

__all__ = ["Publishing", "Sender", "begin"]


class Sender:
    """One thread that sends shards, in the order in which they are finished. An error stops the run."""

    def __init__(
        self, outlet: Outlet, most: int | None, place: Destination, stop: Stop, lock: threading.Lock
    ) -> None:
        self._outlet, self._most = outlet, most
        self._place, self._stop, self._lock = place, stop, lock
        self._held = 0
        self._room = threading.Condition()
        self._left: dict[str, int] = {}
        self._total = 0
        self.told: Callable[[int, int], None] = lambda *_: None
        """Is told the bytes to send, and how many of them are sent."""
        self._background = Background(stop)

    def take_room(self) -> None:
        """Wait until another file may be begun."""
        with self._room:
            while self._most is not None and self._held >= self._most:
                self._stop.check()
                self._room.wait(0.2)
            self._held += 1

    def add(self, shard: FinishedShard, *, before: bool = False) -> None:
        """Send a finished shard; one that was there `before` takes room without asking for it."""
        with self._room:
            self._held += before
            self._left[shard.name] = shard.nbytes
            self._total += shard.nbytes
        self._background.add(partial(self._send, shard))

    def finish(self) -> None:
        """Wait until everything is sent; raises the error that stopped the run, if there is one."""
        self._tell()
        self._background.finish()

    def abandon(self) -> None:
        """Have the thread end; what it is sending is not waited for."""
        self._background.abandon()

    def _tell(self) -> None:
        with self._room:
            total, left = self._total, sum(self._left.values())
        if total:
            self.told(total, total - left)

    def _send(self, shard: FinishedShard) -> None:
        if not self._is_there(shard):
            try:
                self._put(shard)
            except Exception:
                # The same part in another process may have been faster, and have removed the file.
                if not self._is_there(shard):
                    raise
        with self._lock:
            self._stop.check()
            if not self._outlet.keeps and self._is_there(shard):
                self._place.drop(shard.name)
        with self._room:
            self._left.pop(shard.name)
            self._held -= 1
            self._room.notify_all()
        self._tell()

    def _is_there(self, shard: FinishedShard) -> bool:
        return self._place.elsewhere(self._outlet.key).has(shard)

    def _put(self, shard: FinishedShard) -> None:
        path = self._place.folder / shard.name
        file = described(path, shard.name, shard.sha256)
        sent = self._outlet.send(path, file, self._stop.going)
        noted = Elsewhere(sent={shard.name: file}) if sent else Elsewhere(stays={shard.name})
        with self._lock:
            self._stop.check()
            self._place.add_elsewhere(self._outlet.key, noted)


def begin(outlet: Outlet, place: Destination, names: Collection[str], *, overwrite: bool) -> Target:
    """What is there before anything is sent; that it was seen so is noted, for whoever continues."""
    key = outlet.key
    seen = place.elsewhere(key).seen
    try:
        target = outlet.begin(names, overwrite=overwrite, seen=seen)
    except MovedError as error:
        _note_moved(outlet, place, error)
        raise
    place.add_elsewhere(key, Elsewhere(seen=target.version))
    return target


def _note_moved(outlet: Outlet, place: Destination, error: MovedError) -> None:
    """Those who have been told what is there now need not be told again."""
    if error.version is not None:
        place.add_elsewhere(outlet.key, Elsewhere(seen=error.version))


class Publishing:
    """An output that goes to a store: what is there at the beginning, and how all is put there."""

    def __init__(
        self, outlet: Outlet, staging: Destination, names: Collection[str], *, overwrite: bool
    ) -> None:
        self._outlet = outlet
        self._staging, self._names = staging, sorted(names)
        noted = staging.elsewhere(outlet.key)
        self.version: str | None = None
        """What was put there, once it was: by this run, or by one that did not hear of it."""
        if noted.ready:
            self.version = self._outlet.find(noted.ready, noted.seen)
        self.target: Target | None = None
        if self.version is None:
            self.target = begin(outlet, staging, self._names, overwrite=overwrite)

    @property
    def warnings(self) -> Sequence[str]:
        """What the report says of what is there."""
        return () if self.target is None else self.target.warnings

    def gone(self) -> set[str]:
        """The finished shards that are there already and not to be kept here."""
        noted = self._staging.elsewhere(self._outlet.key)
        if self._outlet.keeps:
            return set()
        return {name for name, one in self._staging.finished.items() if noted.has(one)}

    @property
    def is_ready(self) -> bool:
        """Whether all files beside the weights are here as they were noted, to be put there."""
        ready = self._staging.elsewhere(self._outlet.key).ready
        if self.version is not None and not self._outlet.keeps:
            return True
        shards = self._staging.finished
        return bool(ready) and all(self._is_as_noted(one, shards.get(one.name)) for one in ready)

    def _is_as_noted(self, file: SentFile, shard: FinishedShard | None) -> bool:
        if shard is not None:  # whose file was read already, or is there
            return (file.nbytes, file.sha256) == (shard.nbytes, shard.sha256)
        path = self._staging.folder / file.name
        try:
            return exists(path) and described(path, file.name) == file
        except ReadError:
            return False

    def note_ready(self) -> None:
        """Note what all files are like; from now on they stay as they are."""
        shards, folder = self._staging.finished, self._staging.folder
        noted = self._staging.elsewhere(self._outlet.key)
        files = []
        for name in self._names:
            if name in shards and noted.has(shards[name]):
                files.append(noted.sent[name])
            else:
                files.append(described(folder / name, name))
        self._staging.add_elsewhere(self._outlet.key, Elsewhere(ready=files))

    def finish(self, on_step: OnStep) -> dict[str, Any]:
        """Put all of it there at once, unless that was done; returns what the report says."""
        key = self._outlet.key
        noted = self._staging.elsewhere(key)
        if self.target is not None:
            on_step("committing", 0, 0)
            sent = [one.name for one in noted.ready if noted.sent.get(one.name) == one]
            try:
                self.version = self._outlet.commit(
                    self._staging.folder, noted.ready, self.target, sent
                )
            except MovedError as error:
                _note_moved(self._outlet, self._staging, error)
                raise
        return self._outlet.described(self.version, [one.name for one in noted.ready], self.target)
