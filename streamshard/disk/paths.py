"""Paths as people and programs give them: what no file can have for a name is told at once."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TypeAlias

from streamshard.errors import InputError, UsageError, WriteError, printable

__all__ = ["PathLike", "input_path", "output_path"]


PathLike: TypeAlias = "str | os.PathLike[str]"

_NOWHERE = (
    "the current folder no longer exists, and this path begins there. Go to another folder, or give "
    "the whole path."
)


def input_path(path: PathLike, what: str) -> Path:
    """The path of something to read, `what`, which need not be there."""
    given = _given(path, what)
    if _is_nowhere(given):
        raise InputError.at(given, _NOWHERE)
    return given


def output_path(path: PathLike, what: str) -> Path:
    """The path of something to write, `what`."""
    given = _given(path, what)
    if _is_nowhere(given):
        raise WriteError.at(given, _NOWHERE)
    return given


def _given(path: PathLike, what: str) -> Path:
    try:
        text = os.fspath(path)
        text = os.fsdecode(text) if isinstance(text, bytes) else text
    except TypeError as error:
        raise UsageError(f"the path of {what} is {path!r}, which is no path.") from error
    # As of a shell variable that is not set; a Path would be the folder ".".
    if not text:
        raise UsageError(f"the path of {what} is empty.")
    if "\0" in text:
        raise UsageError(f"the path of {what} has a zero byte: {printable(text)}.")
    try:
        os.fsencode(text)
    except UnicodeEncodeError as error:
        raise UsageError(
            f"the path of {what}, {printable(text)}, has characters that no file name can have here "
            f"({error.encoding})."
        ) from error
    return Path(text)


def _is_nowhere(path: Path) -> bool:
    """Whether a path is relative to a folder that is gone, or that cannot be told."""
    if path.is_absolute():
        return False
    try:
        os.getcwd()  # the call of which Path.cwd is made
    except OSError:
        return True
    return False
