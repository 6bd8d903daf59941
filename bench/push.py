"""A merge from the hub to the hub on a disk that is smaller than the model: how full, how much memory.

    sudo python bench/push.py --preset InternVL3-1B --shards 500MB --disk 1200MB [--xet]

Makes a checkpoint and an adapter in a temporary folder, serves them from a hub of the tests' in a process
of its own, and runs `merge-lora --stream --push-to` in a folder on a tmpfs of that size, which has the
hub's cache and all temporary files too. What the hub then has must be the bytes of a merge on this
machine. Prints the memory of the process, the most that was on the disk, and how many files of weights.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import json
import os
import shutil
import subprocess
import sys
import tempfile
import threading
import time
import urllib.request
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from hub import serving

ROOT = Path(__file__).resolve().parent.parent
TARGET = "org/new"


def main(arguments: Sequence[str] | None = None) -> None:
    """Run what the command line asks for."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--preset", default="InternVL3-1B")
    parser.add_argument("--shards", default="500MB", help="size of a file of the base")
    parser.add_argument("--disk", default="1200MB", help="size of the tmpfs")
    parser.add_argument("--folder", type=Path, help="where to put the temporary folder")
    parser.add_argument("--xet", action="store_true", help="push by xet instead of LFS")
    parser.add_argument("--json", type=Path, help="write the figures there")
    options = parser.parse_args(arguments)
    with tempfile.TemporaryDirectory(prefix="streamshard-push-", dir=options.folder) as folder:
        figures = run(Path(folder), options)
    print(json.dumps(figures, indent=2))
    if options.json is not None:
        options.json.write_text(json.dumps(figures, indent=2), encoding="utf-8")


def run(place: Path, options: argparse.Namespace) -> dict[str, Any]:
    """Merge here, then from the hub to the hub; the figures of the latter."""
    base, adapter, local = (place / name for name in ("base", "lora", "local"))
    make = [sys.executable, str(ROOT / "tools/make_checkpoint.py"), "--preset", options.preset]
    make += ["--layout", "hf", "--max-shard-size", options.shards, "--adapter", str(adapter)]
    subprocess.run([*make, "--output", str(base)], check=True, stdout=subprocess.DEVNULL)
    merge = [sys.executable, "-m", "streamshard", "merge-lora", "--json", "--workers", "2"]
    given = ["--base", str(base), "--adapter", str(adapter), "--card", "none"]
    subprocess.run([*merge, *given, "--output", str(local)], check=True, stdout=subprocess.DEVNULL)
    right = {path.name: _sha256(path) for path in local.glob("*.safetensors")}
    shutil.rmtree(local)
    disk = place / "disk"
    repos = {"org/base": base, "org/lora": adapter}
    with serving(place / "hub", repos, xet=options.xet) as hub, _tmpfs(disk, options.disk):
        home = {"HF_HOME": disk / "home", "HF_HUB_CACHE": disk / "home/hub", "TMPDIR": disk / "tmp"}
        home["HF_XET_CACHE"] = disk / "home/xet"
        (disk / "tmp").mkdir()
        (disk / "here").mkdir()
        given = ["--base", "org/base", "--adapter", "org/lora", "--card", "none", "--stream"]
        full, files, report, seconds = _watched(
            [*merge, *given, "--push-to", TARGET],
            os.environ | hub | {name: str(path) for name, path in home.items()},
            disk,
        )
        left = sorted(path.name for path in (disk / "here").iterdir())
        there = _digests(hub)
    if {name: there.get(name) for name in right} != right:
        sys.exit("the hub has other bytes than a merge on this machine writes")
    return {
        "bytes": report["bytes"],
        "files": report["shards"],
        "disk": options.disk,
        "transport": "xet" if options.xet else "lfs",
        "seconds": round(seconds, 1),
        "peak_rss_bytes": report["peak_rss_bytes"],
        "most_on_disk_bytes": full,
        "most_files_of_weights": files,
        "left": left,
    }


def _watched(
    command: Sequence[str], env: dict[str, str], disk: Path
) -> tuple[int, int, dict[str, Any], float]:
    """Run a command; the most bytes and files of weights on its disk, its report, its seconds."""
    began, most, files = time.perf_counter(), 0, 0
    with subprocess.Popen(
        command, env=env, cwd=disk / "here", stdout=subprocess.PIPE, text=True
    ) as process:
        told: list[str] = []
        assert process.stdout is not None
        reader = threading.Thread(target=lambda out=process.stdout: told.append(out.read()))
        reader.start()
        while process.poll() is None:
            found = os.statvfs(disk)
            most = max(most, (found.f_blocks - found.f_bfree) * found.f_frsize)
            with contextlib.suppress(OSError):
                names = {
                    path for path in (disk / "here").rglob("model*") if ".index." not in path.name
                }
                files = max(files, len(names))
            time.sleep(0.02)
        reader.join()
    if process.returncode:
        sys.exit(f"{' '.join(command)} ended with {process.returncode}: {told[0]}")
    return most, files, json.loads(told[0]), time.perf_counter() - began


@contextlib.contextmanager
def _tmpfs(folder: Path, size: str) -> Iterator[None]:
    """A file system in memory of this size."""
    folder.mkdir()
    number = size.removesuffix("MB")
    options = f"size={int(number) * 1_000_000}"
    subprocess.run(["mount", "-t", "tmpfs", "-o", options, "tmpfs", str(folder)], check=True)
    try:
        yield
    finally:
        subprocess.run(["umount", str(folder)], check=True)


def _digests(hub: dict[str, str]) -> dict[str, str]:
    """The SHA-256 of the large files that the hub has now."""
    request = urllib.request.Request(
        f"{hub['HF_ENDPOINT']}/api/models/{TARGET}/tree/main?recursive=true",
        headers={"Authorization": f"Bearer {hub['HF_TOKEN']}"},
    )
    with urllib.request.urlopen(request) as answer:
        return {one["path"]: one["lfs"]["oid"] for one in json.load(answer) if "lfs" in one}


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


if __name__ == "__main__":
    main()
