"""Kill a merge at each of many points, run it again, and compare every byte with a clean run.

    python bench/crash.py --points 200

A child process merges a small model and ends itself with SIGKILL before its N-th call to the operating
system (every read, write, sync, rename and so on counts), for N spread evenly over the whole run;
half of the points while an older output is being replaced. After each kill the output must be absent,
the old one or complete; after the second run it must be that of a clean run, with nothing left beside
it and all inputs untouched. Prints how many points passed and fails if one did not.

The last point lies beyond the end: nothing is killed there, so a count of calls that is wrong shows.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from scenarios import CALLS, ROOT, content  # loads all that a run needs, before any child is made

from streamshard import cli
from streamshard.disk.system import system

RESUMED = [0]
WORKERS = ("1", "2")
STRANGERS = ("merged.lock", ".merged", ".merged.partial.old", ".lock", "merged.part")


def main(arguments: Sequence[str] | None = None) -> None:
    """Run what the command line asks for."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--points", type=int, default=200, help="how many kills (default 200)")
    parser.add_argument("--folder", type=Path, help="where to put the temporary folder")
    options = parser.parse_args(arguments)
    with tempfile.TemporaryDirectory(prefix="streamshard-crash-", dir=options.folder) as folder:
        passed = run(Path(folder), options.points)
    print(f"{passed} of {options.points} ({RESUMED[0]} continued with files that were finished)")
    sys.exit(passed != options.points)


def run(folder: Path, points: int) -> int:
    """Kill at so many points; returns how many passed."""
    base, adapter = folder / "base", folder / "adapter"
    make = [sys.executable, str(ROOT / "tools" / "make_checkpoint.py"), "--preset", "tiny"]
    make += ["--layout", "custom", "--max-shard-size", "60KB", "--output", str(base)]
    subprocess.run([*make, "--adapter", str(adapter)], check=True, stdout=subprocess.DEVNULL)
    inputs = {**content(base), **content(adapter)}
    (folder / "clean").mkdir()
    command = ["merge-lora", "--quiet", "--sha256"]
    command += ["--base", str(base), "--adapter", str(adapter)]
    clean = folder / "clean" / "merged"
    expect(child([*command, "--output", str(clean)]), 0, "the clean run")
    expected = content(clean)
    older = folder / "older"
    expect(child([*command, "--weight", "0.5", "--output", str(older)]), 0, "the older run")
    passed = 0
    calls: dict[tuple[bool, str], int] = {}
    for number in range(points):
        replaces, workers = bool(number % 2), WORKERS[number // 2 % 2]
        place = folder / f"point-{number}"
        place.mkdir()
        output = place / "merged"
        theirs = bystanders(place)
        full = [*command, "--workers", workers, "--output", str(output)]
        full += ["--overwrite"] * replaces
        old = older if replaces else None
        if (replaces, workers) not in calls:
            calls[replaces, workers] = counted(full, output, old)
        count = calls[replaces, workers]
        at = 1 + count * (number // 2) // max((points + 1 - replaces) // 2 - 1, 1)
        try:
            passed += kill_and_repeat(full, output, old, expected, (at, count))
        except AssertionError as error:
            print(f"point {number}: {error}", file=sys.stderr)
        if bystanders(place, make=False) != theirs:
            sys.exit(f"point {number}: files of others have changed")
        shutil.rmtree(place)
        if {**content(base), **content(adapter)} != inputs:
            sys.exit(f"point {number}: the inputs have changed")
    return passed


def bystanders(place: Path, *, make: bool = True) -> dict[str, tuple[int, bytes]]:
    """Files of others, with names much like those that a run uses: their inodes and bytes."""
    files = [place / name for name in (*STRANGERS, ".merged.older/file")]
    for file in files if make else ():
        file.parent.mkdir(exist_ok=True)
        file.write_bytes(file.name.encode())
    return {file.name: (file.stat().st_ino, file.read_bytes()) for file in files}


def kill_and_repeat(
    command: list[str],
    output: Path,
    older: Path | None,
    expected: dict[str, str],
    place: tuple[int, int],
) -> bool:
    """Kill before a call (its number, of how many) and run again; raises `AssertionError`."""
    before = None
    if older is not None:
        shutil.copytree(older, output)
        before = content(output)
    at, calls = place
    code = child(command, at)
    if at < calls * 0.95:  # threads make some calls more or less
        expect(code, -signal.SIGKILL, f"call {at} of {calls}")
    found = content(output) if output.exists() else None
    complete = found == expected
    if not complete and found != before:
        recovered = output.with_name(f".{output.name}.old")
        lost = found is not None or before is None or content(recovered) != before
        if lost:
            raise AssertionError(f"call {at} of {calls}: the output is neither old nor complete")
    again = child(command)
    if not (complete and older is None and again == 5):  # it was there already
        expect(again, 0, f"the run after call {at} of {calls}")
    if content(output) != expected:
        raise AssertionError(f"call {at} of {calls}: other bytes than a clean run")
    RESUMED[0] += bool(json.loads((output / "streamshard.json").read_bytes())["resumed"])
    theirs = {*STRANGERS, ".merged.older", output.name}
    stray = sorted(path.name for path in output.parent.iterdir() if path.name not in theirs)
    if stray:
        raise AssertionError(f"call {at} of {calls}: left {stray}")
    return True


def counted(command: list[str], output: Path, older: Path | None) -> int:
    """How many calls a whole run makes."""
    reader, writer = os.pipe()
    twin = output.parent / "twin"
    twin.mkdir()
    if older is not None:
        shutil.copytree(older, twin / "merged")
    elsewhere = [str(twin / "merged") if part == str(output) else part for part in command]
    expect(child(elsewhere, tell=writer), 0, "the counted run")
    os.close(writer)
    with os.fdopen(reader) as pipe:
        count = int(pipe.read())
    shutil.rmtree(twin)
    return count


def child(command: list[str], at: int = 0, tell: int | None = None) -> int:
    """Run a command in a forked process that is killed before its call number `at`.

    Returns its exit code, negative for a signal. The number of calls is written to `tell`.
    """
    pid = os.fork()
    if pid:
        return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    code = 1
    try:
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
        count = instrument(at)
        sys.argv = ["streamshard", *command]
        try:
            cli.main()
            code = 0
        except SystemExit as ended:
            code = int(ended.code or 0)
        if tell is not None:
            os.write(tell, str(count()).encode())
    finally:
        os._exit(code)


def instrument(at: int) -> Callable[[], int]:
    """Count all calls to the operating system and end the process before number `at`."""
    done, lock = [0], threading.Lock()

    def wrapped(call: Callable[..., Any]) -> Callable[..., Any]:
        def counting(*arguments: Any) -> Any:
            with lock:
                done[0] += 1
                if done[0] == at:
                    os.kill(os.getpid(), signal.SIGKILL)
            return call(*arguments)

        return counting

    for name in CALLS:
        setattr(system, name, wrapped(getattr(system, name)))
    return lambda: done[0]


def expect(code: int, expected: int, what: str) -> None:
    """Raise `AssertionError` unless a run ended as it should."""
    if code != expected:
        raise AssertionError(f"{what} ended with {code}, not {expected}")


if __name__ == "__main__":
    main()
