"""Writing a checkpoint: plan every file, then stream the tensors into known places.

A plan is a list of shards whose headers, and so the place of every byte, are known before any
data. Several threads take tensors, in any order; the bytes of one tensor pass one thread in their
order, and what is measured of tensors is summed in the order of the file.
"""

from __future__ import annotations

import threading
from array import array
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TypeAlias

from streamshard.arithmetic import Change
from streamshard.digests import DIGEST_NBYTES, hash_file, new_digest, new_sha256, shard_digest
from streamshard.distance import squared_distance
from streamshard.errors import AdapterError, WriteError, printable
from streamshard.files import ByteRange, OutputFile, disk_free, rename, sync_folder
from streamshard.format import build_header, json_pieces, total_nbytes, total_parameters
from streamshard.journal import FinishedShard
from streamshard.names import part_name
from streamshard.staging import Staging
from streamshard.tensors import (
    DTYPE_BITS,
    Bytes,
    Lazy,
    NotFiniteError,
    Stored,
    Workspace,
)
from streamshard.threads import Background, Stop, Stopped, share
from streamshard.updates import TILE_ROWS

__all__ = ["Shard", "index_pieces", "plan_shards", "write_shards"]

# Measured on ext4: writes of 256 KB were fastest, 2 MB and more three times slower.
WRITE_BYTES = 256 * 1024
# What the disk is asked to begin with, and the progress is told, at a time.
NOTED_BYTES = 8 * 1024 * 1024

Progress: TypeAlias = Callable[[int, str], None]


@dataclass(frozen=True, slots=True)
class Shard:
    """One output file: its tensors in the order of their bytes, its metadata, its header's length."""

    name: str
    tensors: Mapping[str, Lazy]
    metadata: Mapping[str, str]
    header_nbytes: int

    @property
    def nbytes(self) -> int:
        """Length of the file."""
        return self.header_nbytes + total_nbytes(self.tensors)

    def header(self) -> tuple[bytes, dict[str, int]]:
        """The first bytes of the file, and where each tensor's data begins, in that order.

        Built each time: those of all shards of a large model together have many megabytes.
        """
        return build_header(self.tensors, self.metadata)


def plan_shards(
    tensors: Mapping[str, Lazy],
    *,
    shard_of: Mapping[str, str],
    metadata: Mapping[str, Mapping[str, str]],
    max_shard_size: int | None = None,
    single: str = "model.safetensors",
) -> list[Shard]:
    """Decide which tensor goes into which file.

    By default files are those of `shard_of` (tensor name to file name) with their `metadata`;
    with `max_shard_size` (bytes) tensors are split anew, in their order, by huggingface_hub. One file
    alone is called `single`.
    """
    files: dict[str, dict[str, Lazy]] = {}
    if max_shard_size is None:
        for name, tensor in tensors.items():
            files.setdefault(shard_of[name], {})[name] = tensor
        if len(files) == 1:
            (only,) = files
            metadata = {single: metadata.get(only, {})}
            files = {single: dict(tensors)}
    else:
        from huggingface_hub import split_state_dict_into_shards_factory

        split = split_state_dict_into_shards_factory(
            dict(tensors),
            get_storage_size=lambda tensor: tensor.nbytes,
            filename_pattern="model{suffix}.safetensors",
            max_shard_size=max_shard_size,
        )
        files = {
            file: {name: tensors[name] for name in names}
            for file, names in split.filename_to_tensors.items()
        }
        metadata = {}
    shards = []
    for file, members in sorted(files.items()):
        # Loaders up to transformers 4.57 fail without a format.
        entries = {"format": "pt", **metadata.get(file, {})}
        header, begins = build_header(members, entries)
        ordered = {name: members[name] for name in begins}
        shards.append(Shard(file, ordered, entries, len(header)))
    return shards


def index_pieces(shards: Sequence[Shard]) -> Iterator[bytes]:
    """`model.safetensors.index.json` as transformers writes it, in pieces."""
    index = {
        "metadata": {
            "total_parameters": sum(total_parameters(shard.tensors) for shard in shards),
            "total_size": sum(total_nbytes(shard.tensors) for shard in shards),
        },
        "weight_map": {name: shard.name for shard in shards for name in shard.tensors},
    }
    return json_pieces(index, sort_keys=True)


class _Open:
    """A shard that is being written."""

    def __init__(self, shard: Shard, folder: Path) -> None:
        free = disk_free(folder)
        if free < shard.nbytes:
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


