"""Lose power at every point of a run, on a disk that may forget what was not synced.

    python bench/powerloss.py

A run of the command line writes through the seam in `streamshard/disk`, where everything that changes
the disk is recorded. From the record follows which states the disk may be in if power is lost after
any of these steps, see `forgetful_disk.py`.

No state may show under the output's name anything but the older output or the complete new one. Each
state is also put on a real disk, where the same command must end with the bytes of a clean run and
nothing beside them. At last each sync is left out of the record, one after the other, and it is told
how many of them are missed: the others keep what no output depends on, such as the lock.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import re
import sys
import tempfile
import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from forgetful_disk import Disk, Step, Tree
from scenarios import Scenario, content, digests, replaced, run, scenarios

from streamshard.disk.system import system

__all__ = ["examine", "inside", "record", "shown", "states", "unnoticed"]

# --- recording ------------------------------------------------------------------------------------


def record(scenario: Scenario) -> tuple[Tree, list[Step]]:
    """What is there before a run, and all its steps, in the folder around the output's folder."""
    scenario.begin()
    top = scenario.output.parent.parent
    start = {path: data for path, data in _tree(top).items() if path.startswith("place")}
    recorder = _Recorder(top, start)
    with recorder.active():
        code, said = run(scenario.command)
    scenario.end()
    if code:
        raise RuntimeError(said)
    return start, recorder.steps


def _tree(top: Path) -> Tree:
    return {
        f"{path.relative_to(top)}": path.read_bytes() if path.is_file() else None
        for path in sorted(top.rglob("*"))
    }


class _Recorder:
    def __init__(self, top: Path, start: Tree) -> None:
        self.top = top
        self.steps: list[Step] = []
        self.lock = threading.RLock()
        self.inodes = {"": 0} | {path: n for n, path in enumerate(sorted(start), 1)}
        self.count = len(self.inodes)
        self.opened: dict[int, int] = {}

    @contextlib.contextmanager
    def active(self) -> Iterator[None]:
        calls = (
            "open",
            "pwrite",
            "truncate",
            "allocate",
            "fsync",
            "mkdir",
            "rmdir",
            "unlink",
            "rename",
        )
        with replaced(system, {name: self.wrapped(name, getattr(system, name)) for name in calls}):
            yield

    def wrapped(self, name: str, call: Callable[..., Any]) -> Callable[..., Any]:
        def calling(*arguments: Any) -> Any:
            with self.lock:  # so that the order is that of the disk
                there = name == "open" and Path(arguments[0]).exists()
                result = call(*arguments)
                getattr(self, name)(*arguments, result=result, there=there)
                return result

        return calling

    def place(self, path: Path) -> str | None:
        """A path as it is called here; None if it is elsewhere."""
        path = Path(path)
        return f"{path.relative_to(self.top)}" if path.is_relative_to(self.top) else None

    def new(self, path: str, *, folder: bool) -> None:
        self.inodes[path] = self.count
        self.steps.append(Step("new", self.count, offset=int(folder)))
        self.entry({path: self.count})
        self.count += 1

    def entry(self, changes: dict[str, int | None]) -> None:
        """Note a change of names in one folder."""
        (above,) = {path.rpartition("/")[0] for path in changes}
        names = tuple((path.rpartition("/")[2], inode) for path, inode in changes.items())
        self.steps.append(Step("names", self.inodes[above], names))

    def open(self, path: Path, flags: int, *, result: int, there: bool) -> None:
        self.opened.pop(result, None)
        place = self.place(path)
        if place == ".":
            place = ""
        if place is not None:
            if not there:
                self.new(place, folder=False)
            if place in self.inodes:
                self.opened[result] = self.inodes[place]

    def pwrite(
        self, descriptor: int, data: memoryview, offset: int, *, result: int, there: bool
    ) -> None:
        step = Step("write", self.opened[descriptor], data=bytes(data[:result]), offset=offset)
        self.steps.append(step)

    def truncate(self, descriptor: int, nbytes: int, **_: Any) -> None:
        self.steps.append(Step("length", self.opened[descriptor], offset=nbytes))

    allocate = truncate  # of a file that is no longer

    def fsync(self, descriptor: int, **_: Any) -> None:
        self.steps.append(Step("sync", self.opened[descriptor]))

    def mkdir(self, path: Path, **_: Any) -> None:
        self.new(self.place(path) or "", folder=True)

    def unlink(self, path: Path, **_: Any) -> None:
        place = self.place(path) or ""
        self.entry({place: None})
        del self.inodes[place]

    rmdir = unlink

    def rename(self, path: Path, other: Path, **_: Any) -> None:
        old, new = self.place(path) or "", self.place(other) or ""
        self.entry({old: None, new: self.inodes[old]})
        moved = {p: n for p, n in self.inodes.items() if p == old or p.startswith(f"{old}/")}
        for place in moved:
            del self.inodes[place]
        self.inodes |= {new + place[len(old) :]: inode for place, inode in moved.items()}


# --- looking at the states ------------------------------------------------------------------------


