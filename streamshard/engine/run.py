"""What all writing commands share: a plan is made and carried out, and a report returned."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from streamshard.checkpoint.digests import ALGORITHM, DIGEST_NBYTES, file_record
from streamshard.checkpoint.file_names import INDEX_NAME, REPORT_NAME
from streamshard.checkpoint.header import total_parameters
from streamshard.checkpoint.json_files import json_pieces
from streamshard.checkpoint.record import sealed
from streamshard.checkpoint.recorded_files import name_problem
from streamshard.checkpoint.shards import Shard, index_pieces, plan_shards
from streamshard.disk.folders import sync_folder
from streamshard.disk.inputs import active
from streamshard.disk.new_files import copy_file, write_new
from streamshard.engine.beside_output import check_beside, check_writable
from streamshard.engine.fingerprint import Identity, identity
from streamshard.engine.job import Job, Options, Plan
from streamshard.engine.journal import JOURNAL_NAME, FinishedShard
from streamshard.engine.long_names import part_name
from streamshard.engine.output_path import check_inputs
from streamshard.engine.plan import cast_all, planned, size_option
from streamshard.engine.report import Report, Streamed, new_report, update
from streamshard.engine.report import finished as in_the_end
from streamshard.engine.resume import check_finished
from streamshard.engine.staging import Staging, output_folder
from streamshard.engine.writer import write_shards
from streamshard.errors import AdapterError, InputError, printable
from streamshard.tensors.comparing import Distances, is_comparable
from streamshard.tensors.lazy import Lazy, Stored

__all__ = ["run"]


def run(job: Job, options: Options) -> Report:
    """Plan a job, execute it unless it is a dry run, and return the report."""
    tensors = cast_all(job.tensors, options.dtype)
    shards = plan_shards(
        tensors,
        shard_of=job.shard_of,
        metadata=job.metadata,
        max_shard_size=size_option(options.max_shard_size, "--max-shard-size"),
        single=job.weights_name,
    )
    job = replace(job, tensors={}, shard_of={})  # they are in the shards now
    _check_names(job, shards)
    plan = planned(job, shards, options)
    check_inputs(job.output)
    if options.on_plan is not None:
        options.on_plan(plan)
    report: Report = {
        **new_report(job.command, tensors, job.layout),
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
        check_writable(job.output)
    else:
        _write(job, plan, tensors, options, report)
    return in_the_end(report, job.started)


def _check_names(job: Job, shards: Sequence[Shard]) -> None:
    """Refuse files beside the weights that the output cannot have, before anything is written."""
    taken = {shard.name for shard in shards} | {INDEX_NAME, REPORT_NAME, JOURNAL_NAME}
    for name, file in job.files.items():
        if isinstance(file, bytes):
            continue  # a config, under its own name
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


def _write(
    job: Job, plan: Plan, tensors: Mapping[str, Lazy], options: Options, report: Report
) -> None:
    """Write everything into place and put the distances into the report."""
    distances = _compared(job, tensors)
    reference = job.reference or {}
    if not all(name in distances.squared for name in reference):
        reference = {n: t for n, t in reference.items() if n in distances.squared}
    inputs = active()
    with output_folder(
        plan.output,
        _identity(job, plan, reference, options),
        names=_names(plan.shards, job.files),
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
        report["update"] = update(finished)
        _write_beside(job.files, staging)
        names = list(job.files)
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

    size = size_option(options.max_shard_size, "--max-shard-size")
    chosen = {"max_shard_size": size, "dtype": options.dtype, **job.choices}
    return identity(command=job.command, options=chosen, recipe=recipe(), files=job.files)


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


def _digests(
    shards: Sequence[Shard],
    finished: Sequence[FinishedShard],
    folder: Path,
    beside: Iterable[str],
    options: Options,
) -> dict[str, Any]:
    """The `digests` of `streamshard.json` (see `checkpoint/digests.py`)."""
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
