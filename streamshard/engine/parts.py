"""An output in parts: any number of processes, on any number of machines, write some shards each.

Every part makes the same plan, which takes headers only, and does those of its shards that nobody has
finished yet. Whoever finds all of them finished, or is told to (`--part finish`), completes the output
as a run that continues: it takes the finished files into its own folder, reads them again, and goes on
from there (`run.py`).
"""

from __future__ import annotations

import contextlib
import logging
import time
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import replace
from typing import Any

from streamshard.disk.folders import exists, resolved
from streamshard.disk.inputs import active
from streamshard.engine.beside_output import (
    Kept,
    check_beside,
    finished_beside,
    places_beside,
    tidy,
)
from streamshard.engine.claims import check_replaceable
from streamshard.engine.cluster import Cluster
from streamshard.engine.completed import completed, lacks_its_name, record_in
from streamshard.engine.division import of_neighbour, shards_of
from streamshard.engine.fetching import fetch, read_by
from streamshard.engine.fingerprint import Identity, identity_digest
from streamshard.engine.job import Plan
from streamshard.engine.option_values import Part
from streamshard.engine.parts_cleanup import is_gone
from streamshard.engine.parts_files import Shared, shared_by
from streamshard.engine.parts_folder import PartsFolder, discard_parts, opened_parts, shared_parts
from streamshard.engine.report import Report
from streamshard.engine.resume import check_of_others
from streamshard.engine.sending import begin
from streamshard.engine.staging import place_completed
from streamshard.engine.workers import OnStep, Progress
from streamshard.engine.writer import write_shards
from streamshard.errors import (
    BusyError,
    ClusterError,
    HubError,
    OutputError,
    ReadError,
    StreamshardError,
    WriteError,
    add_to,
    listed,
    printable,
)

__all__ = ["Output", "run_part"]

TRIES = 100
PAUSE_SECONDS = 0.3
"""How long another one may hold the output's lock only to look, on the slowest disk: half a minute."""

_log = logging.getLogger(__name__)


