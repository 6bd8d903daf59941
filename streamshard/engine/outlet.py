"""Where finished files go, other than to the folder of the output: a store elsewhere.

The hub is one (`checkpoint/hub_push.py`); this is all that the engine knows of it.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from pathlib import Path
from typing import Any, Protocol

from streamshard.checkpoint.sent_files import Placed, SentFile

__all__ = ["AT_ONCE", "Outlet", "Target"]

AT_ONCE = 3
"""Weight files on disk at most, of an output that is kept elsewhere only: one that is being written, one
that waits, one that is being sent."""


class Target(Protocol):
    """What is there before anything is sent."""

    @property
    def version(self) -> str | None:
        """What is built on; None if nothing is there yet."""

    @property
    def replaced(self) -> Sequence[str]:
        """Files that get another content."""

    @property
    def deleted(self) -> Sequence[str]:
        """Files that go: weights that would be taken for a part of the output."""

    @property
    def warnings(self) -> Sequence[str]:
        """What the report says of it."""


class Outlet(Protocol):
    """A store elsewhere, a value: nothing is asked before a method is called.

    All methods raise `HubError` where the store or the network fails (`MovedError` if others have put
    something there meanwhile), and `OutputError` for what must not be replaced. Nothing that is there
    changes before `commit`, which changes it at once.
    """

    @property
    def where(self) -> str:
        """What it is, as people are told."""

    @property
    def key(self) -> str:
        """What it is, for the journal: what was sent to one store is not in another one."""

    @property
    def keeps(self) -> bool:
        """Whether the output stays on this machine, too."""

    def unreachable(self, key: str) -> str:
        """Why this process cannot send to the store with this key, in words; empty if it can."""

    def record(self, name: str) -> Placed | None:
        """What is there by now, with the record of this name in it; None if there is no whole one."""

    def look(self, names: Collection[str], *, overwrite: bool) -> Target:
        """What is there; `OutputError` if files of these names must not be put there."""

    def begin(self, names: Collection[str], *, overwrite: bool, seen: str | None) -> Target:
        """The like, made if there is none; `seen` is the version that an earlier run has built on."""

    def send(self, path: Path, file: SentFile, going: Callable[[], bool]) -> bool:
        """Send a file; False if it is to be there when all is committed."""

    def find(self, files: Sequence[SentFile], since: str | None) -> str | None:
        """The version made after `since` that has these files; None if there is none."""

    def commit(
        self,
        folder: Path,
        files: Sequence[SentFile],
        target: Target,
        sent: Collection[str],
    ) -> str:
        """Put all of them there at once, and compare; those `sent` need not be in the folder.

        Returns the version.
        """

    def described(
        self, version: str | None, files: Sequence[str], target: Target | None
    ) -> dict[str, Any]:
        """What the report says of it."""
