"""What all writing commands share: checks of places, plan, dry run, writing, and the report."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeAlias

from streamshard.distance import Distances, is_comparable
from streamshard.errors import (
    AdapterError,
    InputError,
    OutputError,
    UsageError,
    WriteError,
    printable,
)
from streamshard.families import TORCH_DTYPES, with_dtype
from streamshard.files import copy_files, disk_free, reading, write_new, writing
from streamshard.format import total_nbytes, total_parameters
from streamshard.report import REPORT_NAME, Report, finished, json_bytes, new_report
from streamshard.resources import memory_estimate, parse_size, worker_count
from streamshard.tensors import Lazy, Stored
from streamshard.updates import cast
from streamshard.writer import Shard, index_bytes, output_folder, plan_shards, write_shards

__all__ = ["DTYPES", "Job", "Options", "PathLike", "Plan", "check_places", "run"]

PathLike: TypeAlias = "str | os.PathLike[str]"

DTYPES = {"bf16": "BF16", "fp16": "F16", "fp32": "F32"}


@dataclass(frozen=True, slots=True)
class Plan:
    """What a run would do, known before any weight is read; handed to `on_plan`."""

    output: Path
    shards: tuple[Shard, ...]
    nbytes: int
    free_nbytes: int
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
    replaces an output that exists once the new one is complete. `dry_run` checks everything
    and writes nothing. `on_plan` is called once before writing, `progress` with the bytes and
    the tensor of each finished piece.
    """

    max_shard_size: int | str | None = None
    dtype: str = "keep"
    workers: int | None = None
    max_memory: int | str | None = None
    overwrite: bool = False
    dry_run: bool = False
    on_plan: Callable[[Plan], None] | None = None
    progress: Callable[[int, str], None] | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Job:
    """What to write: tensors, their files, and what lies beside them.

    `side_files` maps names in the output to files that are copied as bytes. With `reference`, L2 is
    measured from these tensors, otherwise from what the computed tensors were made of.
    `facts` are further keys of the report.
    """

    command: str
    output: Path
    started: float
    tensors: Mapping[str, Lazy]
    shard_of: Mapping[str, str]
    metadata: Mapping[str, Mapping[str, str]]
    config: Mapping[str, Any] | None
    """`config.json` if it must be written anew; None to copy it."""
    side_files: Mapping[str, Path]
    l2_from: str | None
    reference: Mapping[str, Stored] | None = None
    must_change: bool = False
    """Whether it is an error if everything written equals its source."""
    facts: Mapping[str, Any] = field(default_factory=dict)


def run(job: Job, options: Options) -> Report:
    """Plan a job, execute it unless it is a dry run, and return the report."""
    tensors = _cast_all(job.tensors, options.dtype)
    shards = plan_shards(
        tensors,
        shard_of=job.shard_of,
        metadata=job.metadata,
        max_shard_size=_size(options.max_shard_size, "--max-shard-size"),
    )
    plan = _plan(job, shards, options)
    if options.on_plan is not None:
        options.on_plan(plan)
    report: Report = {
        **new_report(job.command, tensors),
        "output": str(job.output),
        "bytes": plan.nbytes,
        "shards": len(shards),
        **job.facts,
        "dry_run": options.dry_run,
        "plan": plan.as_dict() if options.dry_run else None,
    }
    if not options.dry_run:
        _write(job, plan, tensors, options, report)
    return finished(report, job.started)


def check_places(target: Path, inputs: Iterable[Path], *, overwrite: bool) -> None:
    """Refuse an output that exists, is an input, or lies inside one (also through links)."""
    if not target.name and target != Path():
        raise OutputError(f"{printable(str(target))}: is no folder that can be written.")
    with writing(target, 0):
        _check_places(target, inputs, overwrite=overwrite)


