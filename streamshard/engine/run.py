"""What all writing commands share: a plan is made and carried out, and a report returned."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from streamshard.checkpoint.digests import ALGORITHM, DIGEST_NBYTES, file_record
from streamshard.checkpoint.file_names import INDEX_NAME, REPORT_NAME
from streamshard.checkpoint.header import total_parameters
from streamshard.checkpoint.json_files import json_pieces
from streamshard.checkpoint.record import sealed
from streamshard.checkpoint.shards import Shard, index_pieces
from streamshard.disk.folders import resolved, sync_folder
from streamshard.disk.inputs import active, watching
from streamshard.disk.new_files import copy_file, write_new
from streamshard.engine.beside_output import check_beside, check_writable, places_beside
from streamshard.engine.fetching import fetch, read_by
from streamshard.engine.fingerprint import Identity
from streamshard.engine.job import Beside, Compared, Job, Options, Plan
from streamshard.engine.journal import FinishedShard
from streamshard.engine.kept import as_kept
from streamshard.engine.long_names import part_name
from streamshard.engine.plan import plan
from streamshard.engine.report import Report, Streamed, exactness, new_report, update
from streamshard.engine.report import finished as in_the_end
from streamshard.engine.resume import check_finished
from streamshard.engine.staging import Staging, output_folder
from streamshard.engine.workers import OnStep, Progress
from streamshard.engine.writer import write_shards
from streamshard.errors import AdapterError, printable
from streamshard.tensors.comparing import Distances

__all__ = ["execute", "run"]


def run(job: Job, options: Options) -> Report:
    """Plan a job, carry it out unless it is a dry run, and return the report."""
    started = job.started
    made = plan(job, options)
    del job  # its tensors are in the shards now
    if options.on_plan is not None:
        options.on_plan(made)
    if options.dry_run:
        kept = check_beside(
            made.output,
            lambda: made.fingerprint.identity(made.files),
            overwrite=made.overwrite,
        )
        check_writable(made.output)
        return in_the_end(_report(made, kept=kept), started)
    return execute(
        made,
        progress=options.progress,
        on_step=options.on_step,
        on_distances=options.on_distances,
        started=started,
    )


def execute(
    made: Plan,
    *,
    progress: Progress | None = None,
    on_step: OnStep | None = None,
    on_distances: Callable[[Mapping[str, float]], None] | None = None,
    started: float | None = None,
) -> Report:
    """Do what a plan says, in this process or another one, and return the report.

    `started` (of `time.perf_counter`) is when the seconds of the report begin, by default now. Raises
    `ChangedError` if an input is no longer what was planned with.
    """
    started = time.perf_counter() if started is None else started
    report = _report(made)
    with contextlib.ExitStack() as stack:
        inputs = active() or stack.enter_context(watching())
        inputs.expect(made.inputs)
        target = resolved(made.output)
        inputs.leave_out(target, *places_beside(target).values())
        identity = made.fingerprint.identity(made.files)
        staging = stack.enter_context(
            output_folder(
                made.output,
                identity,
                names=_names(made.shards, made.files),
                overwrite=made.overwrite,
            )
        )
        told = on_step or (lambda *_: None)
        distances = _fill(made, staging, report, identity, progress, told, started)
        inputs.end()
    if on_distances is not None:
        on_distances(distances.squared)
    return in_the_end(report, started)


def _report(made: Plan, *, kept: Collection[str] | None = None) -> dict[str, Any]:
    """The report as far as a plan knows it.

    Of a dry run the plan itself is a part of it, and how many files an earlier run has finished that
    would be `kept`.
    """
    return {
        **new_report(made.command, {}, made.layout),
        "tensors": sum(len(shard.tensors) for shard in made.shards),
        "parameters": sum(total_parameters(shard.tensors) for shard in made.shards),
        "output": str(made.output),
        "bytes": made.nbytes,
        "shards": len(made.shards),
        **made.facts,
        "update": None,
        "exactness": None,
        "resumed": len(kept or ()),
        "dry_run": kept is not None,
        "plan": None if kept is None else made.as_dict(),
    }


def _fill(
    made: Plan,
    staging: Staging,
    report: dict[str, Any],
    identity: Identity,
    progress: Progress | None,
    on_step: OnStep,
    started: float,
) -> Distances:
    """Write everything into the folder where an output is built, and what is measured into the report."""
    resumed = check_finished(
        made.shards,
        staging,
        workers=made.workers,
        progress=progress,
        on_step=on_step,
        sha256=made.sha256,
    )
    left = [shard for shard in made.shards if shard.name not in staging.finished]
    own = {name for shard in left for name in shard.tensors}
    reference = (t for name, t in made.compared.reference.items() if name in own)
    fetch(read_by(left, reference, made.files.values()), on_step)
    write_shards(made, staging, progress=progress, on_step=on_step)
    finished = [staging.finished[shard.name] for shard in made.shards]
    if made.must_change and not any(any(found.squared) for found in finished):
        raise AdapterError(
            f"{printable(str(made.output))}: the updates change no weight: they cancel each other "
            "or are lost in rounding. Check --weight and lora_alpha. Nothing was written."
        )
    distances = _distances(made.compared, made.shards, finished)
    report |= {"resumed": resumed, "l2": distances.report(), "update": update(finished)}
    report["exactness"] = exactness(finished)
    _write_beside(made.files, staging, report)
    names = list(made.files)
    if len(made.shards) > 1:
        names.append(INDEX_NAME)
        write_new(staging.folder / names[-1], index_pieces(made.shards))
    kept = {
        **as_kept(report, identity),
        "l2_per_tensor": Streamed(distances.norms),
        "digests": _digests(made, finished, staging.folder, names),
    }
    write_new(staging.folder / REPORT_NAME, sealed(json_pieces(in_the_end(kept, started))))
    return distances


def _distances(
    compared: Compared, shards: Sequence[Shard], finished: Sequence[FinishedShard]
) -> Distances:
    """The distances of what is compared, as they were measured."""
    squared = dict.fromkeys(compared.names, 0.0)
    for shard, found in zip(shards, finished, strict=True):
        for name, value in zip(shard.tensors, found.squared, strict=True):
            if value and name in squared:
                squared[name] = value
    return Distances(compared.source, squared, compared.parameters, list(compared.skipped))


def _names(shards: Sequence[Shard], beside: Iterable[str]) -> set[str]:
    """Every file that is made on the way to an output."""
    weights = [name for shard in shards for name in (shard.name, part_name(shard.name))]
    return {*weights, *beside, INDEX_NAME, REPORT_NAME}


def _write_beside(files: Mapping[str, Beside], staging: Staging, report: Mapping[str, Any]) -> None:
    """Write what lies beside the weights."""
    made: set[Path] = set()
    for name, content in files.items():
        path = staging.folder / name
        made.update(staging.make_folders(path.parent))
        if isinstance(content, Path):
            copy_file(content, path)
        else:
            write_new(path, [content if isinstance(content, bytes) else content.content(report)])
    for path in sorted(made, reverse=True):
        sync_folder(path)


def _digests(
    made: Plan, finished: Sequence[FinishedShard], folder: Path, beside: Iterable[str]
) -> dict[str, Any]:
    """The `digests` of `streamshard.json` (see `checkpoint/digests.py`)."""
    files: dict[str, Any] = {}
    for shard, found in zip(made.shards, finished, strict=True):
        files[shard.name] = {"bytes": found.nbytes, "digest": found.digest}
        if made.sha256:
            files[shard.name]["sha256"] = found.sha256

    def tensors() -> Iterator[tuple[str, str]]:
        for shard, found in zip(made.shards, finished, strict=True):
            for place, name in enumerate(shard.tensors):
                first = DIGEST_NBYTES * place
                yield name, found.digests[first : first + DIGEST_NBYTES].hex()

    for name in beside:
        files[name] = file_record(folder / name, sha256=made.sha256)
    return {"algorithm": ALGORITHM, "files": files, "tensors": Streamed(tensors)}
