"""Writing shards: the parent's part. Tasks are given to threads, and what they find is noted.

Every tensor is a task, or several if it is so large that workers would have to wait for one of them.
Tasks are done in any order: one worker copies what of a shard is only copied, and waits for the disk,
while the others compute. What is measured of tensors is summed in the order of the file. Progress,
journal, syncs and names are told or done here and nowhere else.
"""

from __future__ import annotations

import threading
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from itertools import groupby, pairwise

from streamshard.checkpoint.digests import hash_file, new_sha256
from streamshard.checkpoint.header import total_nbytes
from streamshard.checkpoint.shards import Shard
from streamshard.disk.folders import rename, sync_folder
from streamshard.disk.inputs import active
from streamshard.engine.destination import Destination
from streamshard.engine.do_task import WRITE_BYTES, do, measure
from streamshard.engine.job import Plan
from streamshard.engine.lanes import Place, cuts_of, lanes, ordered
from streamshard.engine.open_shard import OpenShard
from streamshard.engine.sending import Sender
from streamshard.engine.shard_task import Member, ShardTask
from streamshard.engine.workers import Background, OnStep, Progress, Senders, Stop, Stopped, share
from streamshard.tensors.rounding import Changes
from streamshard.tensors.workspace import Workspace
from streamshard.values import frozen

__all__ = ["write_shards"]


# What the disk is asked to begin with, and the progress is told, at a time.
NOTED_BYTES = 8 * 1024 * 1024


class _Split:
    """A tensor that is written in several parts."""

    def __init__(self, whole: ShardTask, count: int) -> None:
        self.whole = whole
        self.left = count
        self.changes = Changes()


@frozen
class _Item:
    """A task, and where what is found goes: the shard, the place in there, other parts of the tensor.

    `copied` ones are of a long stretch that is only copied.
    """

    opened: OpenShard
    place: int
    task: ShardTask
    copied: bool
    split: _Split | None = None


class _Watch:
    """Told of the blocks of a task: stops it, tells progress, has the disk begin with what is written."""

    def __init__(self, run: _Run, opened: OpenShard) -> None:
        self._run, self._output = run, opened.output
        self._name = ""
        self._untold = 0
        self._begin = self._end = 0

    def __call__(self, offset: int, nbytes: int, name: str) -> None:
        self._run.stop.check()
        self._name = name
        self._untold += nbytes
        if self._untold >= NOTED_BYTES:
            self._tell()
        # Rows of a strip: the disk is asked for all of it at the end.
        if nbytes and offset != self._end:
            self._begin = self._end = offset
        self._end += nbytes
        if self._end - self._begin >= NOTED_BYTES:
            self._sync()

    def end(self) -> None:
        """Tell what was not told yet."""
        self._sync()
        self._tell()

    def _sync(self) -> None:
        nbytes = self._end - self._begin
        if nbytes >= WRITE_BYTES:  # 40,000 small ones would make a long queue
            self._run.background.add(partial(self._output.begin_sync, self._begin, nbytes))
        self._begin = self._end

    def _tell(self) -> None:
        if self._untold and self._run.progress is not None:
            with self._run.lock:
                self._run.progress(self._untold, self._name)
        self._untold = 0


