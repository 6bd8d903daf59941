"""Runs that were killed, and what a folder holds."""

from __future__ import annotations

import contextlib
import json
import os
import re
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from hangs import until
from pairs import Pair, heed_interrupts

from streamshard.disk.system import system

FIRST, SECOND = (f"model-0000{number}-of-00002.safetensors" for number in (1, 2))
VARYING = {"seconds", "peak_rss_bytes", "resumed", "record_digest", "date"}

# Ends the process after something has happened; `main` runs the command line after it.
KILL = "import os, signal, sys\nkill = lambda: os.kill(os.getpid(), signal.SIGKILL)\n"
MAIN = "\nfrom streamshard.cli import main\nmain()\n"
# `interrupt` has the process signalled by a thread of a run, which goes on when the run has heard of it:
# until then it finishes nothing, however long the thread that waits takes to wake up.
INTERRUPT = """
import os, threading
from streamshard.engine.workers import Stop
ended, fail = threading.Event(), Stop.fail
def heard(self, error):
    fail(self, error)
    ended.set()
Stop.fail = heard
def interrupt(number):
    os.kill(os.getpid(), number)
    ended.wait(600)  # ends a hang
"""
# After it: what `still` says was written since the signal is printed last, as the process ends at once.
TOLD = """
exit = os._exit
def tell(code):
    os.write(1, str(still()).encode())
    exit(code)
os._exit = tell
"""
AFTER_A_SHARD = """
from streamshard.engine.journal import Journal
add = Journal.add
def last(self, shard):
    add(self, shard)
    kill()
Journal.add = last
"""
BETWEEN_THE_RENAMES = """
from streamshard.disk.system import system
rename = system.rename
def last(path, other):
    if str(path).endswith(".partial"):
        kill()
    rename(path, other)
system.rename = last
"""
REMOVING_THE_OLD = """
from streamshard.disk.system import system
unlink = system.unlink
def last(path):
    if ".merged.old" in str(path):
        kill()
    unlink(path)
system.unlink = last
"""


def killed(code: str, command: list[str]) -> None:
    """Run a command that kills itself where `code` says."""
    line = [sys.executable, "-c", KILL + code + MAIN, *command]
    done = subprocess.run(line, capture_output=True, text=True, check=False)
    assert done.returncode == -signal.SIGKILL, done.stderr


def signalled(
    code: str, number: signal.Signals, *arguments: str | Path
) -> subprocess.CompletedProcess[str]:
    """A command that has itself signalled where `code` says; that finds the number as `number`."""
    line = [sys.executable, "-c", f"number = {int(number)}\n{code}{MAIN}", *map(str, arguments)]
    return subprocess.run(
        line,
        capture_output=True,
        text=True,
        check=False,
        preexec_fn=heed_interrupts,
    )


def report_of(folder: Path) -> dict[str, Any]:
    report: dict[str, Any] = json.loads((folder / "streamshard.json").read_bytes())
    return report


def content(folder: Path) -> dict[str, Any]:
    """Every file of an output, without what a report says of the run itself."""
    found: dict[str, Any] = {
        p.relative_to(folder).as_posix(): p.read_bytes() for p in folder.rglob("*") if p.is_file()
    }
    report = report_of(folder)
    found["streamshard.json"] = {k: v for k, v in report.items() if k not in VARYING | {"output"}}
    return found


def partial(pair: Pair) -> Path:
    return pair.output.with_name(".merged.partial")


def alone(pair: Pair) -> bool:
    """Whether there is nothing beside the output."""
    return [p.name for p in pair.output.parent.iterdir()] == ["merged"]


def flip(file: Path, where: int) -> None:
    """Change one bit, and neither size nor time."""
    times = file.stat()
    data = bytearray(file.read_bytes())
    data[where] ^= 1
    file.write_bytes(data)
    os.utime(file, ns=(times.st_atime_ns, times.st_mtime_ns))


def open_below(folder: Path) -> list[str]:
    """The files of a folder that this process has open; whatever else a thread opens does not count."""
    found = []
    for name in os.listdir("/proc/self/fd"):
        with contextlib.suppress(FileNotFoundError):  # it is closed by now
            found.append(os.readlink(f"/proc/self/fd/{name}"))
    return sorted(path for path in found if path.startswith(f"{folder}{os.sep}"))


def failing(
    monkeypatch: pytest.MonkeyPatch, method: str, error: BaseException, where: str, after: Path
) -> None:
    """Fail the calls of a method on files, open or named, whose names `where` matches."""
    original, opened = getattr(system, method), system.open
    names: dict[int, str] = {}

    def noted(path: Any, flags: int) -> int:
        descriptor = opened(path, flags)
        names[descriptor] = str(path)
        return descriptor

    def fail(first: Any, *rest: Any) -> Any:
        name = names.get(first, "") if isinstance(first, int) else str(first)
        if re.search(where, name):
            if SECOND in where:  # the disk must have the first one
                until(lambda: [*after.glob(f".merged.partial/{FIRST}")])
            raise error
        return original(first, *rest)

    monkeypatch.setattr(system, "open", noted)
    monkeypatch.setattr(system, method, fail)
