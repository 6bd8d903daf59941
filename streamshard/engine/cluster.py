"""The shards of an output as tasks of a Dask cluster, whose workers share the output's disk.

The scheduler only says who does what: workers write into the folder that parts share (`parts_folder.py`),
and what counts is the record that is found there. So a worker may be lost, or frozen and wake when its
task was done by another one, and whatever is finished is kept if the scheduler is lost. What one worker
has written another one reads again, which costs the time of a worker and not that of the whole.
"""

from __future__ import annotations

import contextlib
import logging
import pickle
import queue
import time
import uuid
from collections import deque
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from streamshard.checkpoint.header import total_nbytes
from streamshard.checkpoint.shards import Shard
from streamshard.engine import cluster_task
from streamshard.engine.cluster_client import connected
from streamshard.engine.cluster_workers import asked, nobody_answers, silence
from streamshard.engine.job import Plan
from streamshard.engine.parts_folder import PartsFolder
from streamshard.engine.workers import OnStep, Progress
from streamshard.errors import ClusterError, StreamshardError, listed, printable

__all__ = ["Cluster"]


RESOURCE = "streamshard"
WORKERS_SECONDS = 60
"""How long there may be no worker, and a finished file may not be seen here."""
LOOK_SECONDS = 2.0
SILENT_SECONDS = 30
"""How long workers may say nothing while all that is left is to read again: then it is read here."""
LEFT_SECONDS = 30.0
"""How long the scheduler may take to notice that a worker is lost."""
_WRITE, _READ = "write", "read"
A_THREAD = 2
"""Tasks that are given to the scheduler at a time, for each thread of a worker."""
RETRIES = 2


_log = logging.getLogger(__name__)


class Cluster:
    """A cluster by the address of its scheduler, or the file that this has written."""

    def __init__(self, scheduler: str) -> None:
        self.scheduler = scheduler
        self.workers = 0

    def write(
        self, made: Plan, parts: PartsFolder, progress: Progress | None, on_step: OnStep
    ) -> None:
        """Have the shards of a plan written that are not finished.

        Raises `ClusterError` if scheduler or workers do not do that, and what a task raises.
        """
        settled = parts.look()
        left = [shard for shard in made.shards if shard.name not in settled]
        left.sort(key=lambda shard: (-_effort(shard), shard.name))
        on_step("connecting", 0, 0)
        with connected(self.scheduler) as client:
            run = _Run(self, client, made, parts, progress)
            run.check_workers(left)
            total = made.tensor_nbytes
            on_step("writing", total, total - sum(total_nbytes(shard.tensors) for shard in left))
            run.write(left)


