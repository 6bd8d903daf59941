"""Xet for the local hub: files in a folder that the real hf_xet reads and writes (`local://`).

The client tells the hub only the sha256 of what it uploaded that way. The folder's shards (Xet's own,
lists of files and where their chunks are) say which Xet hash has it.
"""

from __future__ import annotations

import hashlib
import json
import os
import struct
import subprocess
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from hub_store import Blob, Store

LINE = 48  # bytes of everything in a shard: its header, a file, a segment, a verification, a sha256
VERIFIED, WITH_SHA256 = 1 << 31, 1 << 30
END = b"\xff" * 32
LATER = 4_000_000_000


def named(hash_: bytes) -> str:
    """As Xet writes a hash: four little-endian numbers."""
    return "".join(f"{number:016x}" for number in struct.unpack("<4Q", hash_))


def listed(shard: Path) -> Iterator[tuple[str, str, int]]:
    """The files of a shard: sha256, Xet hash, size in bytes."""
    content, at = shard.read_bytes(), LINE
    while content[at : at + 32] not in {END, b""}:
        flags, count = struct.unpack_from("<II", content, at + 32)
        sizes = [
            struct.unpack_from("<I", content, at + LINE * n + 36)[0] for n in range(1, count + 1)
        ]
        last = at + LINE * (1 + count * (2 if flags & VERIFIED else 1))
        if flags & WITH_SHA256:
            sha256 = named(content[last : last + 32])
            yield sha256, named(content[at : at + 32]), sum(sizes)
            last += LINE
        at = last


def uploaded(store: Store) -> dict[str, tuple[str, int]]:
    """All files in the folder, by sha256."""
    shards = store.cas.glob("xet/xorbs/shards/*.mdb")
    return {sha256: (hash_, size) for shard in shards for sha256, hash_, size in listed(shard)}


def fetch(store: Store, wanted: Iterable[str]) -> None:
    """Objects that a client uploaded by xet become files here, if their digests are right."""
    found = uploaded(store)
    parts = {
        sha256: store.uploads / f"{sha256}.xet.{next(store.numbers)}"
        for sha256 in wanted
        if sha256 in found
    }
    if parts:
        _apart(store, {"fetch": [[*found[sha256], str(part)] for sha256, part in parts.items()]})
    for sha256, part in parts.items():
        with part.open("rb") as file:
            right = hashlib.file_digest(file, "sha256").hexdigest() == sha256
        if right:
            store.xet_hashes[sha256] = found[sha256][0]
            store.keep(part, sha256)


def offer(store: Store, blobs: Iterable[Blob]) -> None:
    """Files of the hub itself become readable by xet."""
    store.xet_hashes |= _apart(store, {"offer": [[str(b.path), b.sha256] for b in blobs]})


def _apart(store: Store, work: dict[str, Any]) -> dict[str, str]:
    """hf_xet in a process of its own: its memory, its logs and its settings are not the test's."""
    own = {name: value for name, value in os.environ.items() if not name.startswith("HF_")}
    own |= {"HF_HOME": str(store.root / "own"), "HF_XET_TELEMETRY_ENABLED": "0"}
    command = [sys.executable, __file__, f"local://{store.cas}"]
    done = subprocess.run(
        command, input=json.dumps(work), env=own, capture_output=True, text=True, check=False
    )
    if done.returncode:
        raise RuntimeError(done.stderr)
    return json.loads(done.stdout)


def main() -> None:
    from hf_xet import XetFileInfo, XetSession

    work, session = json.load(sys.stdin), XetSession()
    access = {"endpoint": sys.argv[1], "token": "any", "token_expiry_unix_secs": LATER}
    if files := work.get("fetch"):
        with session.new_file_download_group(**access) as group:
            for hash_, size, path in files:
                group.start_download_file(XetFileInfo(hash_, size), path)
    hashes = {}
    if files := work.get("offer"):
        with session.new_upload_commit(**access) as commit:
            handles = {
                sha256: commit.start_upload_file(path, sha256=sha256) for path, sha256 in files
            }
        hashes = {sha256: handle.result().xet_info.hash for sha256, handle in handles.items()}
    print(json.dumps(hashes))  # noqa: T201


if __name__ == "__main__":
    main()
