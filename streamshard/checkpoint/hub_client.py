"""What is asked of the hub's client: which commit, which files, and copies of these in its cache."""

from __future__ import annotations

import contextlib
import os
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from streamshard.checkpoint.hub_errors import asking, constants, not_cached
from streamshard.checkpoint.hub_ids import HubId
from streamshard.checkpoint.listing_cache import keep_listing, kept_listing
from streamshard.checkpoint.loaded_names import is_read
from streamshard.disk.existence import found, is_folder, walked
from streamshard.disk.system import reading, system
from streamshard.errors import InputError, printable
from streamshard.values import frozen

__all__ = ["Client", "Listed", "Published", "Repository"]

MAX_FILES = 20_000  # of one repository; those of models have some hundred
MAX_PAGES = 2_000  # of its list; the hub has a thousand files on each
_COMMIT = re.compile(r"[0-9a-f]{40}")
_SHA256 = re.compile(r"[0-9a-f]{64}")


@frozen
class Listed:
    """A file as the hub lists it."""

    name: str
    nbytes: int
    digest: str
    """`sha256:…` of its content, or `git:…` as git has it."""

    @property
    def blob(self) -> str:
        """What the hub's cache calls its content."""
        return self.digest.partition(":")[2]


@frozen
class Published:
    """What the hub says of a model at one commit."""

    asked: HubId
    commit: str
    files: Sequence[Listed]


@frozen
class Client:
    """The client with its cache; `offline` asks nothing."""

    cache: Path
    offline: bool
    given: Path | None = None
    """The cache, if it is not that of the environment."""

    @classmethod
    def of(cls, cache_dir: Path | None, *, offline: bool) -> Client:
        """The client as its environment and the options have it."""
        made = constants()
        cache = Path(os.path.abspath(cache_dir or made.HF_HUB_CACHE))  # noqa: PTH100
        given = None if cache_dir is None else cache
        return cls(cache, offline or bool(made.HF_HUB_OFFLINE), given)

    def repository(self, asked: HubId) -> Repository:
        """A repository at one commit, which stays the same whatever happens to its branches."""
        folder = self.cache / f"models--{asked.repo.replace('/', '--')}"
        revision = asked.revision
        if revision is not None and _COMMIT.fullmatch(revision):
            return Repository(self, asked, folder, revision)
        name = revision or "main"
        ref = folder / "refs" / name
        if self.offline:
            return Repository(self, asked, folder, self._noted(asked, ref))
        from huggingface_hub import HfApi

        with asking(str(asked), "its commit"):
            commit = str(HfApi().repo_info(asked.repo, revision=revision).sha)
        if not _COMMIT.fullmatch(commit):
            raise InputError(
                f"{asked}: the hub calls its commit '{printable(commit)}', which is none."
            )
        # As every tool of the hub does, for those who ask without a network later.
        if not any(part in ("", ".", "..") for part in name.split("/")):
            with contextlib.suppress(OSError):
                ref.parent.mkdir(parents=True, exist_ok=True)
                ref.write_text(commit, encoding="utf-8")
        return Repository(self, asked, folder, commit)

    def published(self, asked: HubId) -> Published:
        """What the hub says of a model."""
        if self.offline:
            raise not_cached(str(asked), "what the hub says of it", self.cache)
        found = self.repository(asked)
        return Published(asked, found.commit, found.files())

    def _noted(self, asked: HubId, ref: Path) -> str:
        try:
            commit = system.read_text(ref).strip()
        except (OSError, ValueError):
            commit = ""
        if not _COMMIT.fullmatch(commit):
            raise not_cached(str(asked), f"revision '{asked.revision or 'main'}'", self.cache)
        return commit


