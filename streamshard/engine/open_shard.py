"""A shard that is being written: its file, and what is known of its tensors so far."""

from __future__ import annotations

from array import array

from streamshard.checkpoint.digests import DIGEST_NBYTES, shard_digest
from streamshard.checkpoint.shards import Shard
from streamshard.disk.direct import DirectFile
from streamshard.disk.folders import disk_free
from streamshard.disk.new_files import OutputFile
from streamshard.engine.destination import Destination
from streamshard.engine.journal import FinishedShard
from streamshard.engine.shard_task import Result
from streamshard.engine.workers import Senders
from streamshard.errors import WriteError, both_bytes, printable
from streamshard.tensors.rounding import Change

__all__ = ["OpenShard"]


class OpenShard:
    """A shard that is being written."""

    def __init__(self, shard: Shard, place: Destination, senders: Senders | None) -> None:
        folder = place.folder
        free = disk_free(folder)
        if free is not None and free < shard.nbytes:
            needed, there = both_bytes(shard.nbytes, free)
            raise WriteError(
                f"{printable(str(folder / shard.name))}: {needed} are needed but {there} are free. "
                "Free some space."
            )
        self.shard = shard
        self.header, self.begins = shard.header()
        self.left = len(self.begins)
        self.digests = bytearray(DIGEST_NBYTES * self.left)
        self.measured: dict[int, tuple[float, Change]] = {}
        self.odd: dict[int, Result] = {}
        # Not yet under its name: until it is complete, nothing shall take it for a weight file.
        path = place.temporary(shard.name)
        if senders is None:
            self.output = OutputFile(path, shard.nbytes)
        else:
            self.output = DirectFile(path, shard.nbytes, senders)

    def note(self, place: int, result: Result) -> bool:
        """Take note of a finished tensor; returns whether it was the last one."""
        self.digests[DIGEST_NBYTES * place : DIGEST_NBYTES * (place + 1)] = result.digest
        squared, change = result.squared, result.changes.total()
        if squared or change.updated:
            self.measured[place] = (squared, change)
        if result.not_finite or result.zero:
            self.odd[place] = result
        self.left -= 1
        return not self.left

    def finished(self, sha256: str | None) -> FinishedShard:
        """All that is to be known of it."""
        squared, change = array("d", bytes(8 * len(self.begins))), Change()
        for place in sorted(self.measured):  # sums must not depend on who was faster
            value, changed = self.measured[place]
            change = change.plus(changed)
            if value:
                squared[place] = value
        return FinishedShard(
            self.shard.name,
            self.shard.nbytes,
            shard_digest(self.header, bytes(self.digests)),
            bytes(self.digests),
            squared,
            change,
            sha256,
            tuple(place for place in sorted(self.odd) if self.odd[place].not_finite),
            tuple(place for place in sorted(self.odd) if self.odd[place].zero),
        )