def states(start: Tree, steps: Sequence[Step]) -> Iterator[tuple[int, Tree]]:
    """Every state that is tried, once, with the number of steps that came before power was lost."""
    disk, seen = Disk(start), set()
    for number, step in enumerate([None, *steps]):
        if step is not None:
            disk.apply(step)
        for tree in disk.states():
            key = _key(tree)
            if key not in seen:
                seen.add(key)
                yield number, tree


def _key(tree: Tree) -> bytes:
    digest = hashlib.blake2b(digest_size=16)
    for path, data in sorted(tree.items()):
        digest.update(f"{path}\0{'folder' if data is None else len(data)}\0".encode())
        digest.update(data or b"")
    return digest.digest()


def shown(scenario: Scenario, tree: Tree) -> str | None:
    """What is wrong with what a state shows under the output's name."""
    place = f"place/{scenario.output.name}"
    if place not in tree:
        kept = digests(inside(tree, f"place/.{scenario.output.name}.old"))
        return "the old output is lost" if scenario.old not in (None, kept) else None
    found = digests(inside(tree, place))
    return None if found in (scenario.old, scenario.expected) else "neither old nor complete"


def inside(tree: Tree, folder: str) -> dict[str, bytes]:
    """The files in a folder of a state, by path relative to it."""
    start = f"{folder}/"
    return {
        path.removeprefix(start): data
        for path, data in tree.items()
        if data is not None and path.startswith(start)
    }


def _renumbered(lock: bytes, place: Path) -> bytes:
    """What a lock notes, with the numbers that folders have here; on one disk these stay the same."""
    partial, old, output = (place / name for name in (".merged.partial", ".merged.old", "merged"))
    meant = {"old": old if old.exists() else output, "new": partial if partial.exists() else output}
    for which, folder in meant.items():
        if folder.exists():
            number = f'"{which}": {folder.stat().st_ino}'.encode()
            lock = re.sub(rf'"{which}": \d+'.encode(), number, lock)
    return lock


def continued(scenario: Scenario, tree: Tree) -> str | None:
    """Put a state on the disk and run the command again; what is wrong with how that ends."""
    scenario.end()
    top = scenario.output.parent.parent
    for path, data in tree.items():
        if data is None:
            (top / path).mkdir()
        else:
            (top / path).write_bytes(data)
    lock = top / "place" / f".{scenario.output.name}.lock"
    if lock.exists():
        lock.chmod(0o600)  # as it was made
        lock.write_bytes(_renumbered(lock.read_bytes(), lock.parent))
    complete = f"place/{scenario.output.name}" in tree
    code, said = run(scenario.command)
    if code and not (complete and scenario.old is None and code == 5):
        return f"the next run ended with {code}: {said}"
    if content(scenario.output) != scenario.expected:
        return "the next run has other bytes than a clean one"
    return f"after the next run there is {scenario.left()}" if scenario.left() else None


def examine(scenario: Scenario, *, step: int = 1) -> tuple[int, int, list[str]]:
    """Look at all states of a scenario, and continue every `step`-th of them.

    Returns the number of steps, that of states, and what is wrong.
    """
    start, steps = record(scenario)
    wrong, count = [], 0
    for count, (number, tree) in enumerate(states(start, steps), 1):
        problem = shown(scenario, tree)
        if problem is None and count % step == 0:
            problem = continued(scenario, tree)
        if problem is not None:
            wrong.append(f"{scenario.name}, after step {number} of {len(steps)}: {problem}")
    scenario.end()
    return len(steps), count, wrong


def unnoticed(scenario: Scenario) -> tuple[int, list[Step]]:
    """How many syncs there are, and those without which no state would look wrong."""
    start, steps = record(scenario)
    syncs = [place for place, step in enumerate(steps) if step.what == "sync"]
    found = []
    for place in syncs:
        without = [step for number, step in enumerate(steps) if number != place]
        if not any(shown(scenario, tree) for _, tree in states(start, without)):
            found.append(replace(steps[place], offset=place))
    return len(syncs), found


def main(arguments: Sequence[str] | None = None) -> None:
    """Run what the command line asks for."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--step", type=int, default=1, help="continue only every so many states")
    parser.add_argument("--folder", type=Path, help="where to put the temporary folder")
    options = parser.parse_args(arguments)
    failed = 0
    with tempfile.TemporaryDirectory(prefix="streamshard-power-", dir=options.folder) as made:
        for scenario in scenarios(Path(made)).values():
            steps, count, wrong = examine(scenario, step=options.step)
            print(*wrong, sep="\n", end="\n" * bool(wrong), file=sys.stderr)
            print(f"{scenario.name}: {steps} steps, {count} states, {len(wrong)} wrong", flush=True)
            failed += len(wrong)
            if "merge" in scenario.name:  # a conversion writes so many blocks that it takes long
                syncs, unseen = unnoticed(scenario)
                print(
                    f"  without one of {syncs} syncs: {syncs - len(unseen)} are missed", flush=True
                )
    sys.exit(bool(failed))


if __name__ == "__main__":
    main()
