"""Whether an output is complete where it goes, the folder or elsewhere, and of one certain plan."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from streamshard.checkpoint.file_names import REPORT_NAME
from streamshard.checkpoint.record import read_record
from streamshard.disk.folders import exists, inode_of, resolved
from streamshard.disk.system import system
from streamshard.engine.beside_output import places_beside
from streamshard.engine.job import Plan
from streamshard.engine.kept import as_reported
from streamshard.engine.lock import look
from streamshard.errors import InputError, ReadError, WriteError

__all__ = ["completed", "lacks_its_name", "record_in"]


def completed(made: Plan, digest: str) -> dict[str, Any] | None:
    """The report of an output that is complete; `digest` is that of the plan's identity.

    One that is kept here and sent elsewhere must be in both places. Raises `HubError` if it cannot be
    told what is there.
    """
    outlet, record = made.outlet, None
    if outlet is None or outlet.keeps:
        record = record_in(resolved(made.output), digest)
        if record is None or outlet is None:
            return None if record is None else as_reported(record)
    placed = outlet.record(REPORT_NAME)
    if placed is None or not _is_of(placed.record, digest, placed.sizes):
        return None
    names = sorted([*placed.record["digests"]["files"], REPORT_NAME])
    pushed = outlet.described(placed.version, names, None)
    return {**as_reported(record or placed.record), "pushed": pushed}


def lacks_its_name(target: Path, digest: str) -> bool:
    """Whether an output was completed by one who was killed before it got its name; changes nothing."""
    beside = places_beside(target)
    moved, found = look(beside["lock"], target), inode_of(beside["partial"])
    noted = moved is not None and found is not None and moved[1] == found[1]
    return noted and record_in(beside["partial"], digest) is not None


def record_in(folder: Path, digest: str) -> dict[str, Any] | None:
    """The record in a folder, if that is of this plan and has all of its files."""
    try:
        if not exists(folder):
            return None
        record = read_record(folder / REPORT_NAME)
        files = record["digests"]["files"]
        sizes = {name: system.lstat(folder / name).st_size for name in files}
    except (InputError, ReadError, WriteError, OSError, KeyError, TypeError):
        return None
    return record if _is_of(record, digest, sizes) else None


def _is_of(record: Mapping[str, Any], digest: str, sizes: Mapping[str, int]) -> bool:
    """Whether a record is of this plan, and all files that it lists are there."""
    try:
        files = record["digests"]["files"].items()
        same = record["fingerprint"] == digest
        return same and all(sizes.get(name) == one["bytes"] for name, one in files)
    except (AttributeError, KeyError, TypeError):
        return False
