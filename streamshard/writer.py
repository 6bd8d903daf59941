"""Writing a checkpoint: plan every file, then stream the tensors into known places.

A plan is a list of shards whose headers, and so the place of every byte, are known before any
data. Work is cut into units by shapes and constants only; several threads take units in any
order, and what they measure is summed in the order of the units.
"""

from __future__ import annotations

import contextlib
import errno
import glob
import json
import os
import platform
import shutil
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypeAlias

from streamshard.arithmetic import Change
from streamshard.distance import squared_distance
from streamshard.errors import AdapterError, OutputError, printable
from streamshard.files import (
    ByteRange,
    Files,
    OutputFile,
    sync_folder,
    write_new,
    writing,
)
from streamshard.format import build_header, total_nbytes, total_parameters
from streamshard.tensors import (
    DTYPE_BITS,
    Bytes,
    Lazy,
    NotFiniteError,
    Stored,
    Workspace,
)
from streamshard.updates import TILE_ROWS

__all__ = ["Shard", "index_bytes", "output_folder", "plan_shards", "write_shards"]

# Measured on ext4: writes of 256 KB were fastest, 2 MB and more three times slower.
WRITE_BYTES = 256 * 1024
UNIT_BYTES = 8 * 1024 * 1024

Progress: TypeAlias = Callable[[int, str], None]


@dataclass(frozen=True, slots=True)
class Shard:
    """One output file: its header, and where each tensor's data begins."""

    name: str
    header: bytes
    tensors: Mapping[str, Lazy]
    begins: Mapping[str, int]

    @property
    def nbytes(self) -> int:
        """Length of the file."""
        return len(self.header) + total_nbytes(self.tensors)


def plan_shards(
    tensors: Mapping[str, Lazy],
    *,
    shard_of: Mapping[str, str],
    metadata: Mapping[str, Mapping[str, str]],
    max_shard_size: int | None = None,
) -> list[Shard]:
    """Decide which tensor goes into which file.

    By default files are those of `shard_of` (tensor name to file name) with their `metadata`;
    with `max_shard_size` (bytes) tensors are split anew, in their order, by huggingface_hub.
    """
    files: dict[str, dict[str, Lazy]] = {}
    if max_shard_size is None:
        for name, tensor in tensors.items():
            files.setdefault(shard_of[name], {})[name] = tensor
        if len(files) == 1:
            (only,) = files
            metadata = {"model.safetensors": metadata.get(only, {})}
            files = {"model.safetensors": dict(tensors)}
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
        header, begins = build_header(members, {"format": "pt", **metadata.get(file, {})})
        shards.append(Shard(file, header, members, begins))
    return shards


def index_bytes(shards: Sequence[Shard]) -> bytes:
    """`model.safetensors.index.json` as transformers writes it."""
    index = {
        "metadata": {
            "total_parameters": sum(total_parameters(shard.tensors) for shard in shards),
            "total_size": sum(total_nbytes(shard.tensors) for shard in shards),
        },
        "weight_map": {name: shard.name for shard in shards for name in shard.tensors},
    }
    return (json.dumps(index, indent=2, sort_keys=True, ensure_ascii=False) + "\n").encode()


@contextlib.contextmanager
def output_folder(target: Path, *, overwrite: bool) -> Iterator[Path]:
    """A staging folder beside `target` that takes its place when the block succeeds.

    If the block raises, the staging folder is removed and `target` is as it was.
    """
    if target.exists() and not overwrite:
        raise OutputError(
            f"{printable(str(target))}: exists. Choose another output, or pass --overwrite."
        )
    target = target.resolve()  # "." has no name
    start = f".{target.name}.partial-{platform.node()}-"
    staging = target.with_name(f"{start}{os.getpid()}")
    made = [folder for folder in target.parents if not folder.exists()]
    try:
        with writing(staging, 0):
            target.parent.mkdir(parents=True, exist_ok=True)
            _remove_stale(target.parent, start)
            staging.mkdir()
        yield staging
        sync_folder(staging)
        _replace(staging, target, overwrite=overwrite)
    except BaseException:
        shutil.rmtree(staging, ignore_errors=True)
        for folder in made:
            with contextlib.suppress(OSError):
                folder.rmdir()
        raise
    sync_folder(target.parent)


def _remove_stale(folder: Path, start: str) -> None:
    """Remove what killed runs on this machine left for the same output."""
    for left in folder.glob(glob.escape(start) + "*"):
        import psutil

        number = left.name[len(start) :]
        if number.isdecimal() and (
            int(number) == os.getpid() or not psutil.pid_exists(int(number))
        ):
            shutil.rmtree(left, ignore_errors=True)


