"""What lies in a folder and beside an output, to be compared with what is there later."""

from __future__ import annotations

import stat
from collections.abc import Callable
from pathlib import Path
from typing import Any

from interrupted_runs import content
from pairs import Outcome, Pair

import streamshard
from streamshard.engine.beside_output import places_beside

State = dict[str, Any]
Cli = Callable[..., Outcome]


def state(folder: Path) -> State:
    """All there is in a folder: kind, mode, inode, owner, number of names, and content."""
    found: State = {}
    for path in [folder, *sorted(folder.rglob("*"))]:
        entry = path.lstat()
        data: Any = None
        if stat.S_ISREG(entry.st_mode):
            data = path.read_bytes()
        elif stat.S_ISLNK(entry.st_mode):
            data = path.readlink()
        kept = (entry.st_mode, entry.st_ino, entry.st_uid, entry.st_nlink, data)
        found[str(path.relative_to(folder))] = kept
    return found


def lock(pair: Pair) -> Path:
    return places_beside(pair.output)["lock"]


def old(pair: Pair) -> Path:
    return places_beside(pair.output)["old"]


def make_output(pair: Pair) -> dict[str, Any]:
    streamshard.merge_lora(base=pair.base, adapter=pair.adapter, output=pair.output, weight=[0.5])
    return content(pair.output)