def _check_places(target: Path, inputs: Iterable[Path], *, overwrite: bool) -> None:
    if target.is_symlink():
        raise OutputError(
            f"{printable(str(target))}: is a symbolic link, and links are never written through. "
            "Give the folder itself."
        )
    place = target.resolve()
    for path in inputs:
        folder = path.resolve() if path.is_dir() else path.resolve().parent
        # By identity and not only by name: bind mounts and case-insensitive disks have two names.
        if _is_within(place, folder) and (path.is_dir() or place == folder):
            raise OutputError(
                f"{printable(str(target))}: is, or lies inside, the input {printable(str(path))}. "
                "Inputs are never changed: choose an --output outside of it."
            )
        if _is_within(folder, place):
            raise OutputError(
                f"{printable(str(target))}: contains the input {printable(str(path))}, which "
                "replacing it would delete. Choose another --output."
            )
    if target.exists() and not overwrite:
        raise OutputError(
            f"{printable(str(target))}: exists. Choose another --output, or pass --overwrite."
        )
    if target.exists() and not _is_replaceable(target):
        raise OutputError(
            f"{printable(str(target))}: was not written by streamshard (it has no {REPORT_NAME}), and "
            "--overwrite replaces only what was: other files there would be lost. Choose another "
            "--output, or remove it yourself."
        )
    if target.is_mount():
        raise OutputError(
            f"{printable(str(target))}: is where a disk is mounted, which cannot be replaced. "
            f"Write to a folder inside it: {printable(str(target / 'merged'))}."
        )


def _is_replaceable(target: Path) -> bool:
    """Whether a folder is empty or our own, so that nobody's files are taken for an old output."""
    if not target.is_dir() or target.resolve() in (Path.cwd(), *Path.cwd().parents):
        return False
    with reading(target):
        names = [entry.name for entry in target.iterdir()]
    return not names or REPORT_NAME in names


def _is_within(path: Path, folder: Path) -> bool:
    return any(
        candidate == folder
        or (candidate.exists() and folder.exists() and candidate.samefile(folder))
        for candidate in (path, *path.parents)
    )


def _cast_all(tensors: Mapping[str, Lazy], dtype: str) -> dict[str, Lazy]:
    if dtype == "keep":
        return dict(tensors)
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


def _plan(job: Job, shards: Sequence[Shard], options: Options) -> Plan:
    nbytes = sum(shard.nbytes for shard in shards)
    free = disk_free(job.output.absolute())
    side = sum(file.stat().st_size for file in job.side_files.values())
    needed = nbytes + side + 64 * 1024 * len(shards)
    if needed > free:
        raise WriteError(
            f"{printable(str(job.output))}: {needed:,} bytes are needed but {free:,} are free. "
            "Free some space, or choose an --output on another disk."
        )
    count = worker_count(shards, options.workers, _size(options.max_memory, "--max-memory"))
    return Plan(job.output, tuple(shards), nbytes, free, count, memory_estimate(shards, count))


def _write(
    job: Job, plan: Plan, tensors: Mapping[str, Lazy], options: Options, report: Report
) -> None:
    """Write everything into place and put the distances into the report."""
    distances = _compared(job, tensors)
    with output_folder(plan.output, overwrite=options.overwrite) as staging:
        squared = write_shards(
            plan.shards,
            staging,
            workers=plan.workers,
            progress=options.progress,
            reference=job.reference and {name: job.reference[name] for name in distances.squared},
        )
        distances.squared |= squared
        if job.must_change and not any(squared.values()):
            raise AdapterError(
                f"{printable(str(job.output))}: the updates change no weight: they cancel each other "
                "or are lost in rounding. Check --weight and lora_alpha. Nothing was written."
            )
        report["l2"] = distances.report()
        config = job.config
        if config is not None and options.dtype != "keep":
            config = with_dtype(config, TORCH_DTYPES[DTYPES[options.dtype]])
        copied = {n: f for n, f in job.side_files.items() if n != "config.json" or config is None}
        copy_files(copied, staging)
        if config is not None:
            write_new(staging / "config.json", json_bytes(config))
        if len(plan.shards) > 1:
            write_new(staging / "model.safetensors.index.json", index_bytes(plan.shards))
        kept = finished({**report, "l2_per_tensor": distances.norms()}, job.started)
        write_new(staging / REPORT_NAME, json_bytes(kept))


def _compared(job: Job, tensors: Mapping[str, Lazy]) -> Distances:
    """Which tensors are compared, at distance 0 until measured."""
    if job.reference is None:
        comparable = dict(tensors) if job.l2_from is not None else {}
        skipped: list[str] = []
    else:
        known = job.reference
        comparable = {n: t for n, t in tensors.items() if n in known and is_comparable(t, known[n])}
        skipped = sorted((set(tensors) | set(known)) - set(comparable))
    zeros = dict.fromkeys(comparable, 0.0)
    return Distances(job.l2_from, zeros, total_parameters(comparable), skipped)
