"""Writing shards: the tensors are streamed into known places.

Several threads take tensors, in any order; the bytes of one tensor pass one thread in their
order, and what is measured of tensors is summed in the order of the file.
"""

from __future__ import annotations

import threading
from array import array
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path

from streamshard.checkpoint.digests import (
    DIGEST_NBYTES,
    hash_file,
    new_digest,
    new_sha256,
    shard_digest,
)
from streamshard.checkpoint.shards import Shard
from streamshard.disk.files import BLOCK_NBYTES, ByteRange
from streamshard.disk.folders import disk_free, rename, sync_folder
from streamshard.disk.inputs import active
from streamshard.disk.new_files import OutputFile
from streamshard.engine.job import Plan
from streamshard.engine.journal import FinishedShard
from streamshard.engine.long_names import part_name
from streamshard.engine.staging import Staging
from streamshard.engine.workers import Background, Progress, Stop, Stopped, share
from streamshard.errors import AdapterError, WriteError, printable
from streamshard.tensors.arrays import Bytes
from streamshard.tensors.comparing import squared_distance
from streamshard.tensors.dtypes import DTYPE_BITS
from streamshard.tensors.lazy import Lazy, NotFiniteError, Stored
from streamshard.tensors.low_rank import TILE_ROWS
from streamshard.tensors.rounding import Change, Changes
from streamshard.tensors.workspace import Workspace

__all__ = ["write_shards"]


WRITE_BYTES = BLOCK_NBYTES
# What the disk is asked to begin with, and the progress is told, at a time.
NOTED_BYTES = 8 * 1024 * 1024


class _Open:
    """A shard that is being written."""

    def __init__(self, shard: Shard, folder: Path) -> None:
        free = disk_free(folder)
        if free is not None and free < shard.nbytes:
            raise WriteError(
                f"{printable(str(folder / shard.name))}: {shard.nbytes:,} bytes are needed but {free:,} "
                "are free. Free some space."
            )
        self.shard = shard
        self.header, self.begins = shard.header()
        self.names = tuple(self.begins)
        self.left = len(self.names)
        self.digests = bytearray(DIGEST_NBYTES * self.left)
        self.measured: dict[int, tuple[float, Change]] = {}
        # Not yet under its name: until it is complete, nothing shall take it for a weight file.
        self.output = OutputFile(folder / part_name(shard.name), shard.nbytes)

    def note(self, place: int, digest: bytes, squared: float, change: Change) -> bool:
        """Take note of a finished tensor; returns whether it was the last one."""
        self.digests[DIGEST_NBYTES * place : DIGEST_NBYTES * (place + 1)] = digest
        if squared or change.updated:
            self.measured[place] = (squared, change)
        self.left -= 1
        return not self.left

    def finished(self, sha256: str | None) -> FinishedShard:
        """All that is to be known of it."""
        squared, change = array("d", bytes(8 * len(self.names))), Change()
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
        )


class _Writing:
    """One tensor on its way into a shard; what is measured of it is measured in the file's order."""

    def __init__(self, run: _Run, opened: _Open, name: str, work: Workspace) -> None:
        self.run, self.work, self.name = run, work, name
        self.tensor, self.begin = opened.shard.tensors[name], opened.begins[name]
        self.output = opened.output
        self.reference = run.reference.get(name)
        self.digest, self.distance = new_digest(), 0.0
        self.done = 0
        """Bytes that are written and measured."""
        self._synced = self._progress = self._told = 0

    def copy(self, source: ByteRange) -> None:
        """Write bytes of a file as they are."""
        work = self.work
        work.files.check(source)
        buffer = work.bytes("out", WRITE_BYTES)
        for start in range(0, source.nbytes, WRITE_BYTES):
            nbytes = min(WRITE_BYTES, source.nbytes - start)
            part = ByteRange(source.path, source.offset + start, nbytes, source.file_nbytes)
            work.files.read_into(part, buffer[:nbytes].data)
            self._put(buffer[:nbytes])

    def compute(self, piece: Lazy) -> None:
        """Write what must be computed, window by window."""
        base, columns, bits = self.done, piece.columns, DTYPE_BITS[piece.dtype]
        scattered = False
        for start, stop, first, last in piece.windows(WRITE_BYTES):
            width = (last - first) * bits // 8
            out = self.work.bytes("out", (stop - start) * width)
            piece.window(start, stop, first, last, out, self.work)
            at = base + (start * columns + first) * bits // 8
            whole = last - first == columns or stop - start == 1
            scattered = scattered or not whole or at != self.done
            if not scattered:
                for place in range(0, len(out), WRITE_BYTES):
                    self._put(out[place : place + WRITE_BYTES])
                continue
            self.run.stop.check()
            for row in range(stop - start):
                part = out[row * width : (row + 1) * width]
                self.output.write(part.data, self.begin + at + row * piece.row_nbytes)
            self._noted(len(out))
        if scattered:
            self._measure_again(base + piece.nbytes, TILE_ROWS * piece.row_nbytes)

    def _measure_again(self, end: int, step: int) -> None:
        """Measure what is written already, in the blocks in which a tensor of short rows is."""
        for start in range(self.done, end, step):
            stop = min(start + step, end)
            for place in range(start, stop, WRITE_BYTES):
                block = self.work.bytes("out", min(WRITE_BYTES, stop - place))
                self.output.read_into(block.data, self.begin + place)
                self._measure(block)

    def _put(self, block: Bytes) -> None:
        self.output.write(block.data, self.begin + self.done)
        self._noted(block.nbytes)
        self._measure(block)

    def _measure(self, block: Bytes) -> None:
        self.run.stop.check()
        self.digest.update(block.data)
        if self.reference is not None:
            self.distance += _distance(self.tensor, self.reference, self.done, block, self.work)
        self.done += block.nbytes
        if self.done - self._synced >= NOTED_BYTES:
            self._sync()

    def _noted(self, nbytes: int) -> None:
        self._progress += nbytes
        if self._progress - self._told >= NOTED_BYTES:
            self._tell()

    def tell(self) -> None:
        """Tell what was not told yet, in the end."""
        self._sync()
        self._tell()

    def _sync(self) -> None:
        """Have the disk begin with a range that was written."""
        nbytes = self.done - self._synced
        if nbytes >= WRITE_BYTES:  # 40,000 small ones would make a long queue
            offset = self.begin + self._synced
            self.run.background.add(partial(self.output.begin_sync, offset, nbytes))
        self._synced = self.done

    def _tell(self) -> None:
        nbytes = self._progress - self._told
        if nbytes and self.run.progress is not None:
            with self.run.lock:
                self.run.progress(nbytes, self.name)
        self._told = self._progress


