"""Paths as people and programs give them: what no file can have for a name is told at once.

Every path of every command and function comes through here, so `~` and `~user` mean home folders
everywhere, as in a shell: also in `--output=~/x`, which a shell leaves as it is, and in Python. What is
really called so is `./~`.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import TypeAlias

from streamshard.disk.existence import has_name
from streamshard.errors import InputError, UsageError, WriteError, printable

__all__ = ["PathLike", "input_path", "output_path"]


PathLike: TypeAlias = str | os.PathLike[str]

_NOWHERE = (
    "the current folder no longer exists, and this path begins there. Go to another folder, or give "
    "the whole path."
)


def input_path(path: PathLike, what: str) -> Path:
    """The path of something to read, `what`, which need not be there."""
    text = _given(path, what)
    given = Path(_expanded(text, what, is_input=True))
    if _is_nowhere(given):
        raise InputError.at(given, _NOWHERE)
    return given


def output_path(path: PathLike, what: str) -> Path:
    """The path of something to write, `what`."""
    given = Path(_expanded(_given(path, what), what, is_input=False))
    if _is_nowhere(given):
        raise WriteError.at(given, _NOWHERE)
    return given


def _given(path: PathLike, what: str) -> str:
    try:
        text = os.fspath(path)
        text = os.fsdecode(text) if isinstance(text, bytes) else text
    except TypeError as error:
        raise UsageError(f"the path of {what} is {path!r}, which is no path.") from error
    # As of a shell variable that is not set; a Path would be the folder ".".
    if not text:
        raise UsageError(
            f"the path of {what} is empty, as where a variable of a shell is not set. Give a path."
        )
    if "\0" in text:
        raise UsageError(f"the path of {what} has a zero byte: {printable(text)}.")
    try:
        os.fsencode(text)
    except UnicodeEncodeError as error:
        raise UsageError(
            f"the path of {what}, {printable(text)}, has characters that no file name can have here "
            f"({error.encoding})."
        ) from error
    return text


def _expanded(text: str, what: str, *, is_input: bool) -> str:
    """A path with `~` or `~user` at its beginning replaced by that home folder.

    An input of that very name is meant where the home folder has none, or where there is no such user.
    """
    if not text.startswith("~"):
        return text
    expanded = os.path.expanduser(text)
    if is_input and (expanded == text or not has_name(expanded)) and has_name(text):
        return text
    if expanded == text:
        first = text.partition("/")[0]
        whose = "you have" if first == "~" else f"a user called {printable(first[1:])!r} has"
        raise UsageError(
            f"the path of {what}, {printable(text)}, begins with the home folder that {whose}, but the "
            f"system knows none. Give the whole path, or ./{printable(text)} if something is called so."
        )
    return expanded


def _is_nowhere(path: Path) -> bool:
    """Whether a path is relative to a folder that is gone, or that cannot be told."""
    if path.is_absolute():
        return False
    try:
        os.getcwd()  # the call of which Path.cwd is made
    except OSError:
        return True
    return False
