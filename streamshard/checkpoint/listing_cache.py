"""Which files a commit has, kept in the hub's cache for those who ask without a network later.

The cache has files, and does not tell which are missing. The client (from 2.0 on) keeps the list that
it was given in `trees/<commit>.json`, of which this reads and writes the first version.
"""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Iterable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

__all__ = ["keep_listing", "kept_listing"]

VERSION = 1
MOST_NBYTES = 64 * 1024 * 1024


def kept_listing(folder: Path, commit: str) -> list[Any] | None:
    """The entries of a commit as the client has them (`path`, `size`, `blob_id`, `lfs`); None if unknown.

    `folder` is that of the repository in the cache.
    """
    path = _path(folder, commit)
    try:
        if path.stat().st_size > MOST_NBYTES:
            return None
        kept = json.loads(path.read_bytes())
        if kept["format_version"] != VERSION:
            return None
        return [_entry(name, one) for name, one in kept["files"].items()]
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return None


def keep_listing(folder: Path, commit: str, entries: Iterable[Any]) -> None:
    """Keep what the hub listed, unless that is kept; a cache that takes nothing is none of a problem."""
    path = _path(folder, commit)
    kept = {entry.path: _kept(entry) for entry in entries}
    text = json.dumps({"format_version": VERSION, "files": kept}, indent=1, sort_keys=True)
    part = path.with_suffix(f".{os.getpid()}.tmp")
    with contextlib.suppress(OSError, UnicodeEncodeError):
        if not path.exists():
            path.parent.mkdir(parents=True, exist_ok=True)
            try:
                part.write_text(text, encoding="utf-8")
                part.replace(path)
            finally:
                part.unlink(missing_ok=True)


def _path(folder: Path, commit: str) -> Path:
    return folder / "trees" / f"{commit}.json"


def _entry(name: str, kept: dict[str, Any]) -> Any:
    large = kept.get("lfs_sha256")
    lfs = None if large is None else SimpleNamespace(size=kept.get("lfs_size"), sha256=large)
    return SimpleNamespace(path=name, size=kept["size"], blob_id=kept["blob_id"], lfs=lfs)


def _kept(entry: Any) -> dict[str, Any]:
    kept = {"size": entry.size, "blob_id": entry.blob_id}
    if entry.lfs is not None:
        kept |= {"lfs_sha256": entry.lfs.sha256, "lfs_size": entry.lfs.size}
    if getattr(entry, "xet_hash", None) is not None:
        kept["xet_hash"] = entry.xet_hash
    return kept