def _replace(staging: Path, target: Path, *, overwrite: bool) -> None:
    old = target.with_name(f".{target.name}.old-{os.getpid()}")
    with writing(target, 0):
        if overwrite and target.exists():
            target.rename(old)
        try:
            # Fails if another run has put its output there in the meantime.
            staging.rename(target)
        except BaseException as error:
            if old.exists() and not target.exists():
                old.rename(target)
            if isinstance(error, OSError) and error.errno in (errno.ENOTEMPTY, errno.EEXIST):
                raise OutputError(
                    f"{printable(str(target))}: appeared while this run was writing. Two runs have "
                    "one output: choose another for one of them."
                ) from error
            raise
    shutil.rmtree(old, ignore_errors=True)


@dataclass(frozen=True, slots=True)
class _Unit:
    """A range of rows (or of bytes, where bytes are preserved) of one piece of a tensor."""

    shard: int
    name: str
    place: int  # among the units of the whole run
    dtype: str
    reference: Stored | None  # to measure the distance from
    at: int  # place in the tensor, in bytes
    source: Lazy | ByteRange
    start: int
    stop: int
    offset: int  # in the output file
    nbytes: int


def _units(shards: Sequence[Shard], reference: Mapping[str, Stored]) -> Iterator[_Unit]:
    place = 0
    for number, shard in enumerate(shards):
        for name in sorted(shard.tensors, key=shard.begins.__getitem__):
            tensor, begin = shard.tensors[name], shard.begins[name]
            offset = begin
            for piece in tensor.pieces:
                ranges = piece.ranges()
                sources: Sequence[Lazy | ByteRange] = (piece,) if ranges is None else ranges
                for source in sources:
                    if isinstance(source, Lazy):
                        row_nbytes, count = source.row_nbytes, source.rows
                        step = _rows_of(UNIT_BYTES, row_nbytes)
                    else:
                        row_nbytes, count, step = 1, source.nbytes, UNIT_BYTES
                    for start in range(0, count, step):
                        stop = min(start + step, count)
                        nbytes = (stop - start) * row_nbytes
                        yield _Unit(
                            shard=number,
                            name=name,
                            place=place,
                            dtype=tensor.dtype,
                            reference=reference.get(name),
                            at=offset - begin,
                            source=source,
                            start=start,
                            stop=stop,
                            offset=offset,
                            nbytes=nbytes,
                        )
                        place += 1
                        offset += nbytes


@dataclass
class _Run:
    """The state that the workers of one run share."""

    shards: Sequence[Shard]
    folder: Path
    files: Files
    progress: Progress | None
    units: Iterator[_Unit]
    syncer: ThreadPoolExecutor
    compares: bool
    lock: threading.Lock = field(default_factory=threading.Lock)
    stop: threading.Event = field(default_factory=threading.Event)
    error: BaseException | None = None
    outputs: dict[int, OutputFile] = field(default_factory=dict)
    left: dict[int, int] = field(default_factory=dict)
    syncs: list[Future[None]] = field(default_factory=list)
    squared: dict[int, tuple[str, float]] = field(default_factory=dict)

    def take(self) -> tuple[_Unit, OutputFile] | None:
        """The next unit and the file it goes to."""
        with self.lock:
            unit = None if self.stop.is_set() else next(self.units, None)
            if unit is None:
                return None
            if unit.shard not in self.outputs:
                try:
                    self.begin(unit.shard)
                except BaseException as error:
                    self.fail(error)
                    raise
            return unit, self.outputs[unit.shard]

    def begin(self, number: int) -> None:
        """Create the file of a shard and write its header."""
        shard = self.shards[number]
        output = OutputFile(self.folder / shard.name, shard.nbytes)
        self.outputs[number] = output
        self.left[number] = shard.nbytes - len(shard.header)
        output.write(memoryview(shard.header), 0)

    def fail(self, error: BaseException) -> None:
        """Stop all workers; the first error is the one that is reported."""
        self.error = self.error or error
        self.stop.set()

    def finished(self, unit: _Unit, squared: float) -> None:
        """Take note of a finished unit; the last one of a file has the file synced."""
        with self.lock:
            if squared:
                self.squared[unit.place] = (unit.name, squared)
            output = self.outputs[unit.shard]
            self.syncer.submit(output.begin_sync, unit.offset, unit.nbytes)
            self.left[unit.shard] -= unit.nbytes
            if not self.left[unit.shard]:
                self.syncs.append(self.syncer.submit(_finish, output))
            if self.progress is not None:
                self.progress(unit.nbytes, unit.name)

    def work(self) -> None:
        """What one worker does until there are no more units."""
        workspace = Workspace(self.files)
        last = None
        try:
            while (taken := self.take()) is not None:
                unit, output = taken
                workspace.change = Change()
                if isinstance(unit.source, Lazy):
                    if unit.source is not last:
                        workspace.forget()
                        last = unit.source
                    blocks = _computed(unit, unit.source, workspace)
                else:
                    blocks = _copied(unit, unit.source, workspace)
                distance = 0.0
                done = 0
                for block in blocks:
                    output.write(block.data, unit.offset + done)
                    if unit.reference is not None:
                        distance += _distance(unit, unit.reference, done, block, workspace)
                    done += block.nbytes
                self.finished(unit, distance if self.compares else workspace.change.effected)
        except BaseException as error:  # noqa: BLE001 - raised again by the thread that waits
            self.fail(error)


