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

from pairs import Pair, heed_interrupts
from parts_runs import folder_of, written

SECONDS = 60

# A worker that is slow as soon as it has begun a shard.
SLOW = """
import time
from streamshard.disk import new_files
def slow(descriptor, nbytes, allocate=new_files._allocate, time=time):
    allocate(descriptor, nbytes)
    if nbytes:
        time.sleep(3)
new_files._allocate = slow
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
                line = self._lines.get(timeout=SECONDS)
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
        self.process.wait(SECONDS)
        self._reader.join(SECONDS)
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
def dask_cluster(folder: Path, code: str = "", **settings: str) -> Iterator[DaskCluster]:
    """A cluster without workers, with settings of Dask by their environment's names.

    The scheduler runs some code first.
    """
    names = {f"DASK_{name}": value for name, value in settings.items()}
    cluster = DaskCluster(folder, names, code)
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
    return subprocess.Popen(
        [sys.executable, "-m", "streamshard", *pair.command, "--scheduler", cluster.address, *more],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=heed_interrupts,  # noqa: PLW1509 - before any thread
    )


def is_writing(pair: Pair) -> bool:
    """Whether a worker has begun a shard."""
    folder = folder_of(pair)
    return folder.exists() and any(
        name.endswith("safetensors") is False and ".part" in name
        for name in written(pair)
        if "safetensors" in name
    )
