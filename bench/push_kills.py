"""Kill a push at each of many points, run it again, and compare what the hub has with a clean push.

    python bench/push_kills.py --points 100

A child process merges a small model, pushes it to a local hub and ends itself with SIGKILL before its
N-th call to the operating system, for N spread evenly over the whole run; half of the points with an
output that stays here too. After the second run the repository must have the files of a clean push, by
one commit, and nothing may be left here. Where the kill came after everything was
done and forgotten, the second run is refused: there is a model already.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import urllib.request
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from crash import child, expect
from scenarios import ROOT

MESSAGE = "the output"
RECORD = "streamshard.json"


def main(arguments: Sequence[str] | None = None) -> None:
    """Run what the command line asks for."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--points", type=int, default=100, help="how many kills (default 100)")
    parser.add_argument("--folder", type=Path, help="where to put the temporary folder")
    options = parser.parse_args(arguments)
    with tempfile.TemporaryDirectory(prefix="streamshard-push-", dir=options.folder) as folder:
        passed = run(Path(folder), options.points)
    print(f"{passed} of {options.points}")
    sys.exit(passed != options.points)


def run(folder: Path, points: int) -> int:
    """Kill at so many points; returns how many passed."""
    make = [sys.executable, str(ROOT / "tools" / "make_checkpoint.py"), "--preset", "tiny"]
    make += ["--layout", "custom", "--max-shard-size", "90KB", "--output", str(folder / "base")]
    subprocess.run(
        [*make, "--adapter", str(folder / "lora")], check=True, stdout=subprocess.DEVNULL
    )
    serve = [sys.executable, str(ROOT / "tests" / "support" / "fake_hub.py")]
    with subprocess.Popen(
        [*serve, "--root", str(folder / "hub")], stdout=subprocess.PIPE, text=True
    ) as hub:
        try:
            assert hub.stdout is not None
            os.environ |= {**json.loads(hub.stdout.readline()), "HF_HUB_OFFLINE": "0"}
            return _points(folder, points)
        finally:
            hub.terminate()


def _points(folder: Path, points: int) -> int:
    command = ["merge-lora", "--quiet", "--workers", "2", "--commit-message", MESSAGE]
    command += ["--base", str(folder / "base"), "--adapter", str(folder / "lora")]
    expected: dict[str, Any] = {}
    calls: dict[bool, int] = {}
    for keeps in (False, True):
        reader, writer = os.pipe()
        repo = f"org/clean-{keeps}".lower()
        expect(_here(folder, [*command, *_to(repo, keeps=keeps)], tell=writer), 0, "a clean push")
        os.close(writer)
        with os.fdopen(reader) as pipe:
            calls[keeps] = int(pipe.read())
        expected = tree(repo)
    passed = 0
    for number in range(points):
        keeps = bool(number % 2)
        at = 1 + calls[keeps] * (number // 2) // max(points // 2 - 1, 1)
        what = f"call {at} of {calls[keeps]}{', kept' if keeps else ''}"
        try:
            _kill_and_repeat(folder, command, (f"org/new-{number}", keeps), at, expected)
            passed += 1
        except AssertionError as error:
            print(f"{what}: {error}", file=sys.stderr)
    return passed


def _to(repo: str, *, keeps: bool) -> list[str]:
    return ["--push-to", repo, *(["--output", "kept"] if keeps else [])]


def _here(folder: Path, command: list[str], at: int = 0, tell: int | None = None) -> int:
    """The child in a folder of its own; how it ended."""
    place = folder / "here"
    place.mkdir(exist_ok=True)
    os.chdir(place)
    return child(command, at, tell)


def _kill_and_repeat(
    folder: Path, command: list[str], to: tuple[str, bool], at: int, expected: dict[str, Any]
) -> None:
    repo, keeps = to
    full = [*command, *_to(repo, keeps=keeps)]
    for path in (folder / "here").glob("kept*"):
        subprocess.run(["rm", "-r", str(path)], check=True)
    first = _here(folder, full, at)
    done = first != 0 and tree(repo) == expected
    again = _here(folder, full)
    if first == 0 or (done and again == 5):
        expect(again, 5, "a second push")
    else:
        expect(again, 0, "the second run")
    if tree(repo) != expected:
        raise AssertionError("the repository has other files than a clean push")
    messages = [one["title"] for one in asked(f"/api/models/{repo}/commits/main")]
    if messages.count(MESSAGE) != 1:
        raise AssertionError(f"commits are {messages}")
    stray = sorted(path.name for path in (folder / "here").iterdir())
    if stray != ["kept"] * keeps and not (done and again == 5):
        raise AssertionError(f"left {stray}")


def tree(repo: str) -> dict[str, Any]:
    """The digests of the files of a repository, but for the record."""
    try:
        found = asked(f"/api/models/{repo}/tree/main?recursive=true")
    except OSError:
        return {}
    return {one["path"]: one["oid"] for one in found if one["path"] != RECORD}


def asked(path: str) -> Any:
    """What the hub answers."""
    request = urllib.request.Request(
        os.environ["HF_ENDPOINT"] + path,
        headers={"Authorization": f"Bearer {os.environ['HF_TOKEN']}"},
    )
    with urllib.request.urlopen(request) as answer:
        return json.load(answer)


if __name__ == "__main__":
    main()
