"""Fail every single call to the operating system, once and from then on, and look at what is left.

    python bench/faults.py

Small runs of the command line (see `scenarios.py`) call the system some hundred times each, all of them
through the seam in `streamshard/disk/system.py`. For N = 1, 2, 3 … until a run ends without it, the
N-th call fails, or it and all that come after it, with each of several errors; reads and writes also
pass fewer bytes than asked for, and calls that change the disk also report an error after they have
done their work. After each run:

- the exit code is that of a failed read or write, and the message names the file;
- the output is absent, the older one, or complete; what else is left is named in the message;
- inputs are as they were, and no descriptor is left open;
- the same command without faults ends with the bytes of a clean run, and nothing beside them.

Prints a line for each scenario and number of workers, and on stderr how far it is; exits with 1 if
anything is not so. Every call and kind of failure takes two runs: ten thousand of them for a scenario of
600 calls, some five minutes for each number of workers (`--step 7` for a look). A run that hangs ends
everything after two minutes.
"""

from __future__ import annotations

import argparse
import contextlib
import errno
import faulthandler
import os
import sys
import tempfile
import threading
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from scenarios import CALLS, Content, Scenario, content, replaced, run, scenarios

from streamshard.disk.system import system

__all__ = ["KINDS", "Faults", "Kind", "check", "main"]

LOOKING = {
    "pread",
    "open",
    "fstat",
    "stat",
    "lstat",
    "listdir",
    "scandir",
    "realpath",
    "resolve",
    "by_library",
    "read_text",
}
# An output without one of these is not complete.
NEEDED = {"pwrite", "fsync", "truncate", "mkdir"}
HANGS_SECONDS = 120


@dataclass(frozen=True)
class Kind:
    """How calls fail: which ones ("*" for all), from one on or once, and with which error.

    Without an error, reads and writes pass a part `of` what was asked for. `late` calls do their work
    before they fail.
    """

    calls: Sequence[str]
    persistent: bool = False
    error: int = 0
    part: float = 0
    late: bool = False

    def __str__(self) -> str:
        what = errno.errorcode[self.error] if self.error else f"{self.part:.0%} of the bytes"
        return f"{what} {'from there on' if self.persistent else 'once'}{', late' * self.late}"


KINDS = [
    *(
        Kind("*", persistent, number)
        for number in (errno.EIO, errno.ENOSPC, errno.EACCES, errno.EINTR)
        for persistent in (False, True)
    ),
    *(Kind(("pread", "pwrite"), persistent, part=0.5) for persistent in (False, True)),
    Kind(("pread",)),  # as at the end of the file
    Kind(("rename", "unlink", "mkdir", "rmdir", "fsync"), error=errno.EIO, late=True),
]


@dataclass
class Faults:
    """Lets calls that concern `folder` fail, beginning with number `at`; counts from 1.

    Only those of files whose path ends with `only` count: what several threads do varies in its order.
    """

    kind: Kind
    at: int
    folder: Path
    only: str = ""
    calls: int = 0
    failed: list[tuple[str, str]] = field(default_factory=list)
    """Each call that has failed, and the paths that it was about."""

    def __post_init__(self) -> None:
        self._lock = threading.Lock()
        self._opened: dict[int, str] = {}

    @contextlib.contextmanager
    def active(self) -> Iterator[None]:
        """Let calls fail while the block runs."""
        seam = {name: self._seam(name, getattr(system, name)) for name in CALLS}
        with replaced(system, seam):
            yield

    def _seam(self, name: str, call: Callable[..., Any]) -> Callable[..., Any]:
        def calling(first: Any, *rest: Any) -> Any:
            paths = self._opened.get(first, "") if isinstance(first, int) else str(first)
            if name == "rename":
                paths += f"\n{rest[0]}"
            kind = "open for writing" if name == "open" and rest[0] & os.O_CREAT else name
            result = self._called(
                kind, paths, lambda: call(first, *rest), named=not isinstance(first, int)
            )
            if name == "open":
                self._opened[result] = paths
            return result

        if name in {"pread", "pwrite"} and self.kind.part:

            def shorter(descriptor: int, data: memoryview, offset: int) -> int:
                if self._is_due(name, self._opened.get(descriptor, "")):
                    data = data[: max(int(len(data) * self.kind.part), 1)]
                return int(call(descriptor, data, offset))

            return shorter
        return calling

    def _is_due(self, name: str, paths: str) -> bool:
        if name not in self.kind.calls and self.kind.calls != "*":
            return False
        if not paths.endswith(self.only):
            return False
        with self._lock:
            self.calls += 1
            due = self.calls == self.at or (self.kind.persistent and self.calls > self.at)
            if due:
                self.failed.append((name, paths))
            return due

    def _called(self, name: str, paths: str, call: Callable[[], Any], *, named: bool) -> Any:
        if not self._is_due(name, paths):
            return call()
        if not self.kind.error:
            return call() if self.kind.part else 0
        if self.kind.late or name == "close":  # a descriptor is closed even if that fails
            try:
                call()
            except OSError:
                with self._lock:  # an error of its own, that who calls may expect
                    self.failed[self.failed.index((name, paths))] = (f"own {name}", paths)
                raise
        error = OSError(self.kind.error, os.strerror(self.kind.error))
        if named:
            error.filename = paths.split("\n", maxsplit=1)[0]
        raise error


