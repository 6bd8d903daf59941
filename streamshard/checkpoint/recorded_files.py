"""What `streamshard.json` says that an output consists of: its files and tensors, with digests.

A record may come from anywhere and may have been edited: every entry is looked at before it is used.
Of a record that is not as it was written, which is a problem by itself, whatever can still be read
is used, so that damage of a record does not hide what else is damaged.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any

from streamshard.checkpoint.digests import ALGORITHM, DIGEST_NBYTES
from streamshard.checkpoint.file_names import REPORT_NAME
from streamshard.checkpoint.folder import outside
from streamshard.checkpoint.json_files import read_json_object
from streamshard.checkpoint.record import MAX_RECORD_BYTES, read_record
from streamshard.disk.existence import has_name
from streamshard.disk.system import is_unread
from streamshard.errors import InputError, ReadError, listed, printable
from streamshard.values import frozen

__all__ = ["FileRecord", "Listing", "link_problem", "name_problem", "read_listing"]


_DIGEST = re.compile(rf"[0-9a-f]{{{2 * DIGEST_NBYTES}}}")
_SHA256 = re.compile(r"[0-9a-f]{64}")


@frozen
class FileRecord:
    """What is recorded of a file."""

    nbytes: int
    digest: str
    sha256: str | None


@dataclass
class Listing:
    """The files and tensors of an output by its record.

    `record` is "whole", "changed", "unread" or "missing"; `usable` says whether there are digests. A
    tensor whose digest is broken has None.
    """

    record: str
    usable: bool = False
    files: dict[str, FileRecord] = field(default_factory=dict)
    tensors: dict[str, str | None] = field(default_factory=dict)
    problems: list[str] = field(default_factory=list)


def read_listing(folder: Path) -> Listing:
    """The listing of a folder; never fails, but has `problems`."""
    file = folder / REPORT_NAME
    if not has_name(file):
        return Listing("missing")
    try:
        found, record = Listing("whole"), read_record(file)
    except (InputError, ReadError) as error:
        if is_unread(error):
            return Listing("unread", problems=[str(error)])
        found = Listing("changed", problems=[str(error)])
        try:
            record = read_json_object(file, MAX_RECORD_BYTES)
        except (InputError, ReadError) as unread:
            if str(unread) not in found.problems:
                found.problems.append(str(unread))
            return found
    problem = link_problem(folder, REPORT_NAME)
    if problem is not None:
        found.problems.append(f"{printable(str(file))}: {problem}.")
    _fill(found, record.get("digests"), printable(str(file)))
    return found


def _fill(found: Listing, digests: Any, where: str) -> None:
    tables = [
        digests.get(key) if isinstance(digests, dict) else None for key in ("files", "tensors")
    ]
    files, tensors = tables
    if (
        not isinstance(files, dict)
        or not isinstance(tensors, dict)
        or digests.get("algorithm") != ALGORITHM
    ):
        found.problems.append(
            f"{where}: has no digests that are of {ALGORITHM}; nothing can be compared with it."
        )
        return
    found.usable = True
    broken = []
    for name, entry in files.items():
        record = _file_record(entry)
        if record is None or name_problem(name) is not None or name == REPORT_NAME:
            broken.append(name)
        else:
            found.files[name] = record
    if broken:
        found.problems.append(f"{where}: has a broken record of {listed(broken)}.")
    for name, digest in tensors.items():
        found.tensors[name] = digest if _is(_DIGEST, digest) else None
    broken = [name for name, digest in found.tensors.items() if digest is None]
    if broken:
        found.problems.append(f"{where}: has a broken digest of {listed(broken)}.")


def _file_record(entry: Any) -> FileRecord | None:
    if not isinstance(entry, Mapping):
        return None
    nbytes, digest, sha256 = (entry.get(key) for key in ("bytes", "digest", "sha256"))
    if (
        type(nbytes) is not int
        or not _is(_DIGEST, digest)
        or not (sha256 is None or _is(_SHA256, sha256))
    ):
        return None
    return FileRecord(nbytes, str(digest), sha256)


def _is(pattern: re.Pattern[str], value: Any) -> bool:
    return isinstance(value, str) and pattern.fullmatch(value) is not None


def link_problem(folder: Path, name: str) -> str | None:
    """What is wrong if a recorded file is in truth elsewhere, by links; None if it is in the folder."""
    target = outside(folder, folder / name)
    if target is None:
        return None
    return (
        f"is {printable(str(target))} by a link, which is outside of the folder and of the hub's cache: "
        "whoever copies the folder does not have it. Put the file itself there (cp -L)"
    )


def name_problem(name: str) -> str | None:
    """Why a record cannot have a file of this name, relative to the folder; None if it can.

    Both sides ask here: what writes refuses such a name, and what reads does not follow it.
    """
    try:
        name.encode()
    except UnicodeEncodeError:
        return "is not UTF-8, and JSON has no other names"
    path = PurePosixPath(name)
    # In any other way to write it, it would be another name than that which the folder lists.
    if path.is_absolute() or ".." in path.parts or str(path) != name or name in ("", "."):
        return "is no plain path within the folder"
    if "\0" in name or (os.name == "nt" and re.search(r'[\\:*?"<>|]', name)):
        return "has characters that no file name can have here"
    return None
