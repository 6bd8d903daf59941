"""A file of a model on the hub: where it is read, how it is fetched, and if it is what the hub says."""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

from streamshard.checkpoint.digests import new_sha256
from streamshard.checkpoint.file_names import SUFFIX
from streamshard.checkpoint.hub_client import Client, Listed, Repository
from streamshard.checkpoint.hub_errors import not_cached
from streamshard.checkpoint.hub_head import read_head
from streamshard.checkpoint.hub_ids import HubId
from streamshard.checkpoint.hub_ranges import HubFile, check_parts
from streamshard.disk.files import BLOCK_NBYTES, InputFile
from streamshard.disk.inputs import Inputs
from streamshard.disk.remote import Remote
from streamshard.disk.sources import Source
from streamshard.errors import HubError, StreamshardError, printable

__all__ = ["ViewFile", "content_digest"]


class ViewFile:
    """A file of a repository: a `disk.far.Far`.

    It can be sent to another process: there it is the same file, in that one's cache, or read by ranges
    with that one's token. Its `path` is nothing but a name there (`stands` is False).
    """

    def __init__(
        self,
        repository: Repository,
        listed: Listed,
        path: Path,
        *,
        whole: bool,
        stream: bool,
        stands: bool = True,
    ) -> None:
        self.listed, self.path = listed, path
        self.digest, self.nbytes = listed.digest, listed.nbytes
        self.name = f"{repository.asked.repo}@{repository.commit}/{listed.name}"
        self.store = repository.client.cache
        self.checked: str | None = None
        """How its content was compared with the hub's digest, if it was."""
        self._repository = repository
        self._whole, self._stream, self._stands = whole, stream, stands
        self._lock = threading.Lock()
        self._local: Path | None = None
        self._remote: Remote | None = None
        self._opener: HubFile | None = None

    def __reduce__(self) -> tuple[Any, ...]:
        found = self._repository
        given, offline = found.client.given, found.client.offline
        about = (found.asked, found.commit, self.listed, self.path)
        return _again, (given, offline, *about, self._whole, self._stream)

    def unreachable(self, *, ask: bool) -> str:
        """Why it cannot be read in this process, in words; empty if it can, as far as that is asked."""
        client = self._repository.client
        try:
            if self.kept and not self._whole:
                return (
                    f"it does not see {printable(self.name)} in the hub's cache "
                    f"{printable(str(client.cache))}: give a cache on a disk that all machines share "
                    "(--cache-dir), or have every worker read from the hub (--stream)"
                )
            if ask:
                with self.open(None, spare=False) as file:
                    file.read(0, min(8, file.nbytes))
        except StreamshardError as error:
            return f"it cannot read {printable(self.name)}: {str(error).rstrip('.')}, where it is started"
        return ""

    @property
    def kept(self) -> bool:
        """Whether a copy is to be made before much of it is read."""
        return (self._whole or not self._stream) and self.local() is None

    def local(self) -> Path | None:
        """Where the cache has it, if it does."""
        if self._local is None:
            self._local = self._repository.cached(self.listed)
        return self._local

    def open(self, inputs: Inputs | None, *, spare: bool) -> Source:
        """It, open to be read: in the cache, or by ranges where only parts are needed."""
        if self._whole:
            self.fetch(lambda _: None)
        local = self.local()
        if local is None:
            return self._far()
        file = InputFile(local, inputs, spare=spare)
        if file.nbytes != self.nbytes:
            file.close()
            raise HubError(
                self._damaged(f"has {file.nbytes:,} bytes, but the hub's file has {self.nbytes:,}")
            )
        return file

    def fetch(self, told: Callable[[int], None]) -> None:
        """Have it in the cache; what comes is compared with the hub's digest."""
        with self._lock:
            if self.local() is not None:
                return
            came = 0

            def count(nbytes: int) -> None:
                nonlocal came
                nbytes = max(min(nbytes, self.nbytes - came), 0)
                came += nbytes
                told(nbytes)

            found = self._repository.download(self.listed, count)
            count(self.nbytes)
            self._check(found)
            self._check_head(found)
            self._local = found

    def wrong(self, told: Callable[[int], None]) -> str | None:
        """What is wrong with a copy that was in the cache before, by the digest of the hub."""
        local = self.local()
        kind, _, expected = self.digest.partition(":")
        if local is None or self.checked is not None or kind not in ("sha256", "git"):
            return None
        if content_digest(local, kind, told) != expected:
            return self._damaged(f"is not what the hub says that it is ({self.digest})")
        self.checked = "it was in the cache before, and is equal to the digest of the hub"
        return None

    def _damaged(self, why: str) -> str:
        return (
            f"{self._repository.asked}/{printable(self.listed.name)}: its copy in the cache {why}: the "
            f"cache is damaged. Remove {self._repository.place(self.listed)}, and run the same command "
            "again: it downloads that file."
        )

    def _check(self, found: Path) -> None:
        kind, _, expected = self.digest.partition(":")
        digest = content_digest(found, kind)
        if digest == expected:
            self.checked = "downloaded, and equal to the digest of the hub"
            return
        self._repository.drop(self.listed)
        raise HubError(
            f"{self._repository.asked}: {printable(self.listed.name)} was downloaded, but is not what "
            f"the hub says that it is ({self.digest}). It was taken out of the cache: run the "
            "same command again."
        )

    def _check_head(self, found: Path) -> None:
        """What was planned by a header that came before is only right if it is that of the file."""
        head = b"" if self._remote is None else self._remote.head
        with InputFile(found) as file:
            if file.read(0, len(head)) == head:
                return
        raise HubError(
            f"{self._repository.asked}: of {printable(self.listed.name)} its header came before, by "
            "itself, and had other bytes. Nothing was made of it: run the same command again."
        )

    def head(self) -> None:
        """Have the header here, if it is a file of safetensors that is read by ranges."""
        if not self._whole and self.local() is None:
            if self._stream:
                check_parts(f"{self._repository.asked}/{self.listed.name}", self.nbytes)
            self._far().close()

    def _far(self) -> Source:
        """It, read by ranges; its header is read once, however often it is opened."""
        asked, client = self._repository.asked, self._repository.client
        if client.offline:
            raise not_cached(str(asked), self.listed.name, client.cache)
        with self._lock:
            if self._remote is None:
                name = f"{asked}/{self.listed.name}"
                kind, _, digest = self.digest.partition(":")
                self._opener = opener = HubFile(
                    asked.repo,
                    self._repository.commit,
                    self.listed.name,
                    self.nbytes,
                    where=name,
                    sha256=digest if kind == "sha256" else None,
                )
                remote = Remote(name, self.nbytes, self.digest, opener)
                if self.path.name.endswith(SUFFIX):
                    here = self.path if self._stands else None
                    head = read_head(remote.open(self.path), here)
                    remote = Remote(remote.name, self.nbytes, self.digest, opener, head=head)
                self._remote = remote
        return self._remote.open(self.path)

    def described(self) -> dict[str, Any]:
        """What the report says of it."""
        checked, how = self.checked is not None, self.checked or "not read by who wrote this"
        if self._remote is not None and not checked:
            checked, how = self._remote.frontier.outcome()
        elif self.local() is not None and not checked:
            how = "it was in the cache before"
        sent = self._opener.requests if self._opener is not None else 0
        return {
            "bytes": self.nbytes,
            "digest": self.digest,
            "checked": checked,
            "how": how,
            "requests": sent,
        }


def _again(
    given: Path | None,
    offline: bool,
    asked: HubId,
    commit: str,
    listed: Listed,
    path: Path,
    whole: bool,
    stream: bool,
) -> ViewFile:
    """A file that was sent to this process."""
    client = Client.of(given, offline=offline)
    repository = replace(client.repository(HubId(asked.repo, commit)), asked=asked)
    return ViewFile(repository, listed, path, whole=whole, stream=stream, stands=False)


def content_digest(path: Path, kind: str, told: Callable[[int], None] = lambda _: None) -> str:
    """The digest of a file as the hub has it: `sha256` of its content, or that of a `git` blob."""
    import hashlib

    with InputFile(path) as file:
        found = new_sha256() if kind == "sha256" else hashlib.sha1(usedforsecurity=False)
        if kind != "sha256":
            found.update(b"blob %d\0" % file.nbytes)
        buffer, done = memoryview(bytearray(BLOCK_NBYTES)), 0
        while count := file.read_into(buffer, done):
            found.update(buffer[:count])
            done += count
            told(count)
    return str(found.hexdigest())
