"""What all writing commands share: a plan is made and carried out, and a report returned."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from streamshard.checkpoint.digests import ALGORITHM, DIGEST_NBYTES, file_record
from streamshard.checkpoint.file_names import INDEX_NAME, REPORT_NAME
from streamshard.checkpoint.header import total_parameters
from streamshard.checkpoint.json_files import json_pieces
from streamshard.checkpoint.record import sealed
from streamshard.checkpoint.shards import Shard, index_pieces
from streamshard.disk.folders import resolved, sync_folder
from streamshard.disk.inputs import Inputs, active, watching
from streamshard.disk.new_files import copy_file, write_new
from streamshard.engine.beside_output import Kept, check_beside, check_writable, places_beside
from streamshard.engine.division import who_does_what
from streamshard.engine.fetching import fetch, read_by
from streamshard.engine.fingerprint import Identity, identity_digest
from streamshard.engine.job import Beside, Compared, Job, Options, Plan
from streamshard.engine.journal import FinishedShard
from streamshard.engine.kept import as_kept
from streamshard.engine.long_names import part_name
from streamshard.engine.option_values import Part
from streamshard.engine.parts_folder import refuse_parts
from streamshard.engine.plan import plan
from streamshard.engine.report import Report, Streamed, exactness, new_report, odd_values, update
from streamshard.engine.report import finished as in_the_end
from streamshard.engine.resume import check_finished
from streamshard.engine.sending import Publishing
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
        return in_the_end(_dry(made, options.wanted), started)
    if options.wanted is not None:
        return _part(made, options.wanted, options, started)
    if options.scheduler is not None:
        report = _part(made, Part(1, 1), options, started)
        return Report({**report, "part": None, "scheduler": options.scheduler})
    return execute(
        made,
        progress=options.progress,
        on_step=options.on_step,
        on_distances=options.on_distances,
        started=started,
    )


def _dry(made: Plan, part: Part | None) -> dict[str, Any]:
    """The report of a dry run: everything is looked at, and nothing written."""
    if part is not None:
        from streamshard.engine.parts import Output  # most runs need none of this in memory

        output = Output(made, part, made.fingerprint.identity(made.files))
        there = output.completed()
        if there is None:
            output.check_place()
            output.look(before=True)
            if not part.number:
                output.refuse_unfinished()
        check_writable(made.output)
        told = output.told(
            {**_report(made, kept=()), **_there(made, there)}, complete=there is not None
        )
        told["plan"]["parts"] = who_does_what(made.shards, part)
        return told
    if not made.overwrite:
        refuse_parts(resolved(made.output), overwrite=False)
    identity = partial(made.fingerprint.identity, made.files)
    kept = check_beside(made.output, identity, overwrite=made.overwrite)
    check_writable(made.output)
    report = _report(made, kept=kept.finished)
    if (done := _committed(made, kept)) is None:
        return {**report, **_there(made)}
    report["plan"]["committed"] = done["commit"]
    return {**report, "pushed": done}


def _committed(made: Plan, kept: Kept) -> dict[str, Any] | None:
    """What an interrupted run has put in its place and did not hear of; None if it has not."""
    if made.outlet is None or (noted := kept.elsewhere.get(made.outlet.key)) is None:
        return None
    version = made.outlet.find(noted.ready, noted.seen) if noted.ready else None
    return None if version is None else made.outlet.described(version, sorted(made.names), None)


def _there(made: Plan, done: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """What a report says of where the output is to go, or went if it is `done`."""
    if made.outlet is None:
        return {}
    if done is not None:
        return {"pushed": done["pushed"]}
    target = made.outlet.look(made.names, overwrite=made.overwrite)
    warnings = [*made.facts["warnings"], *target.warnings]
    return {
        "warnings": warnings,
        "pushed": made.outlet.described(target.version, sorted(made.names), target),
    }


def _part(made: Plan, part: Part, options: Options, started: float) -> Report:
    """Do one part of a plan, and all that is left if it was the last one."""
    from streamshard.engine.adopting import adopting
    from streamshard.engine.cluster import Cluster
    from streamshard.engine.parts import Output, run_part

    with _watched(made):
        identity = made.fingerprint.identity(made.files)
        output = Output(made, part, identity)
        report = run_part(
            output,
            lambda: _report(made),
            lambda: execute(
                made,
                progress=options.progress,
                on_step=options.on_step,
                on_distances=options.on_distances,
                started=started,
                identity=identity,
                adopt=adopting(output),
            ),
            progress=options.progress,
            on_step=options.on_step or (lambda *_: None),
            cluster=None if options.scheduler is None else Cluster(options.scheduler),
        )
    return in_the_end(report, started)


def execute(
    made: Plan,
    *,
    progress: Progress | None = None,
    on_step: OnStep | None = None,
    on_distances: Callable[[Mapping[str, float]], None] | None = None,
    started: float | None = None,
    identity: Identity | None = None,
    adopt: Callable[[Staging], None] | None = None,
) -> Report:
    """Do what a plan says, in this process or another one, and return the report.

    `started` (of `time.perf_counter`) is when the seconds of the report begin, by default now. The
    `identity` is worked out if it is not known yet. `adopt` is of the last part of an output (see
    `parts.py`). Raises `ChangedError` if an input is no longer what was planned with.
    """
    started = time.perf_counter() if started is None else started
    report = _report(made)
    with _watched(made) as inputs, contextlib.ExitStack() as stack:
        identity = made.fingerprint.identity(made.files) if identity is None else identity
        report["fingerprint"] = identity_digest(identity)
        staging = stack.enter_context(
            output_folder(
                made.output,
                identity,
                names=_names(made.shards, made.files),
                overwrite=made.overwrite,
                adopt=adopt,
                keeps=made.outlet is None or made.outlet.keeps,
            )
        )
        told = on_step or (lambda *_: None)
        distances = _fill(made, staging, report, identity, progress, told, started)
        inputs.end()
    if on_distances is not None:
        on_distances(distances.squared)
    return in_the_end(report, started)


@contextlib.contextmanager
def _watched(made: Plan) -> Iterator[Inputs]:
    """What notes the files that are read, and knows those with which the plan was made."""
    with contextlib.ExitStack() as stack:
        inputs = active() or stack.enter_context(watching())
        inputs.expect(made.inputs)
        target = resolved(made.output)
        inputs.leave_out(target, *places_beside(target).values())
        yield inputs


def _report(made: Plan, *, kept: Collection[str] | None = None) -> dict[str, Any]:
    """The report as far as a plan knows it.

    Of a dry run the plan itself is a part of it, and how many files an earlier run has finished that
    would be `kept`.
    """
    return {
        **new_report(made.command, {}, made.layout),
        "tensors": sum(len(shard.tensors) for shard in made.shards),
        "parameters": sum(total_parameters(shard.tensors) for shard in made.shards),
        "output": None if made.outlet is not None and not made.outlet.keeps else str(made.output),
        "bytes": made.nbytes,
        "shards": len(made.shards),
        **made.facts,
        "update": None,
        "exactness": None,
        "fingerprint": None,
        "part": None,
        "pushed": None,
        "scheduler": None,
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
    publishing = None
    if made.outlet is not None:
        publishing = Publishing(made.outlet, staging, made.names, overwrite=made.overwrite)
        report["warnings"] += publishing.warnings
    gone = set() if publishing is None else publishing.gone()
    resumed = len(gone) + check_finished(
        [shard for shard in made.shards if shard.name not in gone],
        staging,
        workers=made.workers,
        progress=progress,
        on_step=on_step,
        sha256=made.sha256 or publishing is not None,
    )
    left = [shard for shard in made.shards if shard.name not in staging.finished]
    inputs = read_by(left, made.compared.references(left), made.files.values())
    fetch(inputs, on_step, check=made.sha256)
    write_shards(made, staging, progress=progress, on_step=on_step)
    finished = [staging.finished[shard.name] for shard in made.shards]
    if made.must_change and not any(any(found.squared) for found in finished):
        raise AdapterError(
            f"{printable(str(made.output))}: the updates change no weight: they cancel each other "
            "or are lost in rounding. Check --weight and lora_alpha. Nothing was written."
        )
    report["warnings"] += odd_values(made.shards, finished)
    distances = _distances(made.compared, made.shards, finished)
    report |= {"resumed": resumed, "l2": distances.report(), "update": update(finished)}
    report["exactness"] = exactness(finished)
    if publishing is None or not publishing.is_ready:
        staging.drop_ready()
        _write_rest(made, staging, report, identity, distances, started)
        if publishing is not None:
            publishing.note_ready()
    if publishing is not None:
        report["pushed"] = publishing.finish(on_step)
    return distances


def _write_rest(
    made: Plan,
    staging: Staging,
    report: dict[str, Any],
    identity: Identity,
    distances: Distances,
    started: float,
) -> None:
    """Write what lies beside the weights: files, index, and the record of all."""
    finished = [staging.finished[shard.name] for shard in made.shards]
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
