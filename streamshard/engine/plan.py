"""From a job to its plan: which bytes go where, from what, with how many workers. Reads no weight."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from streamshard.checkpoint.file_names import INDEX_NAME, JOURNAL_NAME, REPORT_NAME
from streamshard.checkpoint.recorded_files import name_problem
from streamshard.checkpoint.shards import Shard, plan_shards
from streamshard.disk.far import is_any
from streamshard.disk.files import file_nbytes
from streamshard.disk.folders import disk_free
from streamshard.disk.inputs import active
from streamshard.engine.beside_output import staged_nbytes
from streamshard.engine.budget import Needs, goes_around_cache, worker_count
from streamshard.engine.division import shards_of
from streamshard.engine.fetching import fetching, read_by
from streamshard.engine.fingerprint import fingerprint
from streamshard.engine.job import Beside, Compared, Job, Options, Plan
from streamshard.engine.outlet import AT_ONCE
from streamshard.engine.output_path import check_inputs
from streamshard.errors import InputError, WriteError, both_bytes, printable
from streamshard.notes import noted
from streamshard.tensors.comparing import is_comparable
from streamshard.tensors.constructors import cast
from streamshard.tensors.dtypes import DTYPES
from streamshard.tensors.lazy import Lazy, Stored

__all__ = ["cast_all", "plan"]


def cast_all(tensors: Mapping[str, Lazy], dtype: str) -> Mapping[str, Lazy]:
    """All tensors in the dtype of that option."""
    if dtype == "keep":
        return tensors
    out = {}
    for name, tensor in tensors.items():
        try:
            out[name] = cast(tensor, DTYPES[dtype])
        except InputError as error:
            raise InputError(f"tensor '{printable(name)}': {error}") from error
    return out


def plan(job: Job, options: Options) -> Plan:
    """What a run of this job will do, all of it. Headers are read, and no weight.

    What the inputs hold is looked at when the plan is carried out, as far as it decides whether an
    interrupted run can be continued. Raises `WriteError` if the disk has no room for the output, unless
    that may be there already, written in parts; and `OutputError` if it would take the place of an input.
    """
    tensors = cast_all(job.tensors, options.dtype)
    shards = plan_shards(
        tensors,
        shard_of=job.shard_of,
        metadata=job.metadata,
        max_shard_size=options.max_shard_nbytes,
        single=job.weights_name,
    )
    _check_names(job.files, shards)
    nbytes = sum(shard.nbytes for shard in shards)
    room = _room(job, shards, keeps=options.outlet is None or options.outlet.keeps)
    needs = Needs.of(shards, hub=is_any() or options.outlet is not None)
    known, own = job.reference or {}, shards_of(shards, options.wanted)
    reference = (known[name] for shard in own for name in shard.tensors if name in known)
    download = fetching(read_by(own, reference, job.files.values()))
    short = room.short
    try:
        download.check_room(job.output, room.left)
    except WriteError as error:
        short = short or str(error)
    if short and options.wanted is None and options.scheduler is None:
        raise WriteError(short)
    direct = goes_around_cache(options.io, nbytes, needs, options.max_memory_nbytes)
    count = worker_count(needs, options.workers, options.max_memory_nbytes, direct=direct)
    compared = _compared(job, tensors)
    chosen = {"max_shard_size": options.max_shard_nbytes, "dtype": options.dtype, **job.choices}
    check_inputs(job.output)
    inputs = active()
    return Plan(
        command=job.command,
        output=job.output,
        layout=job.layout,
        shards=tuple(shards),
        files=job.files,
        compared=compared,
        must_change=job.must_change,
        facts={**job.facts, "warnings": noted()},
        fingerprint=fingerprint(job.command, chosen, _recipe(shards, compared.reference)),
        inputs={} if inputs is None else inputs.stamps,
        overwrite=options.overwrite,
        sha256=options.sha256,
        outlet=options.outlet,
        on_disk=room.at_once,
        disk_nbytes=room.needed,
        short=short,
        direct=direct,
        nbytes=nbytes,
        free_nbytes=room.free,
        download_nbytes=download.nbytes,
        download_free_nbytes=download.free_nbytes,
        workers=count,
        memory_nbytes=needs.nbytes(count, direct=direct),
    )


def _check_names(files: Mapping[str, Beside], shards: Sequence[Shard]) -> None:
    """Refuse files beside the weights that the output cannot have, before anything is written."""
    taken = {shard.name for shard in shards} | {INDEX_NAME, REPORT_NAME, JOURNAL_NAME}
    for name, file in files.items():
        if not isinstance(file, Path):
            continue  # made here, under its own name
        where, problem = printable(str(file)), name_problem(name)
        if problem is not None:
            raise InputError(
                f"{where}: its name {problem}, so {REPORT_NAME} could not list it and the output could "
                "not be verified. Rename the file, or move it out of the folder."
            )
        first = name.partition("/")[0]
        if first in taken:
            raise InputError(
                f"{where}: '{printable(first)}' is what a file of the output is called, and one of the "
                "two would be lost. Rename it, or move it out of the folder."
            )


class _Room(NamedTuple):
    """What the disk has free, if it tells; what is needed of it, and how much of that is not there yet.

    Then how many files of weights that is, and what to say if there is no room for it.
    """

    free: int | None
    needed: int
    left: int
    at_once: int | None
    short: str = ""


def _room(job: Job, shards: Sequence[Shard], *, keeps: bool) -> _Room:
    """The room there is for an output.

    Of one that does not stay here that is for some of its largest files, fewer if there is less room.
    """
    free = disk_free(job.output.absolute())
    side = sum(file_nbytes(file) for file in job.files.values() if isinstance(file, Path))
    side += 64 * 1024 * len(shards)
    sizes = sorted((shard.nbytes for shard in shards), reverse=True)
    # What an interrupted run has left is continued, or makes room.
    there_before = staged_nbytes(job.output)
    most = math.inf if free is None else free + there_before
    counts = [len(sizes)] if keeps else range(min(AT_ONCE, len(sizes)), 0, -1)
    needed = count = 0
    for count in counts:
        needed = sum(sizes[:count]) + side
        if needed <= most:
            break
    left, at_once = max(0, needed - there_before), None if keeps else count
    if needed <= most:
        return _Room(free, needed, left, at_once)
    what = "" if keeps else ", for one file at a time,"
    wanted, there = both_bytes(needed, free or 0)
    short = (
        f"{printable(str(job.output))}: {wanted} are needed{what} but {there} are free. "
        "Free some space, or choose an output on another disk."
    )
    return _Room(free, needed, left, at_once, short)


def _compared(job: Job, tensors: Mapping[str, Lazy]) -> Compared:
    """What is compared with what; names in the order in which the command made them."""
    known = job.reference or {}
    names = tuple(
        name
        for name, tensor in tensors.items()
        if (is_comparable(tensor, known[name]) if name in known else job.compares_sources)
    )
    comparable = frozenset(names)
    both = itertools.chain(known, tensors) if job.l2_from else ()
    if not known.keys() <= comparable:
        known = {name: tensor for name, tensor in known.items() if name in comparable}
    return Compared(
        source=job.l2_from,
        names=names,
        reference=known,
        parameters=sum(math.prod(tensors[name].shape) for name in names),
        skipped=tuple(sorted({name for name in both if name not in comparable})),
    )


def _recipe(shards: Sequence[Shard], reference: Mapping[str, Stored]) -> Iterator[Any]:
    for shard in shards:
        yield shard.name
        yield shard.header()[0]
        yield from shard.tensors.values()
    for name in sorted(reference):
        yield name
        yield reference[name]
