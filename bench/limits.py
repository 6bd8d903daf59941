"""A real limit of memory: merge and convert a model more than ten times larger than RLIMIT_DATA.

    python bench/limits.py --limit 180MB --preset InternVL3-1B

The limit counts all private memory of the process that could be written to, touched or not:
interpreter, libraries and thread stacks included. Under the same limit a process that allocates a
tenth of the model is shown to fail. Outputs must have the bytes of a run without a limit. Prints
JSON; exits with 1 if anything is not so. Needs Linux and four times the model's size of disk.

Then every size of a limit is tried, on a tiny model: RLIMIT_DATA from 16 to 256 MB, RLIMIT_AS from
100 MB to 2 GB. Each run must end with 0 and the right bytes, or with 6 and a message.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import resource
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
COMMAND = [sys.executable, "-m", "streamshard"]


def run(
    command: Sequence[str], limit: int | None, kind: str = "RLIMIT_DATA"
) -> subprocess.CompletedProcess[str]:
    """Run a command under a limit of its memory, in bytes."""

    def restrict() -> None:
        if limit is not None:
            resource.setrlimit(getattr(resource, kind), (limit, limit))

    return subprocess.run(
        command, preexec_fn=restrict, capture_output=True, text=True, check=False, cwd=ROOT
    )


def digest(folder: Path) -> dict[str, str]:
    """Digests of the weights in a folder, which are removed: there may be no space for more."""
    found = {}
    for file in sorted(folder.glob("*.safetensors")):
        content = hashlib.sha256()
        with file.open("rb") as opened:
            while block := opened.read(1 << 20):
                content.update(block)
        found[file.name] = content.hexdigest()
        file.unlink()
    return found


def measure(name: str, command: list[str], output: Path, limit: int) -> dict[str, Any]:
    """Run a command with and without a limit."""
    results = {}
    for restricted in (True, False):
        done = run([*COMMAND, *command, "--json"], limit if restricted else None)
        report = json.loads(done.stdout) if done.returncode == 0 else None
        results[restricted] = (digest(output) if report else None, report, done.stderr)
        shutil.rmtree(output, ignore_errors=True)
    mine, report, said = results[True]
    return {
        "command": name,
        "limit": limit,
        "bytes": report and report["bytes"],
        "times larger": report and round(report["bytes"] / limit, 1),
        "peak resident bytes": report and report["peak_rss_bytes"],
        "seconds": report and report["seconds"],
        "same bytes as without": mine is not None and mine == results[False][0],
        "error": None if report else said[-500:],
    }


def sweep(folder: Path, workers: int) -> dict[str, Any]:
    """Where a merge of a tiny model ends with which code, and every end that is not right."""
    tool = [sys.executable, str(ROOT / "tools" / "make_checkpoint.py"), "--preset", "tiny"]
    base, adapter, output = (folder / name for name in ("tiny", "tiny-adapter", "tiny-out"))
    for more in (["--output", str(base)], ["--adapter", str(adapter)]):
        command = [*tool, "--layout", "custom", "--seed", "1", *more]
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    merge = ["merge-lora", "--base", base, "--adapter", adapter, "--output", output]
    command = [*COMMAND, *map(str, merge), "--workers", str(workers)]
    run(command, None)
    wanted = digest(output)
    sizes = {
        "RLIMIT_DATA": range(16, 257, 8),
        "RLIMIT_AS": [*range(100, 300, 10), *range(300, 2001, 50)],
    }
    found: dict[str, Any] = {"workers": workers, "runs": 0, "wrong": []}
    for kind, every in sizes.items():
        enough = None
        for size in every:
            shutil.rmtree(output, ignore_errors=True)
            done = run(command, size * 10**6, kind)
            found["runs"] += 1
            told = done.returncode == 6 and "not enough memory" in done.stderr
            right = done.returncode == 0 and digest(output) == wanted
            if not (told or right) or (told and output.exists()) or "Traceback" in done.stderr:
                found["wrong"].append([kind, size, done.returncode, done.stderr[-300:]])
            if right and enough is None:
                enough = size * 10**6
        found[f"{kind} that is enough"] = enough
    for path in (base, adapter, output):
        shutil.rmtree(path, ignore_errors=True)
    return found


def main() -> None:
    """Generate a model, run, print."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--limit", default="180MB", help="like 180MB")
    parser.add_argument("--preset", default="InternVL3-1B")
    parser.add_argument("--folder", type=Path, help="where to put the temporary folder")
    options = parser.parse_args()
    limit = int(options.limit.upper().removesuffix("MB")) * 10**6
    with tempfile.TemporaryDirectory(prefix="streamshard-limits-", dir=options.folder) as made:
        folder = Path(made)
        base, hf, adapter, output = (folder / name for name in ("base", "hf", "adapter", "out"))
        tool = [
            sys.executable,
            str(ROOT / "tools" / "make_checkpoint.py"),
            "--preset",
            options.preset,
        ]
        for arguments in (
            ["--layout", "custom", "--output", str(base)],
            ["--layout", "hf", "--output", str(hf)],
            ["--layout", "custom", "--adapter", str(adapter)],
        ):
            subprocess.run([*tool, *arguments], check=True, stdout=subprocess.DEVNULL)
        nbytes = sum(file.stat().st_size for file in base.glob("*.safetensors"))
        control = run([sys.executable, "-c", f"bytearray({nbytes // 10})"], limit)
        merge = ["merge-lora", "--base", base, "--adapter", adapter, "--output", output]
        convert = ["hf2custom", "--hf-path", hf, "--custom-path", base, "--save-path", output]
        results = [
            measure("merge-lora", [str(part) for part in merge], output, limit),
            measure("hf2custom", [str(part) for part in convert], output, limit),
        ]
        sweeps = [sweep(folder, workers) for workers in (1, 2, 8)]
    print(
        json.dumps(
            {
                "a tenth of the model fits": control.returncode == 0,
                "runs": results,
                "every limit": sweeps,
            },
            indent=2,
        )
    )
    right = all(row["same bytes as without"] for row in results)
    sys.exit(not (control.returncode and right and not any(row["wrong"] for row in sweeps)))


if __name__ == "__main__":
    os.environ["OPENBLAS_NUM_THREADS"] = "1"
    main()
