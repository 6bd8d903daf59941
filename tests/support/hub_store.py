"""Repositories of the local hub: files on disk, in commits that never change."""

from __future__ import annotations

import hashlib
import itertools
import json
import shutil
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

from hub_messages import Refusal, Slice

LFS_NAMES = (".safetensors", ".bin", ".pt", ".pth", ".ckpt", ".onnx", ".gguf", ".h5", ".model")
ATTRIBUTES = "".join(f"*{end} filter=lfs diff=lfs merge=lfs -text\n" for end in LFS_NAMES).encode()


@dataclass(frozen=True)
class Blob:
    """The content of one file. Digests are made when they are first asked for."""

    path: Path
    size: int
    lfs: bool
    known_sha256: str | None = None

    @cached_property
    def sha256(self) -> str:
        if self.known_sha256:
            return self.known_sha256
        with self.path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()

    @cached_property
    def pointer(self) -> bytes:
        text = "version https://git-lfs.github.com/spec/v1\n"
        return f"{text}oid sha256:{self.sha256}\nsize {self.size}\n".encode()

    @cached_property
    def oid(self) -> str:
        """What git calls it; of an LFS file git has the pointer only."""
        content = self.pointer if self.lfs else self.path.read_bytes()
        return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()

    @property
    def etag(self) -> str:
        return self.sha256 if self.lfs else self.oid

    def content(self) -> Slice:
        return Slice(self.path, 0, self.size)

    def read_bytes(self) -> bytes:
        return self.path.read_bytes()


@dataclass(frozen=True)
class Commit:
    sha: str
    parent: str | None
    message: str
    files: Mapping[str, Blob]
    date: str


@dataclass
class Repo:
    id: str
    private: bool = False
    gated: bool = False
    granted: bool = False  # whether the token of `Hub.env` may read the gated files
    commits: dict[str, Commit] = field(default_factory=dict)
    refs: dict[str, str] = field(default_factory=dict)

    @property
    def head(self) -> Commit:
        return self.commits[self.refs["main"]]

    def at(self, revision: str) -> Commit:
        sha = self.refs.get(revision, revision)
        if sha not in self.commits:
            raise Refusal(404, f"Invalid rev id: {revision}", "RevisionNotFound")
        return self.commits[sha]

    def history(self, revision: str) -> list[Commit]:
        """From this commit back to the first."""
        out = [self.at(revision)]
        while out[-1].parent:
            out.append(self.commits[out[-1].parent])
        return out


