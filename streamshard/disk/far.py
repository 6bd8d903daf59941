"""Files that are elsewhere: what stands for them here are empty files, whose paths are told here.

A `Far` can be pickled, so that another process reads the same file.

Whoever opens such a path by `files.open_source` gets what it stands for, wherever that lies, so that
nobody else has to know. What keeps files elsewhere (the hub) is an implementation of `Far`.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Mapping
from contextvars import ContextVar
from pathlib import Path
from typing import Any, Protocol

from streamshard.disk.inputs import Inputs
from streamshard.disk.sources import Source
from streamshard.disk.system import AnyPath

__all__ = [
    "Far",
    "Origin",
    "far_at",
    "forget",
    "is_any",
    "known_as",
    "origins",
    "place",
    "sources_of",
]


class Far(Protocol):
    """A file that is elsewhere, of which a copy may be here."""

    name: str
    """What it is and always will be: repository, version and file."""
    digest: str
    """Of its content, as whoever keeps it tells it; with the kind: `sha256:…`."""
    nbytes: int
    store: Path
    """Where a copy is put: there must be room."""

    def open(self, inputs: Inputs | None, *, spare: bool) -> Source:
        """It, open to be read."""

    def local(self) -> Path | None:
        """A file on this machine that has its bytes, if there is one."""

    @property
    def kept(self) -> bool:
        """Whether a copy is to be made before much of it is read."""

    def unreachable(self, *, ask: bool) -> str:
        """Why it cannot be read in this process, to which it was sent, in words; empty if it can.

        Unless whoever keeps it is to be asked, too (`ask`), only what can be told without that counts.
        """

    def fetch(self, told: Callable[[int], None]) -> None:
        """Make a copy, unless there is one; `told` is told the bytes of each piece."""

    def wrong(self, told: Callable[[int], None]) -> str | None:
        """What is wrong with a copy that was here, by its digest; None if nothing, or without one."""


class Origin(Protocol):
    """Where files are from."""

    def described(self) -> dict[str, Any]:
        """What the report says of it."""


_lock = threading.Lock()
_far: dict[str, Far] = {}
_names: dict[str, str] = {}

sources_of: ContextVar[Mapping[str, Origin] | None] = ContextVar("sources", default=None)
"""Where the inputs of the running command are from, those that are not of this machine."""


def place(files: Mapping[Path, Far], names: Mapping[Path, str]) -> None:
    """Have paths stand for files; `names` are how paths that begin so are told to people."""
    with _lock:
        _far.update((str(path), file) for path, file in files.items())
        _names.update((str(path), name) for path, name in names.items())


def forget(paths: Iterable[Path], names: Iterable[Path]) -> None:
    """Undo `place`."""
    with _lock:
        for path in paths:
            _far.pop(str(path), None)
        for path in names:
            _names.pop(str(path), None)


def far_at(path: AnyPath) -> Far | None:
    """What a path stands for; None if it is a path and nothing else."""
    return _far.get(str(path)) if _far else None


def is_any() -> bool:
    """Whether any path stands for something else: where none does, nobody need look for them."""
    return bool(_far)


def known_as(text: str) -> str:
    """A text in which no path of a file that stands for another one is left, but what it stands for."""
    if not _names:
        return text
    with _lock:
        known = sorted(_names.items(), key=lambda item: -len(item[0]))
    for path, name in known:
        if path in text:
            text = text.replace(path, name)
    return text


def origins() -> dict[str, Any] | None:
    """What the report says of where inputs are from, by what they are to the command."""
    known = sources_of.get()
    return {role: origin.described() for role, origin in known.items()} if known else None
