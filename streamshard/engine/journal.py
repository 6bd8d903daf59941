"""The journal of a run: what is to be written, each shard that is finished and on disk, what was sent.

One line of JSON a record, each after the digest of its text: a line that was cut off or damaged
is where reading ends. The first record has the plan, and the names of all files that the run may make
in its folder: nothing else there is ever continued or removed.
"""

from __future__ import annotations

import json
from array import array
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from streamshard.checkpoint.digests import new_digest
from streamshard.checkpoint.file_names import JOURNAL_NAME
from streamshard.checkpoint.sent_files import SentFile
from streamshard.disk.files import read_bytes
from streamshard.disk.folders import exists
from streamshard.disk.new_files import LogFile
from streamshard.engine.ours import Ours
from streamshard.tensors.rounding import Change
from streamshard.values import frozen

__all__ = ["Elsewhere", "FinishedShard", "Journal", "from_line", "line_of"]


MAX_NBYTES = 1 << 30
_SECTOR = 512  # a disk writes so much at once


@frozen
class FinishedShard:
    """A shard that is complete and on disk.

    `digest` is that of the file; `digests` are those of its tensors (16 bytes each), in the order of
    their bytes; `squared` are the squared distances, in the same order, and `change` is what
    updates did in all of them. `sha256` is None unless it was asked for. `not_finite` are the places
    of tensors with a NaN or infinity, `zero` those of tensors that are nothing but 0.
    """

    name: str
    nbytes: int
    digest: str
    digests: bytes = field(repr=False)
    squared: array[float] = field(repr=False)
    change: Change
    sha256: str | None
    not_finite: tuple[int, ...] = ()
    zero: tuple[int, ...] = ()

    def record(self) -> dict[str, Any]:
        """As JSON."""
        return {
            "shard": self.name,
            "bytes": self.nbytes,
            "digest": self.digest,
            "tensors": self.digests.hex(),
            "squared": [value or 0 for value in self.squared],
            "change": list(self.change),
            "sha256": self.sha256,
            "not_finite": list(self.not_finite),
            "zero": list(self.zero),
        }

    @classmethod
    def from_record(cls, record: Mapping[str, Any]) -> FinishedShard:
        """What `record` gave."""
        name, nbytes, digest, sha256 = (record[k] for k in ("shard", "bytes", "digest", "sha256"))
        change, squared = record["change"], array("d", record["squared"])
        places = tuple(tuple(record[key]) for key in ("not_finite", "zero"))
        if not (
            isinstance(name, str)
            and type(nbytes) is int
            and isinstance(digest, str)
            and isinstance(sha256, str | None)
            and all(type(value) in (int, float) for value in change)
            and not any(value < 0 for value in (*change, *squared))
            and all(type(place) is int and 0 <= place < len(squared) for place in sum(places, ()))
        ):
            raise TypeError("no record of a shard")
        tensors = bytes.fromhex(record["tensors"])
        return cls(name, nbytes, digest, tensors, squared, Change(*change), sha256, *places)


@dataclass(slots=True)
class Elsewhere:
    """What a run has noted of one store that its files are sent to."""

    seen: str | None = None
    """The version of what is there that it builds on."""
    sent: dict[str, SentFile] = field(default_factory=dict)
    """Shards that are there, by name; they need not be here."""
    stays: set[str] = field(default_factory=set)
    """Shards that go there with all the rest, not before; not noted in the journal."""
    ready: Sequence[SentFile] = ()
    """All files of the complete output, once these are to be put there."""

    def records(self, key: str) -> Iterator[dict[str, Any]]:
        """As JSON, a record for each fact."""
        if self.seen is not None:
            yield {"to": key, "seen": self.seen}
        for file in self.sent.values():
            yield {"to": key, "sent": file.record()}
        if self.ready:
            yield {"to": key, "ready": [file.record() for file in self.ready]}

    def has(self, shard: FinishedShard) -> bool:
        """Whether a finished shard is there."""
        found = self.sent.get(shard.name)
        return found is not None and (found.nbytes, found.sha256) == (shard.nbytes, shard.sha256)

    def take(self, record: Mapping[str, Any]) -> None:
        """Take up a record; raises what odd content raises."""
        if "seen" in record:
            if not isinstance(record["seen"], str):
                raise TypeError("no version")
            self.seen = record["seen"]
        elif "sent" in record:
            file = SentFile.from_record(record["sent"])
            self.sent[file.name] = file
        else:
            self.ready = [SentFile.from_record(one) for one in record["ready"]]