class Output:
    """An output in parts, as one of them finds it."""

    def __init__(self, made: Plan, part: Part, identity: Identity) -> None:
        self.made, self.part = made, part
        self.target = resolved(made.output)
        self._identity, self._digest = identity, identity_digest(identity)
        names = [shard.name for shard in made.shards]
        self.shared: Shared = shared_by(identity, names, made.outlet)
        self.mine = [*shards_of(made.shards, part)]
        self.resumed = 0
        """How many shards of this part were finished before."""
        self._warnings: list[str] = []
        self._finished: set[str] = set()

    def completed(self) -> dict[str, Any] | None:
        """The report of the output if it is there, has all of its files, and is of this very plan."""
        return completed(self.made, self._digest)

    def place_completed(self) -> None:
        """Give the output its name if one who completed it was killed, or lost its disk, right before.

        No part has anything else left of it then: each would find nothing but its own files missing.
        """
        with contextlib.suppress(BusyError):
            place_completed(
                self.target,
                overwrite=self.made.overwrite,
                is_complete=lambda folder: record_in(folder, self._digest) is not None,
            )

    def check_place(self) -> None:
        """Raise `OutputError` if there is an output that is not to be replaced, or of another run.

        And `WriteError` if there is no room for it.
        """
        tidy(self.target)
        if exists(self.target):
            check_replaceable(self.target, overwrite=self.made.overwrite)
        self._finished.update(self._staged(check_beside))
        if self.made.short:
            raise WriteError(self.made.short)

    def _staged(self, look: Callable[..., Kept]) -> Collection[str]:
        """What was taken into the folder where the output is completed, or begun there."""
        return look(self.target, lambda: self._identity, overwrite=self.made.overwrite).finished

    def write(self, progress: Progress | None, on_step: OnStep, cluster: Cluster | None) -> None:
        """Write the shards of this part that nobody has finished."""
        with shared_parts(self.target, self.shared, overwrite=self.made.overwrite) as parts:
            settled = parts.look()
            if not parts.finished:  # others may have completed it since its place was looked at
                self._look_beside()
                if self.completed() is not None:
                    return
            mine = [shard for shard in self.mine if shard.name not in self._finished]
            left = [shard for shard in mine if shard.name not in settled]
            self.resumed = len(self.mine) - len(left)
            if left:
                self._begin(parts)
                new = [shard for shard in left if shard.name not in parts.finished]
                read = read_by(new, self.made.compared.references(new), ())
                fetch(read, on_step, check=self.made.sha256)
                own = replace(self.made, shards=(*mine,))
                if cluster is None:
                    write_shards(own, parts, progress=progress, on_step=on_step)
                else:
                    cluster.write(own, parts, progress, on_step)
            self._finished.update(parts.look())
            if cluster is None and not self.shared.goes:
                # Who completes it need not read these, then.
                theirs = of_neighbour(self.made.shards, self.part)
                workers = self.made.workers
                check_of_others(theirs, parts, workers=workers, progress=progress, on_step=on_step)

    def _begin(self, parts: PartsFolder) -> None:
        """See that shards may be sent where the output goes, if it goes anywhere."""
        outlet = self.made.outlet
        if outlet is not None:
            target = begin(outlet, parts, self.made.names, overwrite=self.made.overwrite)
            self._warnings += target.warnings

    @contextlib.contextmanager
    def telling(self) -> Iterator[None]:
        """Say in an error what parts have left, if anything, and that it will be continued."""
        folder = places_beside(self.target)["parts"]
        try:
            yield
        except OutputError:
            raise
        except BaseException as error:
            left = True
            with contextlib.suppress(WriteError):  # else it is not even known
                left = exists(folder)
            if left:
                where = printable(str(folder))
                add_to(
                    error,
                    f"What parts have finished of it is kept in {where}: run the same command again to "
                    "continue, or remove that folder.",
                )
            raise

    def look(self, *, before: bool = False) -> None:
        """Look which shards are finished by now, whoever has written them.

        Before anything is done that may be all, in an output that has only to get its name.
        """
        if before and lacks_its_name(self.target, self._digest):
            self._finished.update(shard.name for shard in self.made.shards)
            return
        with opened_parts(self.target) as parts:
            if parts is not None and parts.shared == self.shared:
                self._finished.update(parts.look())
        self._look_beside()

    def _look_beside(self) -> None:
        """Look what was taken into the folder where the output is completed, whoever is at it."""
        try:
            self._finished.update(self._staged(check_beside))
        except BusyError:
            with contextlib.suppress(OutputError):  # no journal, once it has only to get its name
                self._finished.update(self._staged(finished_beside))
            if record_in(places_beside(self.target)["partial"], self._digest) is not None:
                self._finished.update(shard.name for shard in self.made.shards)

    def is_done(self) -> bool:
        """Whether others have finished all shards of this part, or the whole output.

        Looked for in the order in which it moves, so that it is seen wherever it is.
        """
        try:
            self.look()
            wanted = self.mine if self.part.number else self.made.shards  # who completes needs all
            done = self._finished.issuperset(shard.name for shard in wanted)
            return done or self.completed() is not None
        except StreamshardError:
            return False

    @property
    def is_finished(self) -> bool:
        """Whether all shards were, when that was last looked at."""
        return len(self._finished) == len(self.made.shards)

    def refuse_unfinished(self) -> None:
        """Raise `OutputError` if the output cannot be completed."""
        missing = [s.name for s in self.made.shards if s.name not in self._finished]
        if missing:
            outlet = self.made.outlet if self.shared.goes else None
            where = printable(str(self.target)) if outlet is None else outlet.where
            lack = "not uploaded" if self.shared.sends else "missing"
            some = f"{len(missing)} of its {len(self.made.shards)} weight files are {lack}"
            raise OutputError(
                f"{where}: cannot be completed, as {some}: {listed(missing)}. Run the parts that write "
                "them (--part I/N; --dry-run shows who writes what), then --part finish. Those that are "
                "finished are kept."
                if self._finished
                else f"{where}: cannot be completed, as no part of it was written with these inputs and "
                "options. Run all of its parts first: --part 1/N to --part N/N."
            )

    def told(self, report: Mapping[str, Any], *, complete: bool) -> Report:
        """A report, with what is to be said of this part."""
        part = {
            "part": str(self.part),
            "files": [shard.name for shard in self.mine],
            "bytes": sum(shard.nbytes for shard in self.mine),
            "resumed": self.resumed,
            "finished": len(self.made.shards) if complete else len(self._finished),
            "complete": complete,
        }
        told = {**report, "fingerprint": self._digest, "part": part}
        outlet = self.made.outlet
        if outlet is not None and told["pushed"] is None:
            told["pushed"] = outlet.described(None, sorted(self.made.names), None)
            told["warnings"] = [*told["warnings"], *self._warnings]
        return Report(told)

    def tidy(self, complete: Callable[[], object]) -> None:
        """Remove what was left beside an output that is complete, unless somebody is at it."""
        tidy(self.target)
        beside = places_beside(self.target)
        with contextlib.suppress(StreamshardError):
            if self.shared.goes and exists(beside["partial"]):
                complete()  # finds that it is done, and removes that
            with opened_parts(self.target) as parts:
                own = parts is not None and parts.shared == self.shared
            if own:
                discard_parts(self.target)