class _Run:
    """The writing of shards into a staging folder."""

    def __init__(
        self,
        staging: Staging,
        reference: Mapping[str, Stored] | None,
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
        name, output = opened.names[place], opened.output
        tensor, begin = opened.shard.tensors[name], opened.begins[name]
        reference = None if self.reference is None else self.reference.get(name)
        digest, distance = new_digest(), 0.0
        work.change = Change()
        done = told = 0
        for block in _blocks(name, tensor, work):
            self.stop.check()
            output.write(block.data, begin + done)
            digest.update(block.data)
            if reference is not None:
                distance += _distance(tensor, reference, done, block, work)
            done += block.nbytes
            if done - told >= NOTED_BYTES:
                self.tell(output, name, begin + told, done - told)
                told = done
        self.tell(output, name, begin + told, done - told)
        squared = work.change.squared if reference is None else distance
        with self.lock:
            if opened.note(place, digest.digest(), squared, work.change):
                self.background.add(partial(self.finish, opened))

    def tell(self, output: OutputFile, name: str, offset: int, nbytes: int) -> None:
        """Have the disk begin with a range that was written, and tell the progress."""
        if nbytes >= WRITE_BYTES:  # 40,000 small ones would make a long queue
            self.background.add(partial(output.begin_sync, offset, nbytes))
        if nbytes and self.progress is not None:
            with self.lock:
                self.progress(nbytes, name)

    def finish(self, opened: _Open) -> None:
        """Wait until the disk has a shard, give it its name, and note it in the journal."""
        path = opened.output.path
        opened.output.sync()
        opened.output.close()
        sha256 = new_sha256() if self.sha256 else None
        if sha256 is not None:
            hash_file(path, sha256, going=self.stop.going)
        shard = opened.finished(None if sha256 is None else sha256.hexdigest())
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


def write_shards(
    shards: Sequence[Shard],
    staging: Staging,
    *,
    workers: int,
    reference: Mapping[str, Stored] | None = None,
    progress: Progress | None = None,
    sha256: bool = False,
) -> None:
    """Write those files of a plan that are not finished, and wait until the disk has them.

    What is measured goes into the journal of `staging`: distances from the tensors of `reference`
    (comparable ones, by name), of other computed tensors from their sources. `progress` is told the
    bytes and the tensor of each finished piece. With `sha256` a file is read again when it is complete.
    """
    run = _Run(staging, reference, progress, sha256=sha256)
    left = [shard for shard in shards if shard.name not in staging.finished]
    try:
        share(run.tensors(left), run.write, workers, run.stop)
        run.background.finish()
    finally:
        run.end()


def _blocks(name: str, tensor: Lazy, work: Workspace) -> Iterator[Bytes]:
    """The bytes of a tensor in order; each block is valid until the next one."""
    for piece in tensor.pieces:
        ranges = piece.ranges()
        if ranges is None:
            work.forget()
            try:
                yield from _computed(piece, work)
            except NotFiniteError as error:
                message = f"tensor '{printable(name)}', {error}. Nothing was written."
                raise AdapterError(message) from error
        else:
            for source in ranges:
                yield from _copied(source, work)


def _copied(source: ByteRange, work: Workspace) -> Iterator[Bytes]:
    work.files.check(source)
    buffer = work.bytes("out", WRITE_BYTES)
    for start in range(0, source.nbytes, WRITE_BYTES):
        nbytes = min(WRITE_BYTES, source.nbytes - start)
        part = ByteRange(source.path, source.offset + start, nbytes, source.file_nbytes)
        work.files.read_into(part, buffer[:nbytes].data)
        yield buffer[:nbytes]


def _computed(source: Lazy, work: Workspace) -> Iterator[Bytes]:
    row_nbytes = source.row_nbytes
    # Whole tiles of rows, at least one.
    step = max(WRITE_BYTES // max(row_nbytes, 1) // TILE_ROWS, 1) * TILE_ROWS
    for start in range(0, source.rows, step):
        stop = min(start + step, source.rows)
        rows = work.bytes("out", (stop - start) * row_nbytes)
        source.fill(start, stop, rows, work)
        for first in range(0, len(rows), WRITE_BYTES):
            yield rows[first : first + WRITE_BYTES]


def _distance(tensor: Lazy, reference: Stored, done: int, block: Bytes, work: Workspace) -> float:
    """Squared distance of a block, `done` bytes into its tensor, from the same elements of another."""
    bits, own_bits = DTYPE_BITS[reference.dtype], DTYPE_BITS[tensor.dtype]
    theirs = work.bytes("reference", block.nbytes * bits // own_bits)
    offset = reference.offset + done * bits // own_bits
    span = ByteRange(reference.path, offset, theirs.nbytes, reference.file_nbytes)
    work.files.read_into(span, theirs.data)
    return squared_distance(block, tensor.dtype, theirs, reference.dtype)
