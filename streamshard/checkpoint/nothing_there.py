"""What to say of a path at which nothing is: how far it leads, and which names there are like it."""

from __future__ import annotations

import contextlib
import re
from pathlib import Path

from streamshard.disk.existence import is_folder, is_link, is_there, names_in
from streamshard.errors import listed, printable

__all__ = ["instead"]


_HUB_ID = re.compile(r"(?:hf://)?[\w.-]+/[\w.-]+(@\S+)?")
_IN_HUB = re.compile(r"[\w.-]+/[\w.-]+(@[^/\s]+)?(/[^/\\]+)+", re.ASCII)
_MOST_NAMES = 10_000  # of a folder that is searched for like ones


def instead(path: Path) -> str:
    """The next step, if nothing is at `path`."""
    if _dangles(path):
        return "It is a link to nothing. Fetch what it led to, or remove the link."
    around, missing = _nearest(path)
    where = "this folder" if around == Path() else printable(str(around))
    if not is_folder(around):
        return f"{printable(str(around))} is a file, and no folder. Check the path."
    names = _names(around)
    lower = {name.lower(): name for name in names}
    import difflib

    near = difflib.get_close_matches(missing.lower(), lower, n=2, cutoff=0.6)
    if near:
        return f"In {where} there is {listed(lower[name] for name in near)}: is that meant?"
    if _HUB_ID.fullmatch(str(path)) and around == Path():
        return "Check the path; if a model on the hub is meant, give it as it is called there (org/name)."
    if around != path.parent:
        deep = around == Path() and _IN_HUB.fullmatch(str(path))
        hub = f"; in a model on the hub it would be hf://{printable(str(path))}" if deep else ""
        return f"In {where} there is no '{printable(missing)}'. Check the path{hub}."
    return "Check the path."


def _dangles(path: Path) -> bool:
    with contextlib.suppress(OSError):
        return is_link(path)
    return False


def _nearest(path: Path) -> tuple[Path, str]:
    """How far a path leads, and the name that is not there."""
    for around in path.parents:
        with contextlib.suppress(OSError):
            if is_there(around):
                return around, path.parts[len(around.parts)]
    return Path(), path.parts[0]


def _names(folder: Path) -> list[str]:
    with contextlib.suppress(OSError):
        return names_in(folder)[:_MOST_NAMES]
    return []