class _Run:
    """The writing of some shards by a cluster."""

    def __init__(
        self,
        cluster: Cluster,
        client: Any,
        made: Plan,
        parts: PartsFolder,
        progress: Progress | None,
    ) -> None:
        self._cluster, self._client, self._made, self._parts = cluster, client, made, parts
        self._progress = progress
        self._environment = cluster_task.environment()
        self._where = printable(cluster.scheduler)
        self._topic = f"streamshard-{uuid.uuid4().hex}"
        self._done: queue.SimpleQueue[Any] = queue.SimpleQueue()
        self._told: dict[str, int] = {}
        self._nbytes: dict[str, int] = {}
        self._resource = False
        self._silent: set[str] = set()
        """Workers that have not answered, which are given nothing."""
        self._inputs = b""
        self._seen = self._heard = time.monotonic()

    def check_workers(self, shards: Sequence[Shard]) -> None:
        """Raise `ClusterError` unless there are workers, and all of them can do the tasks."""
        self._inputs = cluster_task.inputs_bytes(self._made, shards, self._parts.shared.digest)
        try:
            if not self._workers():
                _log.info(
                    "%s has no worker yet: waiting %d s for one", self._where, WORKERS_SECONDS
                )
            self._client.wait_for_workers(1, timeout=WORKERS_SECONDS)
        except TimeoutError as error:
            raise self._no_workers() from error
        self._resource = any(_offers(worker) for worker in self._workers().values())
        self._cluster.workers = self._check()
        if not self._cluster.workers:
            raise self._no_workers()

    def _check(self) -> int:
        """How many workers there are; `ClusterError` if some cannot do the tasks, or none answers."""
        used, own = self._used(), self._environment
        given = asked(self._client, used, cluster_task.check, self._inputs, own)
        answers = {
            name: said for name, one in given.items() if (said := self._said(name, one)) is not None
        }
        wrong = [f"{printable(name)}: {answer}" for name, answer in answers.items() if answer]
        if wrong:
            more = f" (and {len(wrong) - 3} more workers)" if len(wrong) > 3 else ""
            raise ClusterError(
                f"{self._where}: {len(wrong)} of {len(answers)} workers cannot do this. "
                f"{'; '.join(wrong[:3])}{more}. Start all in the same environment as this command, "
                "on machines that see its inputs and its output under the same paths."
            )
        self._silent |= {name for name in used if name not in given and name in self._workers()}
        if self._silent and not answers:
            raise nobody_answers(self._where, self._silent)
        if self._silent:
            _log.warning("%s; the others do it", silence(self._where, self._silent))
        return len(answers)

    def _said(self, worker: str, answer: object) -> str | None:
        """Why a worker cannot do the tasks; empty if it can, and None if it was lost meanwhile."""
        if not isinstance(answer, Exception):
            return str(answer)
        if self._client.status != "running":
            raise self._lost() from answer
        if isinstance(answer, OSError) and self._has_left(worker):
            return None
        what = printable(str(answer) or type(answer).__name__)
        return f"it has no streamshard of this version ({what})"

    def _has_left(self, worker: str) -> bool:
        """Whether the scheduler has lost a worker, which it may notice a little later."""
        end = time.monotonic() + LEFT_SECONDS
        while there := worker in self._workers():
            if time.monotonic() > end:
                break
            time.sleep(0.1)
        return not there

    def write(self, shards: Sequence[Shard]) -> None:
        """Have them written, with some tasks more than there are threads given to the scheduler.

        What is written is read again by another worker, when nothing else is left to be given.
        """
        waiting, unread = list(reversed(shards)), deque[tuple[Shard, str]]()
        self._nbytes = {shard.name: total_nbytes(shard.tensors) for shard in shards}
        going: dict[tuple[str, str], Any] = {}
        of = {shard.name: shard for shard in shards}
        self._client.subscribe_topic(self._topic, self._event)
        try:
            while waiting or unread or going:
                while (waiting or unread) and len(going) < self._room():
                    if waiting:
                        shard = waiting.pop()
                        going[_WRITE, shard.name] = self._submit(_WRITE, shard, None)
                        continue
                    shard, writer = unread.popleft()
                    others = self._others(writer)
                    if others:
                        going[_READ, shard.name] = self._submit(_READ, shard, others)
                if not going:
                    continue
                reads = not waiting and all(what == _READ for what, _ in going)
                try:
                    what, name, future = self._done.get(timeout=LOOK_SECONDS)
                except queue.Empty:
                    if reads and self._is_silent():
                        self._cancel(going.values())
                        break
                    self._look()
                    continue
                going.pop((what, name))
                if what == _WRITE:
                    unread.append((of[name], self._take(name, future)))
                self._heard = time.monotonic()
                future.release()
        except BaseException:
            self._cancel(going.values())
            raise
        finally:
            with contextlib.suppress(Exception):
                self._client.unsubscribe_topic(self._topic)
        self._find([shard.name for shard in shards])

    def _others(self, worker: str) -> list[str]:
        """The workers that can read what one has written, and that has to stay here for that."""
        if self._parts.shared.goes:
            return []
        return sorted(self._used() - {worker})

    def _used(self) -> set[str]:
        """The workers that may be given something."""
        found = self._workers().items()
        return {name for name, one in found if _offers(one) or not self._resource} - self._silent

    def _is_silent(self) -> bool:
        """Whether nobody is heard of any more while all is written."""
        lost = self._client.status != "running"
        return lost or time.monotonic() - self._heard > SILENT_SECONDS

    def _cancel(self, futures: Iterable[Any]) -> None:
        """Have tasks ended that nobody waits for any more, if the scheduler is there."""
        if self._client.status == "running":
            with contextlib.suppress(Exception):
                self._client.cancel(list(futures), force=True)

    def _submit(self, what: str, shard: Shard, workers: list[str] | None) -> Any:
        """Have a shard written by any worker, or read again by one of some, or by any if these go."""
        call = cluster_task.write if what == _WRITE else cluster_task.check_shard
        if workers is None and self._silent:
            workers = sorted(self._used())
        task = cluster_task.task_bytes(self._made, shard, self._parts.shared.digest)
        future = self._client.submit(
            pickle.loads,
            cluster_task.call_bytes(call, task, self._environment, self._topic),
            key=f"{RESOURCE}-{what}-{shard.name}-{uuid.uuid4().hex}",
            pure=False,  # else a result would be remembered of a file that is gone
            retries=RETRIES,
            resources={RESOURCE: 1} if self._resource else None,
            workers=workers,
            allow_other_workers=workers is not None,
        )
        future.add_done_callback(lambda done, name=shard.name: self._done.put((what, name, done)))
        return future

    def _take(self, name: str, future: Any) -> str:
        """Take note of a shard that was written; returns the worker that did it."""
        if future.status == "error":
            error = future.exception()
            if isinstance(error, StreamshardError):
                raise error
            self._check()  # a worker that came later may lack what the others have
            raise ClusterError(f"{self._where}: {printable(name)}: {_why(error)}") from error
        if future.status != "finished":
            raise self._lost()
        record = future.result()
        if "error" in record:
            raise record["error"]
        self._tell(name, self._nbytes[name], name)
        return str(record["worker"])

    def _find(self, names: Sequence[str]) -> None:
        """Wait until all that was written is seen here: a network's disk may take a while."""
        end = time.monotonic() + WORKERS_SECONDS
        while missing := [name for name in names if name not in self._parts.look()]:
            self._parts.check_there()
            if time.monotonic() > end:
                raise ClusterError(
                    f"{self._where}: workers have written {listed(missing)}, which cannot be seen in "
                    f"{printable(str(self._parts.folder))} here. The output must be on a disk that all "
                    "machines share, under the same path."
                )
            time.sleep(0.2)

    def _event(self, event: tuple[float, Mapping[str, Any]]) -> None:
        told, self._heard = event[1], time.monotonic()
        self._tell(told["shard"], told["done"], told["tensor"])

    def _tell(self, shard: str, done: int, tensor: str) -> None:
        """Tell the progress that a task has come so far; one that begins anew tells nothing new."""
        more = min(done, self._nbytes[shard]) - self._told.get(shard, 0)
        if more > 0:
            self._told[shard] = self._told.get(shard, 0) + more
            if self._progress is not None:
                self._progress(more, tensor)

    def _workers(self) -> dict[str, Any]:
        workers: dict[str, Any] = self._client.scheduler_info(n_workers=-1)["workers"]
        return workers

    def _room(self) -> int:
        """How many tasks the scheduler is given at a time."""
        threads = sum(
            int(worker["resources"].get(RESOURCE, 0)) if self._resource else worker["nthreads"]
            for name, worker in self._workers().items()
            if name not in self._silent
        )
        return max(A_THREAD * threads, 1)

    def _look(self) -> None:
        """Raise `ClusterError` if the scheduler is lost, or no worker is left for a while."""
        if self._client.status != "running":
            raise self._lost()
        now = time.monotonic()
        if any(_offers(worker) or not self._resource for worker in self._workers().values()):
            self._seen = now
        elif now - self._seen > WORKERS_SECONDS:
            raise self._no_workers()

    def _no_workers(self) -> ClusterError:
        which = f" that offers the resource {RESOURCE}" if self._resource else ""
        return ClusterError(
            f"{self._where}: has no worker{which}. Start some: dask worker {self._where} --nthreads 1 "
            f"--memory-limit 0 --resources {RESOURCE}=1"
        )

    def _lost(self) -> ClusterError:
        return ClusterError(
            f"{self._where}: the scheduler is lost, or has dropped the tasks. Start it and its workers "
            "again."
        )


def _effort(shard: Shard) -> int:
    """About how long a shard takes, in the bytes of one that is only copied."""
    return sum(tensor.effort() for tensor in shard.tensors.values())


def _offers(worker: Mapping[str, Any]) -> bool:
    return bool(worker["resources"].get(RESOURCE))


def _why(error: BaseException | None) -> str:
    if type(error).__name__ == "KilledWorker":
        return (
            "every worker that was given it died. Look at their logs: there may be too little memory "
            "(--max-memory). Workers that others take away count too: allow more of these by "
            "distributed.scheduler.allowed-failures of the scheduler."
        )
    return printable(f"{type(error).__name__}: {error}", 400)
