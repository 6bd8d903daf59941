"""The comparison of a checkpoint with what is recorded of it, by several threads: all bytes are read."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from functools import partial

from streamshard.checkpoint.digests import (
    DIGEST_NBYTES,
    hash_file,
    new_digest,
    new_sha256,
    shard_digest,
)
from streamshard.checkpoint.file_names import REPORT_NAME
from streamshard.checkpoint.header import header_text
from streamshard.checkpoint.new_header import framed
from streamshard.checkpoint.open_anything import Opened, is_shard
from streamshard.checkpoint.recorded_files import FileRecord, link_problem
from streamshard.commands.verify_zeros import trailing_zeros
from streamshard.disk.existence import has_name
from streamshard.disk.files import open_source
from streamshard.disk.system import is_unread
from streamshard.engine.workers import Stop
from streamshard.errors import InputError, ReadError, listed, printable
from streamshard.tensors.lazy import Lazy, blocks
from streamshard.tensors.rounding import count_not_finite
from streamshard.tensors.workspace import Workspace

__all__ = ["Comparison"]


class Comparison:
    """What a comparison finds.

    `compared` are the names of recorded files whose content was compared, whatever came out;
    `uncompared` are those of which that was not possible, and why.
    """

    def __init__(self, found: Opened, progress: Callable[[int, str], None] | None) -> None:
        self.found = found
        self.progress = progress
        self.stop = Stop()
        self.lock = threading.Lock()
        self.compared: set[str] = set()
        self.uncompared: dict[str, str] = dict(found.unread)
        self.missing: list[str] = []
        self.unexpected: list[str] = []
        self.different: list[str] = []
        self.unread: set[str] = set()
        self.nonfinite: dict[str, int] = {}
        self.zeros: dict[str, int] = {}
        self.problems: list[str] = []
        self.unreadable: set[str] = set()
        self.seen = {
            name: bytearray(DIGEST_NBYTES * len(tensors)) for name, tensors in found.headers.items()
        }

    def add(self, where: str, problem: str | Exception) -> None:
        """Take note of a problem."""
        text = f"{printable(where)}: {problem}"
        with self.lock:
            self.problems.append(text)
            if isinstance(problem, Exception) and is_unread(problem):
                self.unreadable.add(text)

    def names(self) -> None:
        """Compare the names of tensors with those recorded, without reading them."""
        if not self.found.listing.usable:
            return
        there, recorded = set(self.found.tensors), set(self.found.listing.tensors)
        self.unexpected = sorted(there - recorded)
        # What a file has that the system did not read is not known; other files tell themselves.
        self.missing = [] if self.found.incomplete else sorted(recorded - there)
        if self.missing:
            self.add(REPORT_NAME, f"records {listed(self.missing)}, which no file holds")
        if self.unexpected:
            self.add(REPORT_NAME, f"does not record {listed(self.unexpected)}")

    def tasks(self, names: list[str], *, whole: bool) -> Iterator[Callable[[Workspace], None]]:
        """All that is to be read: tensors, then the files beside them, and files for SHA-256."""
        wanted = set(names)
        for file, tensors in self.found.headers.items():
            for place, (name, tensor) in enumerate(tensors.items()):
                if name in wanted:
                    yield partial(self.tensor, file, place, name, tensor)
        for name, record in self.found.listing.files.items():
            yield partial(self.file, name, record, whole=whole)

    def hashed_nbytes(self, *, whole: bool) -> int:
        """Bytes of the files that are read for their SHA-256, beside what is read of tensors."""
        records = self.found.listing.files.values() if whole else ()
        return sum(record.nbytes for record in records if record.sha256 is not None)

    def tensor(self, file: str, place: int, name: str, tensor: Lazy, work: Workspace) -> None:
        """Compare a tensor with its digest, and count what is not finite."""
        digest, count, zeros = new_digest(), 0, 0
        try:
            for (block,) in blocks(work, tensor):
                self.stop.check()
                digest.update(block.data)
                count += count_not_finite(block, tensor.dtype)
                zeros = trailing_zeros(block, zeros)
        except (InputError, ReadError) as error:
            self.add(name, error)
            with self.lock:
                self.unread.add(name)
            return
        expected = self.found.listing.tensors.get(name)
        differs = expected is not None and expected != digest.hexdigest()
        with self.lock:
            first = DIGEST_NBYTES * place
            self.seen[file][first : first + DIGEST_NBYTES] = digest.digest()
            if differs:
                self.different.append(name)
                self.problems.append(
                    f"tensor '{printable(name)}': its bytes in {printable(file)} have changed"
                )
            if zeros:
                self.zeros[name] = zeros
            if count:
                self.nonfinite[name] = count
                self.problems.append(
                    f"tensor '{printable(name)}': {count:,} values are infinite or NaN"
                )
            if self.progress is not None:
                self.progress(tensor.nbytes, name)

    def file(self, name: str, record: FileRecord, work: Workspace, *, whole: bool) -> None:
        """Compare a file with its record; of a weight file size and SHA-256 only."""
        path = self.found.folder / name
        weights = is_shard(name)
        digest = None if weights else new_digest()
        sha256 = new_sha256() if whole and record.sha256 is not None else None
        hashes = [one for one in (digest, sha256) if one is not None]
        try:
            with open_source(path) as file:
                nbytes = file.nbytes
            problem = link_problem(self.found.folder, name)
            if problem is not None:
                self.add(name, problem)
            if nbytes == record.nbytes and hashes:
                told = partial(self._tell, name) if sha256 is not None else lambda _: None
                hash_file(path, *hashes, going=self.stop.going, told=told)
        except (InputError, ReadError) as error:
            gone = "is missing: it is recorded, and no such file is there"
            self.add(name, error if has_name(path) else gone)
            with self.lock:
                self.uncompared[name] = "it cannot be read"
            return
        if nbytes != record.nbytes:
            self.add(name, f"has {nbytes:,} bytes, not the {record.nbytes:,} that are recorded")
        elif digest is not None and digest.hexdigest() != record.digest:
            self.add(name, "its content has changed")
        elif sha256 is not None and sha256.hexdigest() != record.sha256:
            self.add(name, "its SHA-256 is another one")
        if not weights:
            with self.lock:
                self.compared.add(name)

    def _tell(self, name: str, nbytes: int) -> None:
        with self.lock:
            if self.progress is not None:
                self.progress(nbytes, name)

    def shards(self, names: list[str]) -> None:
        """Compare weight files of which every tensor was read: headers count there too."""
        read = set(names) - self.unread
        for name, digests in self.seen.items():
            record = self.found.listing.files.get(name)
            if record is None:
                continue
            tensors = set(self.found.headers[name])
            if not tensors <= read:
                failed = bool(tensors & self.unread)
                self.uncompared[name] = (
                    "it cannot be read as a whole"
                    if failed
                    else f"only {len(tensors & read):,} of its {len(tensors):,} tensors were read"
                )
                continue
            try:
                text, _ = header_text(self.found.folder / name)
            except (InputError, ReadError) as error:
                self.add(name, error)
                self.uncompared[name] = "it cannot be read"
                continue
            self.compared.add(name)
            changed = bool(tensors & {*self.different, *self.unexpected})
            if not changed and shard_digest(framed(text), bytes(digests)) != record.digest:
                self.add(name, "its header has changed")