def write_shards(
    shards: Sequence[Shard],
    folder: Path,
    *,
    workers: int,
    reference: Mapping[str, Stored] | None = None,
    progress: Progress | None = None,
) -> dict[str, float]:
    """Write the files of a plan into `folder` and wait until the disk has them.

    `progress` is told the bytes and the tensor of each finished unit. Returns the sums of squared
    differences that are not 0: of what was written from `reference` (comparable tensors by name) if
    that is given, otherwise of computed tensors from their sources.
    """
    from threadpoolctl import threadpool_limits

    with (
        contextlib.closing(Files()) as files,
        ThreadPoolExecutor(1, thread_name_prefix="sync") as syncer,
        # One BLAS thread a worker: the bits of a product depend on the number of threads.
        threadpool_limits(1, user_api="blas"),
    ):
        units = _units(shards, reference or {})
        run = _Run(shards, folder, files, progress, units, syncer, compares=reference is not None)
        threads = [threading.Thread(target=run.work, daemon=True) for _ in range(workers)]
        try:
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join()
            if run.error is not None:
                raise run.error
            for number, shard in enumerate(shards):
                if number not in run.left:  # every tensor in it is empty
                    write_new(folder / shard.name, shard.header)
            for sync in run.syncs:
                sync.result()
        finally:
            run.stop.set()
            for thread in threads:
                if thread.ident is not None:
                    thread.join()
            syncer.shutdown(cancel_futures=True)
            for output in run.outputs.values():
                output.close()
    squared: dict[str, float] = {}
    for place in sorted(run.squared):
        name, value = run.squared[place]
        squared[name] = squared.get(name, 0.0) + value
    return squared


def _rows_of(nbytes: int, row_nbytes: int) -> int:
    """Whole tiles of rows in about `nbytes`, at least one tile."""
    return max(nbytes // max(row_nbytes, 1) // TILE_ROWS, 1) * TILE_ROWS


def _finish(output: OutputFile) -> None:
    output.sync()
    output.close()


def _copied(unit: _Unit, source: ByteRange, work: Workspace) -> Iterator[Bytes]:
    """The bytes of a unit, in blocks to write."""
    work.files.check(source)
    buffer = work.bytes("out", WRITE_BYTES)
    for start in range(unit.start, unit.stop, WRITE_BYTES):
        nbytes = min(WRITE_BYTES, unit.stop - start)
        part = ByteRange(source.path, source.offset + start, nbytes, source.file_nbytes)
        work.files.read_into(part, buffer[:nbytes].data)
        yield buffer[:nbytes]


def _computed(unit: _Unit, source: Lazy, work: Workspace) -> Iterator[Bytes]:
    """The rows of a unit, in blocks to write."""
    row_nbytes = source.row_nbytes
    step = _rows_of(WRITE_BYTES, row_nbytes)
    for start in range(unit.start, unit.stop, step):
        stop = min(start + step, unit.stop)
        rows = work.bytes("out", (stop - start) * row_nbytes)
        try:
            source.fill(start, stop, rows, work)
        except NotFiniteError as error:
            message = f"tensor '{printable(unit.name)}', {error}. Nothing was written."
            raise AdapterError(message) from error
        for first in range(0, len(rows), WRITE_BYTES):
            yield rows[first : first + WRITE_BYTES]


def _distance(unit: _Unit, reference: Stored, done: int, block: Bytes, work: Workspace) -> float:
    """Squared distance of a block from the same elements of the reference."""
    bits, own_bits = DTYPE_BITS[reference.dtype], DTYPE_BITS[unit.dtype]
    offset = reference.offset + (unit.at + done) * bits // own_bits
    theirs = work.bytes("reference", block.nbytes * bits // own_bits)
    span = ByteRange(reference.path, offset, theirs.nbytes, reference.file_nbytes)
    work.files.read_into(span, theirs.data)
    return squared_distance(block, unit.dtype, theirs, reference.dtype)