class _Run:
    """The writing of shards into a staging folder."""

    def __init__(
        self,
        staging: Staging,
        reference: Mapping[str, Stored],
        progress: Progress | None,
        *,
        sha256: bool,
    ) -> None:
        self.staging = staging
        self.reference = reference
        self.progress = progress
        self.sha256 = sha256
        self.stop = Stop()
        self.lock = threading.Lock()
        self.background = Background(self.stop)
        self.opened: set[_Open] = set()
        self.inputs = active()

    def tensors(self, shards: Sequence[Shard]) -> Iterator[tuple[_Open, int]]:
        """Every tensor, as its shard and its place in there; shards are begun on the way."""
        for shard in shards:
            opened = _Open(shard, self.staging.folder)
            self.opened.add(opened)
            opened.output.write(memoryview(opened.header), 0)
            for place in range(len(opened.names)):
                yield opened, place

    def write(self, item: tuple[_Open, int], work: Workspace) -> None:
        """Write one tensor."""
        opened, place = item
        writing = _Writing(self, opened, opened.names[place], work)
        work.changes = Changes()
        for piece in writing.tensor.pieces:
            ranges = piece.ranges()
            if ranges is not None:
                for source in ranges:
                    writing.copy(source)
                continue
            work.forget()
            try:
                writing.compute(piece)
            except NotFiniteError as error:
                message = f"tensor '{printable(writing.name)}', {error}. Nothing was written."
                raise AdapterError(message) from error
        writing.tell()
        change = work.changes.total()
        squared = change.squared if writing.reference is None else writing.distance
        with self.lock:
            if opened.note(place, writing.digest.digest(), squared, change):
                self.background.add(partial(self.finish, opened))

    def finish(self, opened: _Open) -> None:
        """Wait until the disk has a shard, give it its name, and note it in the journal."""
        path = opened.output.path
        opened.output.sync()
        opened.output.close()
        sha256 = new_sha256() if self.sha256 else None
        if sha256 is not None:
            hash_file(path, sha256, going=self.stop.going)
        shard = opened.finished(None if sha256 is None else sha256.hexdigest())
        if self.inputs is not None:
            self.inputs.check()  # only what is of unchanged inputs may be continued later
        with self.lock:
            self.stop.check()
            rename(path, path.with_name(shard.name))
            sync_folder(path.parent)
            self.staging.add(shard)
            self.opened.remove(opened)

    def end(self) -> None:
        """Close what an error left open; from now on nothing is finished any more."""
        with self.lock:
            self.stop.fail(Stopped())
            self.background.abandon()
            for opened in self.opened:
                opened.output.abandon()


def write_shards(plan: Plan, staging: Staging, *, progress: Progress | None = None) -> None:
    """Write those files of a plan that are not finished, and wait until the disk has them.

    What is measured goes into the journal of `staging`: distances from the tensors of the reference,
    of other computed tensors from their sources. `progress` is told the bytes and the tensor of each
    finished piece. For SHA-256 a file is read again when it is complete.
    """
    run = _Run(staging, plan.compared.reference, progress, sha256=plan.sha256)
    left = [shard for shard in plan.shards if shard.name not in staging.finished]
    try:
        share(run.tensors(left), run.write, plan.workers, run.stop)
        run.background.finish()
    finally:
        run.end()


def _distance(tensor: Lazy, reference: Stored, done: int, block: Bytes, work: Workspace) -> float:
    """Squared distance of a block, `done` bytes into its tensor, from the same elements of another."""
    bits, own_bits = DTYPE_BITS[reference.dtype], DTYPE_BITS[tensor.dtype]
    theirs = work.bytes("reference", block.nbytes * bits // own_bits)
    offset = reference.offset + done * bits // own_bits
    span = ByteRange(reference.path, offset, theirs.nbytes, reference.file_nbytes)
    work.files.read_into(span, theirs.data)
    return squared_distance(block, tensor.dtype, theirs, reference.dtype)