class Store:
    """All repositories, uploaded objects, and the links that were signed."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.blobs = root / "blobs"
        self.uploads = root / "uploads"
        self.cas = root / "cas"  # of xet
        for folder in (self.blobs, self.uploads, self.cas):
            folder.mkdir(parents=True, exist_ok=True)
        self.lock = threading.RLock()
        self.repos: dict[str, Repo] = {}
        self.objects: dict[str, Blob] = {}  # LFS objects by sha256
        self.xet_hashes: dict[str, str] = {}  # by sha256
        self.parts: dict[tuple[str, str], dict[int, str]] = {}  # etags of uploads by parts
        self.numbers = itertools.count(1)

    def blob(self, content: bytes | Path, *, lfs: bool) -> Blob:
        """Bytes are kept in a file of the store, a path is served from where it is."""
        if isinstance(content, Path):
            return Blob(content, content.stat().st_size, lfs)
        digest = hashlib.sha256(content).hexdigest()
        path = self.blobs / digest
        if not path.exists():
            part = self.uploads / f"{digest}.{next(self.numbers)}"
            part.write_bytes(content)
            part.replace(path)
        return Blob(path, len(content), lfs, digest)

    def repo(self, repo_id: str) -> Repo:
        with self.lock:
            if repo_id not in self.repos:
                raise Refusal(404, "Repository not found", "RepoNotFound")
            return self.repos[repo_id]

    def create(self, repo_id: str, *, private: bool = False) -> Repo:
        """An empty repository, with the `.gitattributes` that the hub puts there."""
        with self.lock:
            repo = self.repos[repo_id] = Repo(repo_id, private)
            blob = self.blob(ATTRIBUTES, lfs=False)
            self.commit(repo, {".gitattributes": blob}, "initial commit")
            return repo

    def commit(
        self,
        repo: Repo,
        changes: Mapping[str, Blob | None],
        message: str,
        *,
        ref: str = "main",
        parent: str | None = None,
    ) -> Commit:
        """A new head of `ref`; None takes a file away. `parent` starts a new ref."""
        with self.lock:
            parent = repo.refs.get(ref, parent)
            files = dict(repo.commits[parent].files) if parent else {}
            files |= {name: blob for name, blob in changes.items() if blob is not None}
            for name in [name for name, blob in changes.items() if blob is None]:
                files.pop(name, None)
            # No digest of a base's files: that would read gigabytes for a name.
            content = sorted((name, str(blob)) for name, blob in changes.items())
            identity = [repo.id, parent, message, next(self.numbers), content]
            sha = hashlib.sha1(json.dumps(identity).encode()).hexdigest()
            date = time.strftime("%Y-%m-%dT%H:%M:%S.000Z", time.gmtime())
            repo.commits[sha] = Commit(sha, parent, message, files, date)
            repo.refs[ref] = sha
            return repo.commits[sha]

    def object(self, sha256: str, repo: Repo | None = None) -> Blob | None:
        """The LFS object of this digest, if it was uploaded or is in the repository."""
        with self.lock:
            if sha256 in self.objects:
                return self.objects[sha256]
            commits = repo.commits.values() if repo else ()
            blobs = (b for c in reversed(list(commits)) for b in c.files.values() if b.lfs)
            return next((blob for blob in blobs if blob.sha256 == sha256), None)

    def keep(self, part: Path, sha256: str) -> Blob:
        """A finished upload becomes an object."""
        with self.lock:
            part.replace(self.blobs / sha256)
            path = self.blobs / sha256
            self.objects[sha256] = Blob(path, path.stat().st_size, lfs=True, known_sha256=sha256)
            return self.objects[sha256]

    def close(self) -> None:
        for folder in (self.blobs, self.uploads, self.cas, self.root / "own"):
            shutil.rmtree(folder, ignore_errors=True)


class Links:
    """Signed addresses on the content port, which end by time or all at once."""

    def __init__(self, seconds: float = 3600) -> None:
        self.seconds = seconds
        self._number = itertools.count(1)
        self._last = self._first = 0
        self._lock = threading.Lock()
        self._key = hashlib.sha256(str(time.time_ns()).encode()).hexdigest()

    def query(self, path: str) -> str:
        with self._lock:
            self._last = number = next(self._number)
        expires = time.time() + self.seconds
        return f"Expires={expires:.3f}&Link={number}&Signature={self._sign(path, expires, number)}"

    def check(self, path: str, query: Mapping[str, str]) -> None:
        try:
            expires, number = float(query["Expires"]), int(query["Link"])
        except (KeyError, ValueError):
            raise Refusal(403, "MissingKey") from None
        if query.get("Signature") != self._sign(path, expires, number):
            raise Refusal(403, "SignatureDoesNotMatch")
        if time.time() > expires or number <= self._first:
            raise Refusal(403, "Request has expired")

    def expire(self) -> None:
        """No link given so far works any more."""
        self._first = self._last

    def _sign(self, path: str, expires: float, number: int) -> str:
        return hashlib.sha256(f"{self._key}{path}{expires:.3f}{number}".encode()).hexdigest()


def files_of(folder: Path, wanted: Callable[[str], bool] = lambda name: True) -> dict[str, Path]:
    names = {p.relative_to(folder).as_posix(): p for p in sorted(folder.rglob("*")) if p.is_file()}
    return {name: path for name, path in names.items() if wanted(name)}


def is_lfs_name(name: str) -> bool:
    return name.endswith(LFS_NAMES)