def check(scenario: Scenario, faults: Faults, inputs: Content) -> list[str]:
    """Run a scenario with faults and again without; returns what is not as it should be."""
    faulthandler.dump_traceback_later(HANGS_SECONDS, exit=True)
    scenario.begin()
    before, others = _descriptors(), threading.enumerate()
    with faults.active():
        code, said = run(scenario.command)
        _join(others)
    after = _descriptors()
    if not faults.failed:
        wrong = [] if code == 0 else [f"exit code {code} without a fault"]
    else:
        wrong = [*_ending(scenario, faults, code, said), *_left(scenario, faults, code, said)]
    if after - before:
        wrong.append(f"descriptors left open: {sorted(after - before)}")
    complete = _at(scenario) == scenario.expected
    again, said_again = run(scenario.command)
    if scenario.then and not again:
        again, said_again = run(scenario.then)
    if again and not (complete and "--overwrite" not in scenario.command and again == 5):
        wrong.append(f"the next run ended with {again}: {said_again}")
    if _at(scenario) != scenario.expected:
        wrong.append("the next run has other bytes than a clean one")
    if scenario.left():
        wrong.append(f"after the next run there is {scenario.left()}")
    if content(scenario.inputs) != inputs:
        wrong.append("the inputs have changed")
    scenario.end()
    faulthandler.cancel_dump_traceback_later()
    return [f"{problem}\n    said: {said.strip()}" for problem in wrong]


def _matters(paths: str) -> bool:
    """Whether something is to have it: a lock ends with its process, a shard not noted is read again."""
    return ".lock" not in paths and ".checked" not in paths


def _ending(scenario: Scenario, faults: Faults, code: int, said: str) -> Iterator[str]:
    """What is wrong with the exit code and the message."""
    if "Traceback" in said or code == 1:
        yield f"exit code {code}"
    if code == 0 and (said or _at(scenario) != (None if scenario.then else scenario.expected)):
        yield "success is told"
    if faults.kind.part:
        if code:
            yield f"exit code {code} though nothing failed"
        return
    if code == 0:
        needed = [call for call, paths in faults.failed if call in NEEDED and _matters(paths)]
        if needed:
            yield f"success although {needed[0]} failed"
        return
    # What fails first need not matter: `realpath` goes on, and so does who closes a file to read.
    expected = set().union(*(_codes(scenario, call, paths) for call, paths in faults.failed))
    if code not in expected:
        yield f"exit code {code}, not {expected}"
    if not any(_names(said, Path(paths.split("\n")[0]), faults) for _, paths in faults.failed):
        yield "the message does not name the file"


def _codes(scenario: Scenario, call: str, paths: str) -> set[int]:
    if paths.startswith(str(scenario.inputs)):
        return {7}
    if call in LOOKING:
        return {6, 7}
    return {5, 6} if call == "lock" else {6}


