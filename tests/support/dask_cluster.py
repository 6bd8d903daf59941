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

SECONDS = 60


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

    def __init__(self, folder: Path, settings: dict[str, str]) -> None:
        self.folder, self.settings = folder, settings
        self.workers: list[Started] = []
        self.scheduler = Started(
            "dask_scheduler", "--host", "127.0.0.1", "--port", "0", "--no-dashboard",
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
def dask_cluster(folder: Path, **settings: str) -> Iterator[DaskCluster]:
    """A cluster without workers, with settings of Dask by their environment's names."""
    cluster = DaskCluster(folder, {f"DASK_{name}": value for name, value in settings.items()})
    try:
        yield cluster
    finally:
        cluster.close()
