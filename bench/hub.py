"""How fast `--stream` reads from a hub, with how many requests, and how much memory a merge takes so.

    python bench/hub.py --preset InternVL3-1B --shards 500MB --runs 5 --json hub.json

Makes a checkpoint and an adapter in a temporary folder (in memory, if `--folder` is on a tmpfs), serves
them from a hub of the tests' on this machine, in a process of its own, and measures in turn

- reading all weight files by the plainest client there is (`http.client`, one connection a thread, one
  request a file), and by what `--stream` reads with, with and without taking their SHA-256,
- merging from the folder, and from the hub with `--stream`; the outputs must be the same bytes.

Server and client share the processors of this machine. A plain client does not know whether what
came is right; whoever streams does, which is what SHA-256 costs: how long that takes alone is measured
too, and no way that checks is faster. Where others use the machine as well: under `chrt -r 5`.
"""

from __future__ import annotations

import argparse
import contextlib
import filecmp
import hashlib
import http.client
import json
import os
import resource
import shutil
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

ROOT = Path(__file__).resolve().parent.parent
BLOCK_NBYTES = 256 * 1024
REPO = "org/base"


def main(arguments: Sequence[str] | None = None) -> None:
    """Run what the command line asks for."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--preset", default="InternVL3-1B")
    parser.add_argument("--shards", default="500MB", help="size of the base's files")
    parser.add_argument("--runs", type=int, default=5, help="interleaved runs (default 5)")
    parser.add_argument("--connections", default="1,2", help="of reading (default 1,2)")
    parser.add_argument("--folder", type=Path, help="where to put the temporary folder")
    parser.add_argument("--json", type=Path, help="keep every figure in this file")
    options = parser.parse_args(arguments)
    with tempfile.TemporaryDirectory(dir=options.folder) as folder:
        place = Path(folder)
        counts = [*map(int, options.connections.split(","))]
        base, adapter = _inputs(place, options.preset, options.shards)
        with serving(place / "hub", {REPO: base}) as environment:
            os.environ.update(environment)
            figures = {
                "reading": _reading(counts, options.runs),
                "merging": _merging(place, base, adapter, options.runs),
            }
    if options.json:
        options.json.write_text(json.dumps(figures, indent=2), encoding="utf-8")


def _inputs(place: Path, preset: str, shards: str) -> tuple[Path, Path]:
    base, adapter = place / "base", place / "adapter"
    tool = str(ROOT / "tools/make_checkpoint.py")
    make = [sys.executable, tool, "--preset", preset, "--layout", "hf"]
    sizes = ["--max-shard-size", shards, "--adapter", str(adapter)]
    subprocess.run([*make, "--output", str(base), *sizes], check=True, stdout=subprocess.DEVNULL)
    return base, adapter


@contextlib.contextmanager
def serving(
    root: Path, repos: Mapping[str, Path], *, xet: bool = False
) -> Iterator[dict[str, str]]:
    """A hub of a process of its own that serves folders; gives the environment in which it is found."""
    command = [sys.executable, str(ROOT / "tests/support/fake_hub.py"), "--root", str(root)]
    command += [f"--repo={name}={folder}" for name, folder in repos.items()]
    with subprocess.Popen([*command, *["--xet"] * xet], stdout=subprocess.PIPE, text=True) as hub:
        try:
            assert hub.stdout is not None
            yield json.loads(hub.stdout.readline())
        finally:
            hub.terminate()


# --- reading --------------------------------------------------------------------------------------


def _reading(connections: Sequence[int], runs: int) -> list[dict[str, Any]]:
    """Every way to read all files, in so many connections; medians are shown."""
    from huggingface_hub import HfApi
    from huggingface_hub.hf_api import RepoFile

    commit = str(HfApi().repo_info(REPO).sha)
    listed = [
        (entry.path, entry.lfs.size, entry.lfs.sha256)
        for entry in HfApi().list_repo_tree(REPO, revision=commit)
        if isinstance(entry, RepoFile) and entry.lfs is not None
    ]
    total = sum(size for _, size, _ in listed)
    ways: dict[str, Callable[..., int]] = {
        "http.client": _plain,
        "http.client, and SHA-256": lambda name, size, sha256: _plain(
            name, size, sha256, check=True
        ),
        "--stream, nothing checked": lambda name, size, _: _streamed(commit, name, size, ""),
        "--stream": lambda *file: _streamed(commit, *file),
        "SHA-256 of memory": _hashed,
    }
    figures = []
    print(
        f"{'reading':28} {'connections':>11} {'MB/s':>8} {'of plain':>9} {'CPU s':>7} {'requests':>9}"
    )
    for count in connections:
        seen: dict[str, list[tuple[float, float, float]]] = {name: [] for name in ways}
        for _ in range(runs):
            for name, way in ways.items():
                seen[name].append(_timed(listed, way, count))
        plain = statistics.median(one[0] for one in seen["http.client"])
        for name, found in seen.items():
            seconds, cpu, requests = (statistics.median(part) for part in zip(*found, strict=True))
            print(
                f"{name:28} {count:11} {total / seconds / 1e6:8.0f} {plain / seconds:9.2f} {cpu:7.2f} "
                f"{requests / len(listed):9.1f}"
            )
            runs_of = [list(one) for one in found]
            figures.append({"name": name, "connections": count, "bytes": total, "runs": runs_of})
    return figures


def _timed(
    listed: Sequence[tuple[str, int, str]], way: Callable[..., int], count: int
) -> tuple[float, float, float]:
    """Seconds, CPU seconds and requests of reading all files so, in so many threads."""
    left, lock, requests = iter(listed), threading.Lock(), [0]

    def work() -> None:
        while True:
            with lock:
                file = next(left, None)
            if file is None:
                return
            sent = way(*file)
            with lock:
                requests[0] += sent

    begun, cpu = time.perf_counter(), _cpu()
    threads = [threading.Thread(target=work) for _ in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return time.perf_counter() - begun, _cpu() - cpu, requests[0]


def _cpu() -> float:
    used = resource.getrusage(resource.RUSAGE_SELF)
    return used.ru_utime + used.ru_stime


def _plain(name: str, size: int, sha256: str, *, check: bool = False) -> int:
    """Read a file as `http.client` does; returns how many requests that took."""
    digest = hashlib.sha256()
    url = f"{os.environ['HF_ENDPOINT']}/{REPO}/resolve/main/{name}"
    headers = {"Authorization": f"Bearer {os.environ['HF_TOKEN']}"}
    for sent in (1, 2):
        parts = urlsplit(url)
        with contextlib.closing(http.client.HTTPConnection(parts.netloc)) as connection:
            connection.request("GET", f"{parts.path}?{parts.query}", headers=headers)
            answer = connection.getresponse()
            if answer.status == 302:
                url, headers = answer.headers["Location"], {}
                continue
            buffer, done = memoryview(bytearray(BLOCK_NBYTES)), 0
            while count := answer.readinto(buffer):
                done += count
                if check:
                    digest.update(buffer[:count])
            assert done == size, (name, done)
            assert not check or digest.hexdigest() == sha256, name
            return sent
    raise AssertionError(name)


def _hashed(_name: str, size: int, _sha256: str) -> int:
    """Take the digest of so many bytes that are there already."""
    digest, block = hashlib.sha256(), bytes(1 << 20)
    for _ in range(size >> 20):
        digest.update(block)
    return 0


def _streamed(commit: str, name: str, size: int, sha256: str) -> int:
    """The like as `--stream` reads."""
    from streamshard.checkpoint.hub_ranges import HubFile
    from streamshard.disk.remote import Remote

    opener = HubFile(REPO, commit, name, size, where=name)
    remote = Remote(name, size, f"sha256:{sha256}" if sha256 else "", opener)
    buffer, done = memoryview(bytearray(BLOCK_NBYTES)), 0
    with remote.open(name) as file:
        file.onward = True
        while count := file.read_into(buffer, done):
            done += count
    assert done == size, (name, done)
    assert remote.frontier.outcome()[0] is bool(sha256)
    return opener.requests


# --- merging --------------------------------------------------------------------------------------


def _merging(place: Path, base: Path, adapter: Path, runs: int) -> list[dict[str, Any]]:
    """Merges from the folder and from the hub; medians are shown."""
    ways = {"from the folder": [str(base)], "from the hub, --stream": [REPO, "--stream"]}
    seen: dict[str, list[dict[str, Any]]] = {name: [] for name in ways}
    for run in range(runs):
        for name, source in ways.items():
            output = place / name
            seen[name].append(_merged(source, adapter, output))
        if not run:
            _compare(*(place / name for name in ways))
        for name in ways:
            shutil.rmtree(place / name)
    print(
        f"{'merging':28} {'seconds':>8} {'MB/s':>8} {'RSS MB':>8} {'requests a file':>16} {'checked':>8}"
    )
    for name, reports in seen.items():
        seconds, rss = (
            statistics.median(one[key] for one in reports) for key in ("seconds", "peak_rss_bytes")
        )
        files = ((reports[0]["sources"] or {}).get("base") or {"files": {}})["files"].values()
        sent = max((file["requests"] for file in files), default=0)
        checked = f"{sum(file['checked'] for file in files)}/{len(files)}"
        rate = reports[0]["bytes"] / seconds / 1e6
        print(f"{name:28} {seconds:8.2f} {rate:8.0f} {rss / 1e6:8.1f} {sent:16} {checked:>8}")
    return [{"name": name, "runs": reports} for name, reports in seen.items()]


def _merged(source: Sequence[str], adapter: Path, output: Path) -> dict[str, Any]:
    command = [sys.executable, "-m", "streamshard", "merge-lora", "--base", *source, "--json"]
    done = subprocess.run(
        [*command, "--adapter", str(adapter), "--output", str(output), "--quiet"],
        check=True,
        capture_output=True,
        cwd=ROOT,
    )
    report: dict[str, Any] = json.loads(done.stdout)
    return report


def _compare(one: Path, other: Path) -> None:
    """Both outputs must be the same, but for what says where inputs are from, and what a hub adds."""
    names, others = (
        {path.name for path in place.iterdir()}
        - {"streamshard.json", "README.md", ".gitattributes"}
        for place in (one, other)
    )
    assert names == others, names ^ others
    for name in names:
        assert filecmp.cmp(one / name, other / name, shallow=False), name


if __name__ == "__main__":
    main()
