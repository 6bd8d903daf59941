"""Xet for the local hub: files in a folder that the real hf_xet reads and writes (`local://`).

The client tells the hub only the sha256 of what it uploaded that way. The folder's shards (Xet's own,
lists of files and where their chunks are) say which Xet hash has it.
"""

from __future__ import annotations

import hashlib
import struct
from collections.abc import Iterator
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


def find(store: Store, sha256: str) -> Blob | None:
    """An object that a client uploaded by xet, made a file here, with its digest checked."""
    if sha256 not in (found := uploaded(store)):
        return None
    from hf_xet import XetFileInfo, XetSession

    hash_, size = found[sha256]
    part = store.uploads / f"{sha256}.xet.{next(store.numbers)}"
    with XetSession().new_file_download_group(**_access(store)) as group:
        group.start_download_file(XetFileInfo(hash_, size), str(part))
    with part.open("rb") as file:
        if hashlib.file_digest(file, "sha256").hexdigest() != sha256:
            part.unlink()
            return None
    store.xet_hashes[sha256] = hash_
    return store.keep(part, sha256)


def offer(store: Store, blobs: list[Blob]) -> None:
    """Files of the hub itself become readable by xet."""
    from hf_xet import XetSession

    with XetSession().new_upload_commit(**_access(store)) as commit:
        handles = [commit.start_upload_file(str(blob.path), sha256=blob.sha256) for blob in blobs]
    for blob, handle in zip(blobs, handles, strict=True):
        store.xet_hashes[blob.sha256] = handle.result().xet_info.hash


def _access(store: Store) -> dict[str, Any]:
    token = {"token": "xet_of_the_local_hub", "token_expiry_unix_secs": LATER}
    return {"endpoint": f"local://{store.cas}", **token}
