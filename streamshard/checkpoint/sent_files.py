"""Files of an output as a store elsewhere knows them: by size and digests, without their bytes."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import field
from pathlib import Path
from typing import Any

from streamshard.checkpoint.digests import hash_file, new_sha256
from streamshard.disk.files import open_source
from streamshard.errors import HubError
from streamshard.values import frozen

__all__ = ["SAMPLE_NBYTES", "MovedError", "Placed", "SentFile", "described"]

SAMPLE_NBYTES = 512
"""Of the first bytes the hub judges how a file is to be stored."""


class MovedError(HubError):
    """Where files were to be put others have put something since; `version` is what is there now."""

    version: str | None = None


@frozen
class Placed:
    """A version of what is there: its record, and the bytes of every file by its name."""

    version: str
    record: Mapping[str, Any]
    sizes: Mapping[str, int]


@frozen
class SentFile:
    """A file by its name in the output; `git` is the digest that git has of it, where that is known."""

    name: str
    nbytes: int
    sha256: str
    sample: bytes = field(repr=False)
    git: str | None = None

    def record(self) -> dict[str, Any]:
        """As JSON."""
        return {
            "name": self.name,
            "bytes": self.nbytes,
            "sha256": self.sha256,
            "sample": self.sample.hex(),
            "git": self.git,
        }

    @classmethod
    def from_record(cls, record: Mapping[str, Any]) -> SentFile:
        """What `record` gave; raises what odd content raises."""
        name, nbytes, sha256, git = (record[key] for key in ("name", "bytes", "sha256", "git"))
        texts = isinstance(name, str) and isinstance(sha256, str) and isinstance(git, str | None)
        if not texts or type(nbytes) is not int:
            raise TypeError("no record of a file that was sent")
        return cls(name, nbytes, sha256, bytes.fromhex(record["sample"]), git)

    @property
    def digests(self) -> set[str]:
        """How its content may be told, with the kind."""
        return {f"sha256:{self.sha256}"} | (set() if self.git is None else {f"git:{self.git}"})


def described(path: Path, name: str, sha256: str | None = None) -> SentFile:
    """A file of this machine; read once, unless its SHA-256 is known: then git's digest is not taken."""
    with open_source(path) as file:
        nbytes, sample = file.nbytes, file.read(0, min(SAMPLE_NBYTES, file.nbytes))
    if sha256 is not None:
        return SentFile(name, nbytes, sha256, sample)
    import hashlib  # takes 4 MB of memory

    whole, git = new_sha256(), hashlib.sha1(usedforsecurity=False)
    git.update(b"blob %d\0" % nbytes)
    hash_file(path, whole, git)
    return SentFile(name, nbytes, whole.hexdigest(), sample, git.hexdigest())
