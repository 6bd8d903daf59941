"""What all writing commands share: checks of places, plan, dry run, writing, and the report."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from streamshard.arithmetic import Change
from streamshard.checkpoint import INDEX_NAME
from streamshard.digests import ALGORITHM, DIGEST_NBYTES, file_record
from streamshard.distance import Distances, is_comparable
from streamshard.errors import (
    AdapterError,
    InputError,
    UsageError,
    WriteError,
    printable,
)
from streamshard.families import TORCH_DTYPES, with_dtype
from streamshard.files import (
    copy_file,
    disk_free,
    file_nbytes,
    sync_folder,
    write_new,
)
from streamshard.format import json_pieces, total_nbytes, total_parameters
from streamshard.identity import Identity, identity
from streamshard.inputs import active
from streamshard.journal import JOURNAL_NAME, FinishedShard
from streamshard.listing import name_problem
from streamshard.names import part_name
from streamshard.places import check_places
from streamshard.record import sealed
from streamshard.report import REPORT_NAME, Report, Streamed, new_report
from streamshard.report import finished as in_the_end
from streamshard.resources import memory_estimate, parse_size, worker_count
from streamshard.resuming import check_finished
from streamshard.staging import (
    Staging,
    check_beside,
    output_folder,
    places_beside,
    staged_nbytes,
)
from streamshard.tensors import Lazy, Stored
from streamshard.updates import cast
from streamshard.writer import Shard, index_pieces, plan_shards, write_shards

__all__ = ["DTYPES", "Job", "Options", "Plan", "check_places", "run"]

DTYPES = {"bf16": "BF16", "fp16": "F16", "fp32": "F32"}


@dataclass(frozen=True, slots=True)
class Plan:
    """What a run would do, known before any weight is read; handed to `on_plan`."""

    output: Path
    shards: tuple[Shard, ...]
    nbytes: int
    free_nbytes: int | None
    """None where the disk does not tell it."""
    workers: int
    memory_nbytes: int

    @property
    def tensor_nbytes(self) -> int:
        """Bytes of tensor data to write, headers not counted: what progress adds up to."""
        return sum(total_nbytes(shard.tensors) for shard in self.shards)

    def as_dict(self) -> Report:
        """The plan as the report of `--dry-run` shows it."""
        return {
            "files": [{"name": shard.name, "bytes": shard.nbytes} for shard in self.shards],
            "free_bytes": self.free_nbytes,
            "workers": self.workers,
            "memory_bytes": self.memory_nbytes,
        }


@dataclass(frozen=True, slots=True, kw_only=True)
class Options:
    """How to write; the same for every writing command.

    `max_shard_size` (bytes or "5GB") re-shards; by default files are those of the source. `dtype`
    is "keep", "bf16", "fp16" or "fp32". `max_memory` lowers the number of `workers`. `overwrite`
    replaces an output that exists once the new one is complete, and discards what an interrupted
    run with other inputs or options left. `sha256` adds the SHA-256 of all files to
    `streamshard.json`. `dry_run` checks everything and writes nothing. `on_plan` is called once
    before writing, `progress` with the bytes and the tensor of each finished piece.
    """

    max_shard_size: int | str | None = None
    dtype: str = "keep"
    workers: int | None = None
    max_memory: int | str | None = None
    overwrite: bool = False
    sha256: bool = False
    dry_run: bool = False
    on_plan: Callable[[Plan], None] | None = None
    progress: Callable[[int, str], None] | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Job:
    """What to write: tensors, their files, and what lies beside them.

    `side_files` maps names in the output to files that are copied as bytes. L2 is measured from the
    tensors of `reference`; if `compares_sources`, that of other tensors is from what they are made
    of. `facts` are further keys of the report.
    """

    command: str
    output: Path
    started: float
    tensors: Mapping[str, Lazy]
    shard_of: Mapping[str, str]
    metadata: Mapping[str, Mapping[str, str]]
    config: Mapping[str, Any] | None
    """`config.json` if it must be written anew; None to copy it."""
    config_name: str = "config.json"
    weights_name: str = "model.safetensors"
    """What the file of the weights is called if there is only one."""
    side_files: Mapping[str, Path]
    l2_from: str | None
    reference: Mapping[str, Stored] | None = None
    compares_sources: bool = False
    must_change: bool = False
    """Whether it is an error if everything written equals its source."""
    facts: Mapping[str, Any] = field(default_factory=dict)
    choices: Mapping[str, Any] = field(default_factory=dict)
    """Options of the command that the output depends on, named to users if a run cannot be continued."""


def run(job: Job, options: Options) -> Report:
    """Plan a job, execute it unless it is a dry run, and return the report."""
    tensors = _cast_all(job.tensors, options.dtype)
    shards = plan_shards(
        tensors,
        shard_of=job.shard_of,
        metadata=job.metadata,
        max_shard_size=_size(options.max_shard_size, "--max-shard-size"),
        single=job.weights_name,
    )
    job = replace(job, tensors={}, shard_of={})  # they are in the shards now
    _check_names(job, shards)
    plan = _plan(job, shards, options)
    if options.on_plan is not None:
        options.on_plan(plan)
    report: Report = {
        **new_report(job.command, tensors),
        "output": str(job.output),
        "bytes": plan.nbytes,
        "shards": len(shards),
        **job.facts,
        "update": None,
        "resumed": 0,
        "dry_run": options.dry_run,
        "plan": plan.as_dict() if options.dry_run else None,
    }
    if options.dry_run:
        check_beside(job.output)
    else:
        _write(job, plan, tensors, options, report)
    return in_the_end(report, job.started)


def _cast_all(tensors: Mapping[str, Lazy], dtype: str) -> Mapping[str, Lazy]:
    if dtype == "keep":
        return tensors
    if dtype not in DTYPES:
        raise UsageError(f"--dtype is {dtype!r}; keep, {', '.join(DTYPES)} can be chosen.")
    out = {}
    for name, tensor in tensors.items():
        try:
            out[name] = cast(tensor, DTYPES[dtype])
        except InputError as error:
            raise InputError(f"tensor '{printable(name)}': {error}") from error
    return out


def _size(size: int | str | None, option: str) -> int | None:
    if size is None:
        return None
    try:
        return parse_size(size)
    except ValueError as error:
        raise UsageError(f"{option}: {error}") from error


def _check_names(job: Job, shards: Sequence[Shard]) -> None:
    """Refuse files beside the weights that the output cannot have, before anything is written."""
    taken = {shard.name for shard in shards} | {INDEX_NAME, REPORT_NAME, JOURNAL_NAME}
    for name, file in job.side_files.items():
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


def _plan(job: Job, shards: Sequence[Shard], options: Options) -> Plan:
    nbytes = sum(shard.nbytes for shard in shards)
    free = disk_free(job.output.absolute())
    side = sum(file_nbytes(file) for file in job.side_files.values())
    needed = nbytes + side + 64 * 1024 * len(shards)
    # What an interrupted run has left is continued, or makes room.
    if free is not None and needed > free + staged_nbytes(job.output):
        raise WriteError(
            f"{printable(str(job.output))}: {needed:,} bytes are needed but {free:,} are free. "
            "Free some space, or choose an output on another disk."
        )
    count = worker_count(shards, options.workers, _size(options.max_memory, "--max-memory"))
    return Plan(job.output, tuple(shards), nbytes, free, count, memory_estimate(shards, count))


def _write(
    job: Job, plan: Plan, tensors: Mapping[str, Lazy], options: Options, report: Report
) -> None:
    """Write everything into place and put the distances into the report."""
    distances = _compared(job, tensors)
    reference = job.reference or {}
    if not all(name in distances.squared for name in reference):
        reference = {n: t for n, t in reference.items() if n in distances.squared}
    config = job.config
    if config is not None and options.dtype != "keep":
        config = with_dtype(config, TORCH_DTYPES[DTYPES[options.dtype]])
    beside: dict[str, Path | bytes] = dict(job.side_files)
    if config is not None:
        beside[job.config_name] = b"".join(json_pieces(config))
    inputs = active()
    if inputs is not None:
        target = plan.output.resolve()
        inputs.leave_out(target, *places_beside(target).values())
    with output_folder(
        plan.output,
        _identity(job, plan, reference, beside, options),
        names=_names(plan.shards, beside),
        overwrite=options.overwrite,
    ) as staging:
        how: dict[str, Any] = {
            "workers": plan.workers,
            "progress": options.progress,
            "sha256": options.sha256,
        }
        report["resumed"] = check_finished(plan.shards, staging, **how)
        write_shards(plan.shards, staging, reference=reference, **how)
        finished = [staging.finished[shard.name] for shard in plan.shards]
        for shard, found in zip(plan.shards, finished, strict=True):
            for name, value in zip(shard.tensors, found.squared, strict=True):
                if value and name in distances.squared:
                    distances.squared[name] = value
        if job.must_change and not any(any(found.squared) for found in finished):
            raise AdapterError(
                f"{printable(str(job.output))}: the updates change no weight: they cancel each other "
                "or are lost in rounding. Check --weight and lora_alpha. Nothing was written."
            )
        report["l2"] = distances.report()
        report["update"] = _update(finished)
        _write_beside(beside, staging)
        names = list(beside)
        if len(plan.shards) > 1:
            names.append(INDEX_NAME)
            write_new(staging.folder / names[-1], index_pieces(plan.shards))
        kept = {
            **report,
            "l2_per_tensor": Streamed(distances.norms),
            "digests": _digests(plan.shards, finished, staging.folder, names, options),
        }
        write_new(staging.folder / REPORT_NAME, sealed(json_pieces(in_the_end(kept, job.started))))
        if inputs is not None:
            inputs.end()


def _identity(
    job: Job,
    plan: Plan,
    reference: Mapping[str, Stored],
    beside: Mapping[str, Path | bytes],
    options: Options,
) -> Identity:
    """What must be the same for another run to continue this one."""

    def recipe() -> Iterator[Any]:
        for shard in plan.shards:
            yield shard.name
            yield shard.header()[0]
            yield from shard.tensors.values()
        for name, tensor in sorted(reference.items()):
            yield name
            yield tensor

    size = _size(options.max_shard_size, "--max-shard-size")
    chosen = {"max_shard_size": size, "dtype": options.dtype, **job.choices}
    return identity(command=job.command, options=chosen, recipe=recipe(), files=beside)


def _names(shards: Sequence[Shard], beside: Iterable[str]) -> set[str]:
    """Every file that is made on the way to an output."""
    weights = [name for shard in shards for name in (shard.name, part_name(shard.name))]
    return {*weights, *beside, INDEX_NAME, REPORT_NAME}


def _write_beside(files: Mapping[str, Path | bytes], staging: Staging) -> None:
    """Write what lies beside the weights."""
    made: set[Path] = set()
    for name, content in files.items():
        path = staging.folder / name
        made.update(staging.make_folders(path.parent))
        if isinstance(content, Path):
            copy_file(content, path)
        else:
            write_new(path, [content])
    for path in sorted(made, reverse=True):
        sync_folder(path)


def _update(finished: Sequence[FinishedShard]) -> dict[str, float] | None:
    """Norms of the updates as they should be and as they are after rounding; None without any.

    `unchanged` is the share of elements that an update was added to and that are as before.
    """
    change = Change()
    for shard in finished:
        change = change.plus(shard.change)
    if not change.updated:
        return None
    return {
        "intended": math.sqrt(change.intended),
        "effected": math.sqrt(change.effected),
        "unchanged": change.unchanged / change.updated,
    }


def _digests(
    shards: Sequence[Shard],
    finished: Sequence[FinishedShard],
    folder: Path,
    beside: Iterable[str],
    options: Options,
) -> dict[str, Any]:
    """The `digests` of `streamshard.json` (see `streamshard.digests`)."""
    files: dict[str, Any] = {}
    for shard, found in zip(shards, finished, strict=True):
        files[shard.name] = {"bytes": found.nbytes, "digest": found.digest}
        if options.sha256:
            files[shard.name]["sha256"] = found.sha256

    def tensors() -> Iterator[tuple[str, str]]:
        for shard, found in zip(shards, finished, strict=True):
            for place, name in enumerate(shard.tensors):
                first = DIGEST_NBYTES * place
                yield name, found.digests[first : first + DIGEST_NBYTES].hex()

    for name in beside:
        files[name] = file_record(folder / name, sha256=options.sha256)
    return {"algorithm": ALGORITHM, "files": files, "tensors": Streamed(tensors)}


def _compared(job: Job, tensors: Mapping[str, Lazy]) -> Distances:
    """Which tensors are compared, at distance 0 until measured."""
    known = job.reference or {}
    comparable = {
        name: tensor
        for name, tensor in tensors.items()
        if (is_comparable(tensor, known[name]) if name in known else job.compares_sources)
    }
    both = itertools.chain(known, tensors) if job.l2_from else ()
    skipped = sorted({name for name in both if name not in comparable})
    zeros = dict.fromkeys(comparable, 0.0)
    return Distances(job.l2_from, zeros, total_parameters(comparable), skipped)
