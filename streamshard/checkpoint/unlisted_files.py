"""What lies in a folder: every file of it, and which of those that nobody listed could do harm.

Loaders choose files by their names. Code, weights, and whatever else changes what is loaded do harm
if they are put beside a checkpoint; a README or a picture does none.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

from streamshard.checkpoint.file_names import CODE, CONFIGS, WEIGHTS
from streamshard.disk.existence import is_there
from streamshard.disk.system import system
from streamshard.values import frozen

__all__ = ["Entry", "contents", "harm"]


_KINDS = (
    (CODE, "code that could be run"),
    (WEIGHTS, "weights that could be loaded"),
    (CONFIGS, "a file that loaders read"),
)


@frozen
class Entry:
    """Something in a folder, by its name relative to that.

    `kind` is "file" (also through a link), "folder" (an empty one, or one that cannot be read, as
    `problem` says), "link to a folder", "link to nothing" or "no regular file".
    """

    name: str
    kind: str
    problem: str | None = None


def contents(folder: Path) -> Iterator[Entry]:
    """Everything in a folder and those within it, hidden or not; links to folders are not followed."""
    todo = [""]
    while todo:  # no recursion: folders may be thousands of levels deep
        name = todo.pop()
        try:
            inner = sorted(system.scandir(folder / name), key=lambda entry: entry.name)
        except OSError as error:
            yield Entry(f"{name}/", "folder", f"cannot be listed: {error.strerror}")
            continue
        if not inner and name:
            yield Entry(f"{name}/", "folder")
        for entry in inner:
            path = f"{name}/{entry.name}" if name else entry.name
            if entry.is_dir(follow_symlinks=False):
                todo.append(path)
            else:
                yield Entry(path, _kind(entry))


def _kind(entry: os.DirEntry[str]) -> str:
    try:
        if entry.is_file():
            return "file"
        if entry.is_dir():
            return "link to a folder"
    except OSError:  # a link that leads back to itself
        return "link to nothing"
    if entry.is_symlink() and not is_there(entry.path):
        return "link to nothing"
    return "no regular file"


def harm(entry: Entry) -> str | None:
    """What is wrong with an entry that nobody listed; None if it does no harm."""
    if entry.problem is not None:
        return f"{entry.problem}, so what is in it is not known"
    if entry.kind == "link to a folder":
        return "is a link to a folder that is not part of this; it was not followed"
    if entry.kind == "folder":
        return None
    name = entry.name.rpartition("/")[2].casefold()
    for pattern, what in _KINDS:
        if pattern.fullmatch(name):
            return f"is not part of this, and is {what}. Remove it"
    return None
