"""Flipped bits and bytes in every file of an output, its record included: `verify` must find all.

    python bench/flips.py --count 2000

In a small output, one byte after the other is changed, at `--count` random places of every file (at
every place if the file is smaller): half of the times one bit of it, else all of the byte.
`verify` must say each time that something is wrong, and name no other exit code than its own.
Also: every file cut by a byte, longer by a byte, empty, removed, and exchanged with every other.
Prints JSON; exits with 1 if anything was not found.
"""

from __future__ import annotations

import argparse
import json
import random
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import streamshard  # noqa: E402
from streamshard.errors import VerificationError  # noqa: E402

Change = tuple[str, dict[Path, bytes | None]]


def output(folder: Path) -> Path:
    """A merged model of several shards, with remote code, a tokenizer and a folder beside them."""
    base, adapter, made = (folder / name for name in ("base", "adapter", "merged"))
    tool = [sys.executable, str(ROOT / "tools" / "make_checkpoint.py"), "--preset", "tiny"]
    for more in (["--output", str(base), "--max-shard-size", "150KB"], ["--adapter", str(adapter)]):
        subprocess.run([*tool, "--layout", "custom", *more], check=True, capture_output=True)
    (base / "examples").mkdir()
    (base / "examples" / "picture.jpg").write_bytes(bytes(range(256)))
    streamshard.merge_lora(base=base, adapter=adapter, output=made, sha256=True)
    return made


def found(folder: Path) -> bool:
    """Whether `verify` says that something is wrong; any other error is one of `verify` itself."""
    try:
        streamshard.verify(folder, workers=1)
    except VerificationError as error:
        return bool(error.report["problems"])
    return False


def flips(file: Path, count: int, rng: random.Random) -> Iterator[tuple[int, int]]:
    """Places in a file, and what to change there: the bits of a mask."""
    nbytes = file.stat().st_size
    places = range(nbytes) if nbytes <= count else sorted(rng.sample(range(nbytes), count))
    for place in places:
        yield place, 1 << rng.randrange(8) if rng.random() < 0.5 else 0xFF


def missed_flips(folder: Path, file: Path, count: int, rng: random.Random) -> tuple[int, list[Any]]:
    """How many changes of one byte were made in a file, and those that were not found."""
    missed, tried = [], 0
    with file.open("r+b", buffering=0) as opened:
        for place, mask in flips(file, count, rng):
            opened.seek(place)
            (byte,) = opened.read(1)
            for value in (byte ^ mask, byte):
                opened.seek(place)
                opened.write(bytes([value]))
                if value != byte:
                    tried += 1
                    if not found(folder):
                        missed.append([file.name, place, mask])
    return tried, missed


def changes(files: list[Path]) -> Iterator[Change]:
    """Larger damage: a name for it, and the content that files have then; None if they are gone."""
    content = {file: file.read_bytes() for file in files}
    for file, data in content.items():
        yield f"{file.name} cut", {file: data[:-1]}
        yield f"{file.name} longer", {file: data + b"\n"}
        yield f"{file.name} empty", {file: b""}
        if file.name != "streamshard.json":  # without it there is nothing to compare with
            yield f"{file.name} removed", {file: None}
        for other, another in content.items():
            if str(other) > str(file) and another != data:
                yield f"{file.name} and {other.name} exchanged", {file: another, other: data}


def missed_changes(folder: Path, files: list[Path]) -> tuple[int, list[Any]]:
    """How many larger changes were made, and those that were not found."""
    missed, tried = [], 0
    for name, change in changes(files):
        before = {file: file.read_bytes() for file in change}
        for file, data in change.items():
            file.unlink()
            if data is not None:
                file.write_bytes(data)
        tried += 1
        if not found(folder):
            missed.append(name)
        for file, data in before.items():
            file.write_bytes(data)
    return tried, missed


def main() -> None:
    """Make an output, damage it, print."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--count", type=int, default=2000, help="places in each file")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--folder", type=Path, help="where to put the temporary folder")
    options = parser.parse_args()
    rng, began = random.Random(options.seed), time.perf_counter()
    with tempfile.TemporaryDirectory(prefix="streamshard-flips-", dir=options.folder) as made:
        folder = output(Path(made))
        files = sorted(path for path in folder.rglob("*") if path.is_file())
        if found(folder):
            sys.exit("verify finds something wrong with an output that nobody has changed")
        rows: dict[str, Any] = {}
        missed: list[Any] = []
        for file in files:
            tried, not_found = missed_flips(folder, file, options.count, rng)
            missed += not_found
            rows[str(file.relative_to(folder))] = f"{tried - len(not_found)} of {tried}"
        flipped = sum(int(row.rpartition(" ")[2]) for row in rows.values())
        tried, not_found = missed_changes(folder, files)
        if found(folder):
            sys.exit("something was not put back")
    report = {
        "flips found": rows,
        "flips": f"{flipped - len(missed)} of {flipped} in {len(rows)} files",
        "other damage": f"{tried - len(not_found)} of {tried}",
        "missed": [*missed, *not_found],
        "seconds": round(time.perf_counter() - began, 1),
    }
    print(json.dumps(report, indent=2))
    sys.exit(bool(report["missed"]))


if __name__ == "__main__":
    main()
