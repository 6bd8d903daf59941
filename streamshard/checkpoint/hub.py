"""A model on the hub as a folder of this machine: its files by name, read from where they are.

The folder is a `View`: one commit is resolved, its files are listed, and for each an empty file of the
same size is made in a folder of the command's own, which goes at the end. What such a path stands for is
told to `disk.far`, so that whoever opens it reads the hub's file: small ones and adapters are downloaded
into the hub's cache when they are first opened, of the weights headers and whatever else is looked at
are read by ranges, until all of a file is fetched, or to the end (`stream`). What the cache has already
is read there.
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from streamshard.checkpoint.file_names import (
    ADAPTER_CONFIG_NAME,
    CHECKPOINT_NAMES,
    MODEL_CONFIG_NAME,
    NOT_CARRIED,
    NOT_ENTERED,
    SUFFIX,
    TENSORS,
    TRAINING_STATE,
)
from streamshard.checkpoint.hub_client import Client, Listed
from streamshard.checkpoint.hub_errors import not_cached
from streamshard.checkpoint.hub_file import ViewFile
from streamshard.checkpoint.hub_ids import HubId
from streamshard.checkpoint.hub_ranges import MOST_NBYTES
from streamshard.disk.far import forget, place
from streamshard.disk.folders import make_folders
from streamshard.disk.system import PRIVATE, system, writing
from streamshard.disk.together import together
from streamshard.errors import InputError, StreamshardError, printable

__all__ = ["View"]

SMALL_NBYTES = 64 * 1024 * 1024  # tokenizers have up to 40 MB
AT_ONCE = 8
_NEW = os.O_WRONLY | os.O_CREAT | os.O_EXCL | PRIVATE
_INDEXES = tuple(names.index_name for names in CHECKPOINT_NAMES)
_FIRST = (MODEL_CONFIG_NAME, ADAPTER_CONFIG_NAME, *_INDEXES)
"""What is read of every model, whatever is to be done with it."""


class View:
    """A model on the hub as a folder below `around`, which is the caller's to remove.

    `heads_only` says that nothing is needed but what tells what it is; `stream` that weights are never
    to be stored. Raises `HubError` for what the hub does not give, `InputError` for what cannot be
    a model's files.
    """

    def __init__(
        self,
        asked: HubId,
        client: Client,
        around: Path,
        *,
        stream: bool = False,
        heads_only: bool = False,
    ) -> None:
        self.asked = asked
        self.repository = client.repository(asked)
        self.root = around.joinpath(*asked.repo.split("/"))
        self.files: dict[str, ViewFile] = {}
        listed = self.repository.files()
        names = {file.name for file in listed}
        self._make(listed)
        self._folder = _folder_of(asked, names)
        adapters = {
            name.rpartition("/")[0]
            for name in names
            if name.rpartition("/")[2] == ADAPTER_CONFIG_NAME
            and f"{name.removesuffix(ADAPTER_CONFIG_NAME)}{MODEL_CONFIG_NAME}" not in names
        }
        for file in listed:
            self.files[file.name] = ViewFile(
                self.repository,
                file,
                self.root / file.name,
                whole=_is_small(file)
                or (not heads_only and _is_of_adapter(file.name, adapters))
                or (not heads_only and not stream and file.nbytes > MOST_NBYTES),
                stream=stream,
            )
        self._names = {self.root: str(asked), self.repository.snapshot: str(asked)}
        blobs = self.repository.folder / "blobs"
        self._names |= {blobs / file.blob: f"{asked}/{file.name}" for file in listed}
        place({file.path: file for file in self.files.values()}, self._names)
        try:
            self._begin(heads_only=heads_only)
        except BaseException:
            self.close()
            raise

    @property
    def path(self) -> Path:
        """What the id stands for: the folder, or what is meant in it."""
        return self.root / self.asked.inside if self.asked.inside else self.root

    def close(self) -> None:
        """The paths stand for nothing any more."""
        forget([file.path for file in self.files.values()], self._names)

    def described(self) -> dict[str, Any]:
        """What the report says of where files are from: the weights, each with the hub's digest."""
        weights = {
            name: file.described()
            for name, file in self.files.items()
            if TENSORS.fullmatch(name) and name.rpartition("/")[0] == self._folder
        }
        return {
            "repository": self.asked.repo,
            "revision": self.asked.revision,
            "commit": self.repository.commit,
            "files": weights,
        }

    def _make(self, listed: Iterable[Listed]) -> None:
        """The empty files that stand for those of the hub."""
        with writing(self.root, 0):
            made = {self.root}
            make_folders(self.root)
            for file in listed:
                path = self.root / file.name
                try:
                    if path.parent not in made:
                        make_folders(path.parent)
                        made.add(path.parent)
                    descriptor = system.open(path, _NEW)
                except (FileExistsError, NotADirectoryError, StreamshardError) as error:
                    raise InputError(
                        f"{self.asked}: has a file '{printable(file.name)}', whose name another one has "
                        "too, as far as this system can tell. Download it (hf download), and give the "
                        "folder."
                    ) from error
                try:
                    system.truncate(descriptor, file.nbytes)
                except OSError as error:
                    if error.errno not in (errno.EFBIG, errno.EINVAL, errno.EOVERFLOW):
                        raise
                    raise InputError(
                        f"{self.asked}: has a file '{printable(file.name)}', which is listed with "
                        f"{file.nbytes:,} bytes; no file of that size can be here ({error.strerror}). "
                        "Look at it on the hub."
                    ) from error
                finally:
                    system.close(descriptor)

    def _begin(self, *, heads_only: bool) -> None:
        """Get what is needed in any case, several at once: small files, then headers."""
        inside = [name for name in self.files if self._is_inside(name)]
        first = [name for name in inside if name.rpartition("/")[2] in _FIRST]
        rest = [] if heads_only else [name for name in inside if _is_carried(name)]
        small = [self.files[name] for name in {**dict.fromkeys(first), **dict.fromkeys(rest)}]
        small = [file for file in small if _is_small(file.listed)]
        offline = self.repository.client.offline
        if not offline:
            together(small, _fetch, AT_ONCE)
        weights = self._weights()
        if offline:
            missing = [name for name in weights if name not in self.files]
            if missing:
                raise not_cached(str(self.asked), missing[0], self.repository.client.cache)
        together(
            [self.files[name] for name in weights if name in self.files], ViewFile.head, AT_ONCE
        )
        if offline:  # now that weights are told of first
            together(small, _fetch, AT_ONCE)

    def _is_inside(self, name: str) -> bool:
        """Whether a file is one of the folder that is meant, or below it and no other run's."""
        prefix = f"{self._folder}/" if self._folder else ""
        if not name.startswith(prefix):
            return False
        *folders, _ = name.removeprefix(prefix).split("/")
        return not any(NOT_ENTERED.fullmatch(folder) for folder in folders)

    def _weights(self) -> list[str]:
        """The weight files that belong together, by the index; without one those of safetensors."""
        prefix = f"{self._folder}/" if self._folder else ""
        if self.asked.inside in self.files:
            return [self.asked.inside] if self.asked.inside.endswith(SUFFIX) else []
        if (file := self.files.get(f"{prefix}{_INDEXES[0]}")) is not None:
            with contextlib.suppress(ValueError, AttributeError, TypeError, OSError):
                data = json.loads((file.local() or file.path).read_bytes())
                return sorted({f"{prefix}{name}" for name in data["weight_map"].values()})
            return []  # what is wrong with it is told where it is read
        return [
            name
            for name in self.files
            if name.endswith(SUFFIX) and name.rpartition("/")[0] == self._folder
        ][:64]


def _fetch(file: ViewFile) -> None:
    file.fetch(lambda _: None)


def _folder_of(asked: HubId, names: set[str]) -> str:
    """The folder in a repository that is meant; of a file the one that it is in."""
    return asked.inside.rpartition("/")[0] if asked.inside in names else asked.inside


def _is_small(file: Listed) -> bool:
    """Whether a file is had whole, rather than looked into."""
    base = file.name.rpartition("/")[2]
    weights = NOT_CARRIED.fullmatch(base) and not base.endswith((".json", ".py"))
    return not weights and file.nbytes <= SMALL_NBYTES


def _is_of_adapter(name: str, adapters: set[str]) -> bool:
    folder, _, base = name.rpartition("/")
    return (
        folder in adapters and bool(TENSORS.fullmatch(base)) and not TRAINING_STATE.fullmatch(base)
    )


def _is_carried(name: str) -> bool:
    return not NOT_CARRIED.fullmatch(name.rpartition("/")[2])
