"""A real Dask cluster on the loopback: a scheduler and workers, each a process."""

from __future__ import annotations

import contextlib
import os
import re
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from queue import Empty, SimpleQueue

from hangs import HANGS
from pairs import Pair
from parts_runs import folder_of, process, written

# Commands and workers wait for each other as long as it takes, on the slowest machine.
SETTINGS = {
    f"DASK_DISTRIBUTED__{name}": f"{HANGS}s"
    for name in ("COMM__TIMEOUTS__CONNECT", "COMM__TIMEOUTS__TCP", "SCHEDULER__WORKER_TTL")
}
PATIENT = f"""
import os
os.environ.update({SETTINGS})
from streamshard.engine import cluster, cluster_client
cluster.WORKERS_SECONDS = cluster_client.CONNECT_SECONDS = cluster_client.ANSWER_SECONDS = {HANGS}
"""
# A worker that stops as soon as it has begun a shard, until there is a file.
STOPPED = """
import os, time
from streamshard.disk import new_files
def stopped(descriptor, nbytes, allocate=new_files._allocate, os=os, time=time):
    allocate(descriptor, nbytes)
    while nbytes and not os.path.exists({file!r}):
        time.sleep(0.01)
new_files._allocate = stopped
"""
# A worker that makes a file when it has ended a task, well or not.
ENDING = """
import pathlib
from streamshard.engine import cluster_task
def ending(*given, own=cluster_task._written, pathlib=pathlib):
    try:
        return own(*given)
    finally:
        pathlib.Path({file!r}).touch()
cluster_task._written = ending
"""
# A worker of another version.
OTHER = """
from streamshard.engine import cluster_task
own = cluster_task.environment
cluster_task.environment = lambda own=own: {**own(), "streamshard": "0.0.9 (cafe)"}
"""
# A worker, or a scheduler, without this package.
WITHOUT = """
import sys
for name in [*sys.modules]:
    if name.partition(".")[0] == "streamshard":
        del sys.modules[name]
sys.modules["streamshard"] = None
"""


class Started:
    """A process of a cluster, whose log is read."""

    def __init__(self, *arguments: str, folder: Path, env: dict[str, str] | None = None) -> None:
        self.process = subprocess.Popen(
            [sys.executable, "-m", "distributed.cli." + arguments[0], *arguments[1:]],
            cwd=folder,
            env={**os.environ, **(env or {})},
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
        )
        self.log = ""
        self._lines: SimpleQueue[str] = SimpleQueue()
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def _read(self) -> None:
        with contextlib.suppress(ValueError):
            for line in self.process.stderr:
                self._lines.put(line)

    def wait_for(self, pattern: str) -> str:
        """The first group of the first line that matches."""
        while True:
            try:
                line = self._lines.get(timeout=HANGS)
            except Empty as error:
                raise AssertionError(f"no {pattern} in:\n{self.log}") from error
            self.log += line
            if found := re.search(pattern, line):
                return found[1]

    def send(self, number: int) -> None:
        """Send it a signal."""
        self.process.send_signal(number)

    def end(self) -> None:
        """Kill it, frozen or not."""
        self.process.kill()
        self.process.wait(HANGS)
        self._reader.join(HANGS)
        self.process.stderr.close()


class DaskCluster:
    """A scheduler, and workers without nannies, which are not started again."""

    def __init__(self, folder: Path, settings: dict[str, str], code: str = "") -> None:
        self.folder, self.settings = folder, settings
        self.workers: list[Started] = []
        self.scheduler = Started(
            "dask_scheduler", "--host", "127.0.0.1", "--port", "0", "--no-dashboard",
            *(preload(self, code) if code else []),
            folder=folder, env=settings,
        )  # fmt: skip
        self.address = self.scheduler.wait_for(r"Scheduler at:\s+(tcp://\S+)")

    def worker(self, *more: str, env: dict[str, str] | None = None) -> Started:
        """One more worker, which is ready."""
        found = Started(
            "dask_worker", self.address, "--no-nanny", "--nthreads", "1", "--memory-limit", "0",
            "--no-dashboard", *more,
            folder=self.folder, env={**self.settings, **(env or {})},
        )  # fmt: skip
        self.workers.append(found)
        found.wait_for(r"(Registered to):")
        return found

    def close(self) -> None:
        """End all."""
        for one in [*self.workers, self.scheduler]:
            with contextlib.suppress(ProcessLookupError):
                one.send(signal.SIGCONT)
            one.end()


@contextlib.contextmanager
def dask_cluster(folder: Path, code: str = "") -> Iterator[DaskCluster]:
    """A cluster without workers, whose scheduler runs some code first."""
    cluster = DaskCluster(folder, SETTINGS, code)
    try:
        yield cluster
    finally:
        cluster.close()


def preload(cluster: DaskCluster, code: str) -> list[str]:
    """What makes a worker run this code first."""
    file = cluster.folder / f"preload{len(cluster.workers)}.py"
    file.write_text(code)
    return ["--preload", str(file)]


def begun(pair: Pair, cluster: DaskCluster, *more: str) -> subprocess.Popen[str]:
    """A merge by the cluster, as a process."""
    return process([*pair.command, "--scheduler", cluster.address, *more], PATIENT)


def stopped(cluster: DaskCluster, *, code: str = "") -> Started:
    """One more worker, which stops when it has begun a shard, until `go_on`; some code runs first."""
    return cluster.worker(*preload(cluster, code + STOPPED.format(file=str(_goes_on(cluster)))))


def go_on(cluster: DaskCluster) -> None:
    """Let workers that have stopped go on."""
    _goes_on(cluster).touch()


def _goes_on(cluster: DaskCluster) -> Path:
    return cluster.folder / "go on"


def is_writing(pair: Pair) -> bool:
    """Whether a worker has begun a shard."""
    folder = folder_of(pair)
    return folder.exists() and any(
        name.endswith("safetensors") is False and ".part" in name
        for name in written(pair)
        if "safetensors" in name
    )
