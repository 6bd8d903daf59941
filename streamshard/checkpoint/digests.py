"""Digests of tensors and files: XXH3 of 128 bits, which keeps up with reading and writing.

A tensor's digest is that of its bytes as stored. The digest of a safetensors file is that of its
header (everything before the data) followed by the digests (16 bytes each) of its tensors in the order
of their bytes: so tensors may be written in any order. Other files: the digest of their content.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Protocol

import xxhash

from streamshard.disk.files import BLOCK_NBYTES, open_source
from streamshard.tensors.lazy import Lazy, blocks
from streamshard.tensors.workspace import Workspace

__all__ = [
    "ALGORITHM",
    "DIGEST_NBYTES",
    "Hash",
    "file_digest",
    "file_record",
    "hash_file",
    "new_digest",
    "new_sha256",
    "shard_digest",
    "tensor_digest",
]


ALGORITHM = "xxh3-128"
DIGEST_NBYTES = 16


class Hash(Protocol):
    """What hashlib and xxhash have in common."""

    def update(self, data: bytes | bytearray | memoryview, /) -> None:
        """Add bytes."""

    def digest(self) -> bytes:
        """The digest of what was added so far."""

    def hexdigest(self) -> str:
        """The like as text."""


def new_digest() -> Hash:
    """The digest of nothing yet."""
    return xxhash.xxh3_128()


def new_sha256() -> Hash:
    """The like in SHA-256, which the hub shows and `sha256sum` prints."""
    import hashlib  # takes 4 MB of memory

    return hashlib.sha256()


def shard_digest(header: bytes, digests: bytes) -> str:
    """The digest of a safetensors file, from its first bytes and the digests of its tensors."""
    digest = new_digest()
    digest.update(header)
    digest.update(digests)
    return digest.hexdigest()


def tensor_digest(
    tensor: Lazy, work: Workspace, *, check: Callable[[], None] = lambda: None
) -> bytes:
    """The digest of a tensor; `check` may end it by raising."""
    digest = new_digest()
    for (block,) in blocks(work, tensor):
        check()
        digest.update(block.data)
    return digest.digest()


def hash_file(
    path: Path,
    *hashes: Hash,
    going: Callable[[], bool] = lambda: True,
    told: Callable[[int], None] = lambda _: None,
) -> int:
    """Add the content of a file to each of `hashes`; stops early when `going` says no.

    `told` is told the bytes of each block. Returns how many bytes that were.
    """
    done = 0
    buffer = memoryview(bytearray(BLOCK_NBYTES))
    with open_source(path) as file:
        while going() and (count := file.read_into(buffer, done)):
            for one in hashes:
                one.update(buffer[:count])
            done += count
            told(count)
    return done


def file_digest(path: Path) -> str:
    """The digest of the whole content of a file."""
    digest = new_digest()
    hash_file(path, digest)
    return digest.hexdigest()


def files_digest(paths: Sequence[Path]) -> str:
    """The digest of one file, or of the digests of several."""
    if len(paths) == 1:
        return file_digest(paths[0])
    digest = new_digest()
    for path in paths:
        digest.update(file_digest(path).encode())
    return digest.hexdigest()


def file_record(path: Path, *, sha256: bool) -> dict[str, int | str]:
    """What `streamshard.json` says of a file that is no safetensors file."""
    hashes = {"digest": new_digest()} | ({"sha256": new_sha256()} if sha256 else {})
    nbytes = hash_file(path, *hashes.values())
    return {"bytes": nbytes, **{name: one.hexdigest() for name, one in hashes.items()}}