class _Run:
    """The writing of shards into a staging folder."""

    def __init__(
        self, plan: Plan, staging: Destination, progress: Progress | None, on_step: OnStep | None
    ) -> None:
        self.plan = plan
        self.on_step = on_step
        self.hashed = 0
        self.tells_hashing = False
        self.staging = staging
        self.progress = progress
        self.stop = Stop()
        self.lock, self.beginning = threading.Lock(), threading.Lock()
        self.background = Background(self.stop)
        self.senders = Senders(self.stop) if plan.direct else None
        self.sender: Sender | None = None
        if plan.outlet is not None:
            self.sender = Sender(plan.outlet, plan.on_disk, staging, self.stop, self.lock)
        self.opened: dict[str, OpenShard] = {}
        self.copying = 0
        self.inputs = active()

    def items(self, shards: Sequence[Shard]) -> Iterator[Iterable[_Item]]:
        """Every task; together those that one thread is to do, one after the other."""
        if self.sender is None or self.plan.on_disk is None:
            yield from self.tasks(shards)
            return
        for shard in shards:  # whatever is begun is ended without another one
            self.sender.take_room()
            yield from self.tasks([shard])

    def tasks(self, shards: Sequence[Shard]) -> Iterator[Iterable[_Item]]:
        """The tasks of some shards, which are begun on the way."""
        in_order, others = lanes(shards, self.plan.compared.reference)
        for lane in in_order:
            yield self.in_order(lane)
        left = sum(shard.tensors[name].nbytes for shard, _, name in others())
        for _, found in groupby(others(), lambda place: place[0].name):
            places = [*found]
            members = [self.member(place) for place in places]
            for at, alone in ordered(members, lambda: not self.copying):
                (shard, place, _), member = places[at], members[at]
                whole = self.whole(shard, member)
                cuts = cuts_of(member, left, self.plan.workers, direct=self.plan.direct)
                left -= member.tensor.nbytes
                split = _Split(whole, len(cuts) - 1) if len(cuts) > 2 else None
                for first, last in pairwise(cuts):
                    with self.lock:
                        self.copying += alone
                    part = whole if split is None else replace(whole, begin=first, end=last)
                    yield (_Item(self.begun(shard), place, part, alone, split),)

    def in_order(self, lane: Iterable[Place]) -> Iterator[_Item]:
        """The tasks of one thread; shards are begun on the way."""
        for place in lane:
            whole = self.whole(place[0], self.member(place))
            yield _Item(self.begun(place[0]), place[1], whole, copied=False)

    def member(self, place: Place) -> Member:
        """A tensor of a shard, where it lies there, and what it is compared with."""
        shard, _, name = place
        reference = self.plan.compared.reference.get(name)
        return Member(name, self.begun(shard).begins[name], shard.tensors[name], reference)

    def whole(self, shard: Shard, member: Member) -> ShardTask:
        """The task of a whole tensor."""
        path, nbytes = self.begun(shard).output.path, shard.nbytes
        return ShardTask(path, nbytes, member.begin, member.end, (member,), self.plan.inputs)

    def begun(self, shard: Shard) -> OpenShard:
        """A shard that is being written, from when it is first asked for."""
        with self.beginning:  # of its own: the disk may take its time
            found = self.opened.get(shard.name)
            if found is None:
                self.stop.check()
                found = OpenShard(shard, self.staging, self.senders)
                self.opened[shard.name] = found
                found.output.write(memoryview(found.header), 0)
        return found

    def write_all(self, items: Iterable[_Item], work: Workspace) -> None:
        """Do tasks, one after the other."""
        for item in items:
            self.stop.check()
            self.write(item, work)

    def write(self, item: _Item, work: Workspace) -> None:
        """Do a task, and note what is known when all of its tensor is written."""
        watch = _Watch(self, item.opened)
        output, split = item.opened.output, item.split
        try:
            (result,) = do(item.task, work, watch, output)
        finally:
            with self.lock:
                self.copying -= item.copied
        if split is not None:
            with self.lock:
                split.changes.take(result.changes)
                split.left -= 1
                last = not split.left
            if last:
                (measured,) = measure(split.whole, work, watch, output)
                result = replace(measured, changes=split.changes)
        watch.end()
        if result.digest:
            with self.lock:
                if item.opened.note(item.place, result):
                    self.background.add(partial(self.finish, item.opened))

    def finish(self, opened: OpenShard) -> None:
        """Wait until the disk has a shard, give it its name, and note it in the journal."""
        path = opened.output.path
        opened.output.sync()
        opened.output.close()
        sha256 = new_sha256() if self.plan.sha256 or self.sender is not None else None
        if sha256 is not None:
            told = partial(self.tell_hashed, opened.shard.name)
            hash_file(path, sha256, going=self.stop.going, told=told)
        shard = opened.finished(None if sha256 is None else sha256.hexdigest())
        if self.inputs is not None:
            self.inputs.check()  # only what is of unchanged inputs may be continued later
        with self.lock:
            self.stop.check()
            rename(path, path.with_name(shard.name))
            sync_folder(path.parent)
            self.staging.add(shard)
            del self.opened[shard.name]
        if self.sender is not None:
            self.sender.add(shard)

    def tell_hashed(self, name: str, nbytes: int) -> None:
        """Note bytes of which the SHA-256 was taken, and tell them once nothing else is done."""
        with self.lock:
            self.hashed += nbytes
            if self.tells_hashing and self.progress is not None:
                self.progress(nbytes, name)

    def wait(self, shards: Sequence[Shard]) -> None:
        """Wait for the disk, and for what is hashed, when everything is written."""
        if self.on_step is not None:
            with self.lock:
                self.tells_hashing = self.plan.sha256  # else it is no bytes of a step
                left = sum(shard.nbytes for shard in shards) if self.plan.sha256 else 0
                self.on_step("hashing" if left else "syncing", left, self.hashed)
        self.background.finish()
        if self.sender is not None:
            if self.on_step is not None:
                self.sender.told = partial(self.on_step, "uploading")
            self.sender.finish()

    def end(self) -> None:
        """Close what an error left open; from now on nothing is finished any more."""
        # Told before the lock is free: it may be that of who finishes a shard.
        self.stop.fail(Stopped())
        with self.lock:
            self.background.abandon()
            if self.sender is not None:
                self.sender.abandon()
            for opened in self.opened.values():
                opened.output.abandon()
        if self.senders is not None:
            self.senders.finish()


def write_shards(
    plan: Plan,
    staging: Destination,
    *,
    progress: Progress | None = None,
    on_step: OnStep | None = None,
) -> None:
    """Write those files of a plan that are not finished, and wait until the disk has them.

    What is measured is noted in `staging`: distances from the tensors of the reference,
    of other computed tensors from their sources. `progress` is told the bytes and the tensor of each
    finished piece, `on_step` what is done. For SHA-256 a file is read again when it is complete.
    """
    run = _Run(plan, staging, progress, on_step)
    left = [shard for shard in plan.shards if shard.name not in staging.finished]
    for shard in plan.shards:
        if run.sender is not None and shard.name in staging.finished:
            run.sender.add(staging.finished[shard.name], before=True)
    if on_step is not None:
        to_write = sum(total_nbytes(shard.tensors) for shard in left)
        on_step("writing", plan.tensor_nbytes, plan.tensor_nbytes - to_write)
    try:
        share(run.items(left), run.write_all, plan.workers, run.stop, spare=plan.direct)
        run.wait(left)
    finally:
        run.end()