def _names(said: str, path: Path, faults: Faults) -> bool:
    """Whether a file, or a folder that it is in, is named."""
    around = (one for one in path.parents if faults.folder in one.parents)
    return any(str(one) in said for one in (path, *around))


def _left(scenario: Scenario, faults: Faults, code: int, said: str) -> Iterator[str]:
    """What is wrong with what there is after a run."""
    found = _at(scenario)
    kept = scenario.output.with_name(".merged.old")
    if found not in (None, scenario.old, scenario.expected):
        yield "the output is neither old nor complete"
    if found is None and scenario.old is not None:
        if content(kept) != scenario.old:
            yield "the old output is lost"
        elif str(kept) not in said:
            yield "where the old output is, is not told"
    if code == 0:
        return
    before = [] if scenario.before is None else [p.name for p in scenario.before.iterdir()]
    for name in scenario.left():
        # Harmless, and not there for long; the old one may still be there if no call tells so.
        harmless = name == ".merged.lock" or (found == scenario.expected and faults.kind.persistent)
        if str(scenario.output.with_name(name)) not in said and not harmless and name not in before:
            yield f"{name} is left and not told"
    if not scenario.left() and found is None and scenario.before is None:
        removed = any(call == "rmdir" for call, _ in faults.failed)
        if scenario.output.parent.exists() and not removed and not faults.kind.persistent:
            yield "an empty folder is left"


def _at(scenario: Scenario) -> Content | None:
    return content(scenario.output) if scenario.output.exists() else None


def _descriptors() -> set[tuple[str, str]]:
    """What is open, by number; what threads of earlier runs close meanwhile is no matter of this one."""
    found = set()
    for opened in [*Path("/proc/self/fd").iterdir()]:
        with contextlib.suppress(FileNotFoundError):  # the list itself
            found.add((opened.name, str(opened.readlink())))
    return found


def _join(others: Collection[threading.Thread]) -> None:
    """Wait for the threads of a run; `others` were there before, and may never end."""
    for thread in threading.enumerate():
        if thread not in others:
            thread.join(HANGS_SECONDS)


def sweep(
    scenario: Scenario, kinds: Iterable[Kind], folder: Path, step: int = 1
) -> tuple[int, int, list[str]]:
    """Fail every `step`-th call in each of these ways.

    Returns how many calls there are without a fault, how many runs were made to fail, and what was wrong.
    """
    inputs = content(scenario.inputs)
    calls = runs = 0
    wrong = []
    for number, kind in enumerate(kinds):
        at = 1 + number % step  # another one each time
        while True:
            faults = Faults(kind, at, folder)
            found = check(scenario, faults, inputs)
            where = faults.failed[0] if faults.failed else None
            wrong += [f"{scenario.name}, {kind}, call {at} {where}: {it}" for it in found]
            if where is None:
                calls = max(calls, faults.calls)
                break
            runs += 1
            at += step
        print(f"{scenario.name}: {kind}, {runs} runs so far", file=sys.stderr, flush=True)
    return calls, runs, wrong


def main(arguments: Sequence[str] | None = None) -> None:
    """Run what the command line asks for."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--step", type=int, default=1, help="fail only every so many calls")
    parser.add_argument("--workers", type=int, nargs="*", default=[1, 2])
    parser.add_argument("--only", help="scenarios whose names contain this")
    parser.add_argument("--folder", type=Path, help="where to put the temporary folder")
    options = parser.parse_args(arguments)
    failed = 0
    for workers in options.workers:
        with tempfile.TemporaryDirectory(prefix="streamshard-faults-", dir=options.folder) as made:
            for scenario in scenarios(Path(made), workers=workers).values():
                if options.only and options.only not in scenario.name:
                    continue
                calls, runs, wrong = sweep(scenario, KINDS, Path(made), options.step)
                print(*wrong, sep="\n", end="\n" * bool(wrong), file=sys.stderr)
                print(
                    f"{scenario.name}, {workers} workers: {calls} calls, {runs} runs with faults, "
                    f"{len(wrong)} wrong",
                    flush=True,
                )
                failed += len(wrong)
    sys.exit(bool(failed))


if __name__ == "__main__":
    main()