@frozen
class Repository:
    """A model on the hub at one commit."""

    client: Client
    asked: HubId
    folder: Path
    """Where the cache has it, or would."""
    commit: str

    @property
    def snapshot(self) -> Path:
        """Where the cache has the files of this commit, by their names."""
        return self.folder / "snapshots" / self.commit

    def files(self) -> list[Listed]:
        """All files of the commit.

        If the hub must not be asked, those that are in the cache, and what loaders would miss.
        """
        if self.client.offline:
            return self._cached_files()
        from huggingface_hub import HfApi

        listed: list[Listed] = []
        entries = []
        count = 0  # with folders
        with asking(str(self.asked), "the list of its files", most=MAX_PAGES):
            # Not the object that `resolve_revision` gives: as text that is the branch.
            for entry in HfApi().list_repo_tree(
                self.asked.repo, recursive=True, revision=self.commit
            ):
                if hasattr(entry, "blob_id"):
                    listed.append(_listed(self.asked, entry))
                    entries.append(entry)
                count += 1
                if count > MAX_FILES:
                    raise InputError(
                        f"{self.asked}: has more than {MAX_FILES:,} files, the limit here. Download the "
                        "model's own files (hf download), and give the folder."
                    )
        keep_listing(self.folder, self.commit, entries)
        return listed

    def _cached_files(self) -> list[Listed]:
        with reading(self.snapshot):
            if not is_folder(self.snapshot):
                raise not_cached(str(self.asked), f"commit {self.commit}", self.client.cache)
            names = [
                (folder / name).relative_to(self.snapshot).as_posix()
                for folder, _, others in walked(self.snapshot)
                for name in others
            ]
        there = [one for name in sorted(names) if (one := self._cached_file(name)) is not None]
        known = {file.name for file in there}
        kept = kept_listing(self.folder, self.commit) or []
        listed = [_listed(self.asked, entry) for entry in kept if entry.path not in known]
        return [*there, *(file for file in listed if is_read(file.name) or _is_code(file.name))]

    def _cached_file(self, name: str) -> Listed | None:
        """A file of the cache; the name of what its link leads to is the hub's digest."""
        path = self.snapshot / name
        with reading(path):
            there = found(path)
            blob = Path(system.realpath(path)).name
        if there is None:
            return None
        kind = "sha256" if _SHA256.fullmatch(blob) else "git" if _COMMIT.fullmatch(blob) else ""
        return Listed(
            name, there.st_size, f"{kind}:{blob}" if kind else f"cache:{self.commit}/{name}"
        )

    def cached(self, file: Listed) -> Path | None:
        """Where the cache has a file, be it of another commit; None if it does not."""
        for path in (self.snapshot / file.name, self.folder / "blobs" / file.blob):
            with reading(path):
                if found(path) is not None:
                    return path
        return None

    def download(self, file: Listed, told: Callable[[int], None]) -> Path:
        """Where the cache has a file, once it has; `told` is told how many bytes came."""
        if self.client.offline:
            raise not_cached(str(self.asked), file.name, self.client.cache)
        from huggingface_hub import hf_hub_download

        with asking(str(self.asked), file.name):
            return Path(
                hf_hub_download(
                    self.asked.repo,
                    file.name,
                    revision=self.commit,
                    cache_dir=self.client.cache,
                    library_name="streamshard",
                    tqdm_class=_counting(told),
                )
            )

    def place(self, file: Listed) -> str:
        """Where the content of a file is in the cache, as people are told to remove it."""
        path = Path(system.realpath(self.cached(file) or self.folder / "blobs" / file.blob))
        cache = Path(system.realpath(self.client.cache))
        with contextlib.suppress(ValueError):
            path = path.relative_to(cache)
        return f"{printable(path.as_posix())} in the cache ({printable(str(self.client.cache))})"

    def drop(self, file: Listed) -> None:
        """Take out of the cache what was downloaded and is not what it should be."""
        for path in (self.snapshot / file.name, self.folder / "blobs" / file.blob):
            with contextlib.suppress(OSError):
                system.unlink(path)


def _is_code(name: str) -> bool:
    return name.endswith(".py")


def _listed(asked: HubId, entry: Any) -> Listed:
    """A file as the hub lists it; what it says becomes paths here, so it must be what it seems."""
    name, lfs = entry.path, entry.lfs
    nbytes = entry.size if lfs is None else lfs.size
    blob = entry.blob_id if lfs is None else lfs.sha256
    problem = _problem(name) if isinstance(name, str) else "is no text"
    if problem is None and not (
        isinstance(nbytes, int)
        and 0 <= nbytes < 2**62
        and isinstance(blob, str)
        and (_COMMIT if lfs is None else _SHA256).fullmatch(blob)
    ):
        problem = "is listed without a size and a digest"
    if problem is not None:
        raise InputError(
            f"{asked}: has a file '{printable(str(name))}', which {problem}. The repository is damaged "
            "or hostile; nothing of it is read."
        )
    return Listed(name, nbytes, f"{'git' if lfs is None else 'sha256'}:{blob}")


def _problem(name: str) -> str | None:
    """Why no file can have this name below a folder of ours; None if one can."""
    parts = name.split("/")
    if any(part in ("", ".", "..") for part in parts):
        return "leads out of its folder, or has an empty part"
    if "\\" in name or (os.name == "nt" and ":" in name):
        return "has a backslash or a drive in its name"
    if any(ord(letter) < 32 or letter == "\x7f" for letter in name):
        return "has control characters in its name"
    try:
        lengths = [len(part.encode()) for part in parts]
    except UnicodeEncodeError:
        return "has characters in its name that no text has"
    if max(lengths) > 255 or sum(lengths) + len(parts) > 1024:
        return "has a name that is too long"
    return None


def _counting(told: Callable[[int], None]) -> type:
    """What the client takes for the class of its progress bars; bytes that came are told."""

    class Counting:
        # Twice the same name: with `update_transfer` xet has one bar for bytes sent and bytes made.
        n = 0
        total: int | None = None

        def __init__(self, *_: Any, initial: int = 0, **__: Any) -> None:
            told(int(initial or 0))

        def __enter__(self) -> Any:
            return self

        def __exit__(self, *_: object) -> None:
            pass

        def update(self, count: float | None = 1) -> None:
            told(int(count or 0))

        def update_transfer(self, count: float | None = 1) -> None:
            pass

        def set_postfix_str(self, *_: Any, **__: Any) -> None:
            pass

        def set_transfer_postfix_str(self, *_: Any, **__: Any) -> None:
            pass

        def refresh(self, *_: Any, **__: Any) -> None:
            pass

        def close(self) -> None:
            pass

    return Counting