class Journal:
    """The journal in a staging folder, read and opened for adding to it.

    `plan` is what the run that began it was to write, or None if there was none; `names` are those
    of the files that it may make, `finished` are the shards that it has noted, by name, `elsewhere` is
    what it has sent, by the key of where to.
    """

    def __init__(self, folder: Path, ours: Ours) -> None:
        self.path = folder / JOURNAL_NAME
        self.plan: dict[str, Any] | None = None
        self.names: frozenset[str] = frozenset()
        self._ours = ours
        self._begun = True
        self.finished: dict[str, FinishedShard] = {}
        self.elsewhere: dict[str, Elsewhere] = {}
        self._good = 0
        self._log: LogFile | None = None
        if exists(self.path):
            ours.check_file(self.path)
            self._read(read_bytes(self.path, MAX_NBYTES))

    @property
    def is_begun(self) -> bool:
        """Whether what could not be read may be the beginning of one, after a kill or a loss of power."""
        return self._begun

    def _read(self, content: bytes) -> None:
        self._begun = not content[:_SECTOR].strip(b"\0") or _is_beginning(content)
        for line in content.splitlines(keepends=True):
            if not _is_whole(line):
                return
            try:
                record = from_line(line)
                if self.plan is None:
                    self.plan, self.names = _beginning(record)
                elif "to" in record:
                    self.elsewhere.setdefault(str(record["to"]), Elsewhere()).take(record)
                else:
                    shard = FinishedShard.from_record(record)
                    self.finished[shard.name] = shard
            # Of another version, or of somebody who has made the digest to it.
            except (KeyError, TypeError, ValueError, OverflowError, RecursionError):
                self._begun = self._begun and self.plan is not None
                return
            self._good += len(line)

    def begin(self, plan: Mapping[str, Any], names: Collection[str]) -> None:
        """Begin a new one, or one that was cut off in its first line."""
        self.plan, self.names = dict(plan), frozenset(names)
        self.open()
        self._add_first()

    def open(self) -> None:
        """Get ready for adding."""
        check = partial(self._ours.check, path=self.path) if exists(self.path) else None
        self._log = LogFile(self.path, self._good, check)

    def restore(self) -> None:
        """Write all of it again, after the file has been removed."""
        self.close()
        self._good = 0
        self.open()
        self._add_first()
        for shard in self.finished.values():
            self._add(shard.record())
        for key, noted in self.elsewhere.items():
            for record in noted.records(key):
                self._add(record)

    def _add_first(self) -> None:
        self._add({"plan": self.plan, "names": sorted(self.names)})

    def add(self, shard: FinishedShard) -> None:
        """Note a shard, and wait until the disk has that."""
        self._add(shard.record())
        self.finished[shard.name] = shard

    def add_elsewhere(self, key: str, noted: Elsewhere) -> None:
        """Note facts of what is sent there."""
        known = self.elsewhere.setdefault(key, Elsewhere())
        for record in noted.records(key):
            self._add(record)
            known.take(record)

    def _add(self, record: Mapping[str, Any]) -> None:
        if self._log is None:
            raise ValueError("the journal is not open")
        self._log.append(line_of(record))

    def close(self) -> None:
        """Close the file."""
        if self._log is not None:
            self._log.close()


def line_of(record: Mapping[str, Any]) -> bytes:
    """A record as a line that tells whether it is whole."""
    text = json.dumps(record).encode() + b"\n"
    return _digest(text) + b" " + text


def from_line(line: bytes) -> Any:
    """The record of a line; `ValueError` if it was cut off or changed."""
    if not _is_whole(line):
        raise ValueError("no whole line of a record")
    return json.loads(line.partition(b" ")[2])


def _is_whole(line: bytes) -> bool:
    digest, _, text = line.partition(b" ")
    return line.endswith(b"\n") and digest == _digest(text)


def _beginning(record: Any) -> tuple[dict[str, Any], frozenset[str]]:
    """The plan and the names in a first record; raises what odd content raises."""
    plan, names = record["plan"], record["names"]
    if not isinstance(plan, dict) or not isinstance(names, list):
        raise TypeError("no first record of a journal")
    if not all(isinstance(name, str) for name in names):
        raise TypeError("no first record of a journal")
    return plan, frozenset(names)


def _is_beginning(content: bytes) -> bool:
    start = b'{"plan": '
    digest, space, text = content.partition(b" ")
    if digest.strip(b"0123456789abcdef") or len(digest) > len(_digest(b"")):
        return False
    whole = len(digest) == len(_digest(b"")) and (text.startswith(start) or start.startswith(text))
    return whole or not space


def _digest(text: bytes) -> bytes:
    digest = new_digest()
    digest.update(text)
    return digest.hexdigest().encode()
