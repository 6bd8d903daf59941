"""A checkpoint or adapter for `verify`: opened as far as it can be, with what is wrong with the rest."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from streamshard.checkpoint.adapter_folder import is_adapter, open_adapter
from streamshard.checkpoint.file_names import (
    ADAPTER_CONFIG_NAME,
    ADAPTER_NAMES,
    INDEX_NAME,
    MODEL_CONFIG_NAME,
    SUFFIX,
)
from streamshard.checkpoint.folder import open_checkpoint
from streamshard.checkpoint.header import total_nbytes
from streamshard.checkpoint.json_files import MAX_JSON_BYTES, parse_index, read_json_object
from streamshard.checkpoint.recorded_files import Listing, read_listing
from streamshard.checkpoint.weight_files import is_weight_file, open_weights, read_weights
from streamshard.disk.existence import is_file, is_folder
from streamshard.disk.files import read_bytes
from streamshard.disk.system import is_unread, reading, system
from streamshard.errors import AdapterError, InputError, ReadError, printable
from streamshard.tensors.lazy import Lazy

__all__ = ["Opened", "is_shard", "open_anything"]


_ADAPTER_FILES = [names.single for names in ADAPTER_NAMES]
_Errors = (InputError, ReadError, AdapterError)


@dataclass
class Opened:
    """What is there, and what is recorded of it.

    `config` is what the folder has. `headers` maps the name of each weight file to its tensors, in
    the order of their bytes; `unread` maps names of files that could not be opened to why. Of the
    `problems` those in `unreadable` are of the system, which did not read a file; `incomplete` says
    that one of these has weights, so that it is not known which there are.
    """

    folder: Path
    listing: Listing
    bare: bool = False
    adapter: bool = False
    config: Mapping[str, Any] | None = None
    headers: dict[str, Mapping[str, Lazy]] = field(default_factory=dict)
    unread: dict[str, str] = field(default_factory=dict)
    problems: list[str] = field(default_factory=list)
    unreadable: set[str] = field(default_factory=set)
    incomplete: bool = False

    @property
    def tensors(self) -> dict[str, Lazy]:
        """All tensors by name."""
        found: dict[str, Lazy] = {}
        for tensors in self.headers.values():
            found |= tensors
        return found

    def add(self, problem: str | Exception) -> None:
        """Take note of a problem; two ways to the same one are one."""
        if isinstance(problem, Exception) and is_unread(problem):
            self.unreadable.add(str(problem))
        if str(problem) not in self.problems:
            self.problems.append(str(problem))

    def header(self, name: str) -> None:
        """Read the header of one weight file."""
        if name in self.headers or name in self.unread:
            return
        try:
            self.headers[name] = read_weights(self.folder / name).tensors
        except (InputError, ReadError) as error:
            self.unread[name] = "its header cannot be read"
            self.incomplete |= is_unread(error)
            self.add(error)


def is_shard(name: str) -> bool:
    """Whether a recorded file has the digest of a weight file: in sub-folders all have that of bytes."""
    return name.endswith(SUFFIX) and "/" not in name


def open_anything(path: Path) -> Opened:
    """Open a folder or a weight file; raises `InputError` only if there is no checkpoint at all."""
    if is_folder(path):
        return _open_folder(path)
    found = Opened(path.parent, Listing("missing"), bare=True)
    if is_file(path) and is_weight_file(path.name):
        found.header(path.name)
    else:
        open_checkpoint(path)  # which says what is wrong with it
    return found


def _open_folder(path: Path) -> Opened:
    with reading(path):
        names = sorted(system.listdir(path))
    found = Opened(path, read_listing(path))
    found.problems += found.listing.problems
    if found.listing.record == "unread":
        found.unreadable |= set(found.problems)
    for name in (MODEL_CONFIG_NAME, ADAPTER_CONFIG_NAME):
        if name in names:
            try:
                content = read_json_object(path / name)
                if name == MODEL_CONFIG_NAME:
                    found.config = content
            except (InputError, ReadError) as error:
                found.add(error)
    found.adapter = is_adapter(path, names)
    if found.adapter:
        _open_adapter(found, names)
    else:
        _open_checkpoint(found, names)
    for name in found.listing.files:
        if is_shard(name) and name in names:
            found.header(name)
    return found


def _check_total(found: Opened, names: list[str]) -> None:
    """Compare the bytes that the index states with those of the tensors."""
    if INDEX_NAME not in names:
        return
    index = parse_index(read_bytes(found.folder / INDEX_NAME, MAX_JSON_BYTES), found.folder)
    metadata = index.get("metadata")
    stated = metadata.get("total_size") if isinstance(metadata, dict) else None
    total = sum(total_nbytes(tensors) for tensors in found.headers.values())
    if stated and stated != total:  # some writers leave it 0
        found.add(
            f"{INDEX_NAME}: total_size is {printable(str(stated))}, but the tensors have {total} bytes: "
            "the index is of another checkpoint, or tensors were added or lost."
        )


def _open_adapter(found: Opened, names: list[str]) -> None:
    try:
        opened = open_adapter(found.folder)
    except _Errors as error:
        there = [name for name in names if name in _ADAPTER_FILES]
        if not there and found.listing.record == "missing":
            raise
        found.add(error)
        for name in there:
            found.header(name)
    else:
        found.headers |= opened.files
        found.headers |= {
            beside.file.relative_to(found.folder).as_posix(): beside.tensors
            for beside in opened.beside
        }


def _open_checkpoint(found: Opened, names: list[str]) -> None:
    try:
        found.headers |= {
            name: header.tensors for name, header in open_weights(found.folder).items()
        }
    except (InputError, ReadError) as error:
        there = [name for name in names if name.endswith(SUFFIX)]
        if not there and found.listing.record == "missing":
            raise
        found.add(error)
        # Whatever is healthy is looked at all the same.
        for name in there:
            found.header(name)
    else:
        _check_total(found, names)
        if (
            len(found.headers) > 1
            and INDEX_NAME not in names
            and is_shard(next(iter(found.headers)))
        ):
            found.add(
                f"{printable(str(found.folder))}: has {len(found.headers)} weight files but no "
                f"{INDEX_NAME}, by which loaders find them: fetch or save it again."
            )
    if not found.headers and not found.unread and not found.problems:
        found.add(f"{printable(str(found.folder))}: holds no tensors.")