def run_part(
    output: Output,
    report: Callable[[], Mapping[str, Any]],
    complete: Callable[[], Mapping[str, Any]],
    *,
    progress: Progress | None = None,
    on_step: OnStep = lambda *_: None,
    cluster: Cluster | None = None,
) -> Report:
    """Write one part of an output, and complete it if that was the last one.

    `complete` carries out the plan as a run that continues, and returns the report of the whole; `report`
    is what is to be told otherwise. A `cluster` writes the shards instead of this process. Raises
    `OutputError` if the part `finish` finds shards missing.
    """
    with output.telling():
        found = _run(output, report, complete, progress, on_step, cluster)
        inputs = active()
        if inputs is not None:
            inputs.end()
        return found


def _run(
    output: Output,
    report: Callable[[], Mapping[str, Any]],
    complete: Callable[[], Mapping[str, Any]],
    progress: Progress | None,
    on_step: OnStep,
    cluster: Cluster | None,
) -> Report:
    there = output.completed()
    if there is None:
        output.place_completed()
        there = output.completed()
    if there is not None:
        _log.info("the output is complete already")
    else:
        _write(output, progress, on_step, cluster)
        there = output.completed()
    if there is None:
        output.look()
        if not output.part.number:
            output.refuse_unfinished()
        if output.is_finished:
            there = _completed(output, complete)
    if there is None:
        return output.told(report(), complete=False)
    output.tidy(complete)
    return output.told(there, complete=True)


def _write(
    output: Output, progress: Progress | None, on_step: OnStep, cluster: Cluster | None
) -> None:
    """Write what nobody has finished."""
    for left in range(TRIES, 0, -1):
        try:
            output.check_place()
            if output.part.number:
                output.write(progress, on_step, cluster)
            break
        except (OutputError, WriteError, ReadError, HubError, ClusterError) as error:
            # Others may have finished it, and removed the folder that it was being written to.
            broken = isinstance(error, (WriteError, ReadError)) and not is_gone(error)
            if not broken and output.is_done():
                return
            if left == 1 or not isinstance(error, BusyError):
                raise
            time.sleep(PAUSE_SECONDS)  # whoever is at it may only have looked


def _completed(output: Output, complete: Callable[[], Mapping[str, Any]]) -> dict[str, Any] | None:
    """The report of the output, completed here or by a faster one; None if that is still at it."""
    for left in range(TRIES, 0, -1):
        try:
            return {**complete()}
        except OutputError as error:
            there = output.completed()
            if there is not None:
                return there
            if not isinstance(error, BusyError) or (left == 1 and not output.part.number):
                raise
            if left > 1:  # it may only have looked
                time.sleep(PAUSE_SECONDS)
    return None
