"""`verify --against`: a folder compared with what the hub says of a model, by its own digests.

Of the hub only the list of files is asked for: sizes, and the SHA-256 of large files or the digest that
git has of small ones.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

from streamshard.checkpoint.hub_client import Listed, Published
from streamshard.checkpoint.hub_file import content_digest
from streamshard.checkpoint.open_anything import Opened
from streamshard.checkpoint.unlisted_files import contents, harm
from streamshard.disk.existence import found, is_file
from streamshard.disk.far import far_at
from streamshard.disk.system import reading
from streamshard.engine.workers import Progress, Stop, share
from streamshard.errors import InputError, ReadError, printable

__all__ = ["AgainstHub"]


class AgainstHub:
    """What of a folder is as the hub has it."""

    def __init__(self, opened: Opened, published: Published, progress: Progress | None) -> None:
        self._folder, self._published, self._progress = opened.folder, published, progress
        bare = {*opened.headers, *opened.unread} if opened.bare else None
        self._listed = [file for file in published.files if bare is None or file.name in bare]
        self._bare = bare
        self._stop, self._lock = Stop(), threading.Lock()
        self.equal: list[str] = []
        self.different: list[str] = []
        self.missing: list[str] = []
        self.extra: list[str] = []
        """What is here and not there."""
        self.problems: list[str] = []

    @property
    def nbytes(self) -> int:
        """How many bytes of files are to be read for it."""
        return sum(size for file in self._listed if (size := self._size(file)) == file.nbytes)

    def run(self, workers: int) -> None:
        """Compare everything."""
        share(self._tasks(), lambda task, _: task(), workers, self._stop)
        self.extra = self._extra()

    def described(self) -> dict[str, Any]:
        """What the report says of it."""
        return {
            "repository": self._published.asked.repo,
            "revision": self._published.asked.revision,
            "commit": self._published.commit,
            "equal": sorted(self.equal),
            "different": sorted(self.different),
            "missing": sorted(self.missing),
            "extra": self.extra,
        }

    def told(self) -> list[str]:
        """What is wrong, in words."""
        where = self._published.asked
        return [
            *(
                f"{printable(n)}: is another file than on the hub ({where})."
                for n in sorted(self.different)
            ),
            *(
                f"{printable(n)}: is on the hub ({where}), but not here."
                for n in sorted(self.missing)
                if not n.startswith(".")  # of git, not of the model
            ),
            *sorted(self.problems),
        ]

    def _tasks(self) -> Iterator[Callable[[], None]]:
        for file in self._listed:
            yield partial(self._compare, file)

    def _size(self, file: Listed) -> int | None:
        path = self._folder / file.name
        with reading(path):
            there = found(path) if is_file(path) else None
        return None if there is None else there.st_size

    def _compare(self, file: Listed) -> None:
        path = self._folder / file.name
        size = self._size(file)
        if size is None:
            self.missing.append(file.name)
        elif size != file.nbytes:
            self.different.append(file.name)
        else:
            try:
                same = self._digest(path, file) == file.digest
            except (InputError, ReadError) as error:
                self.problems.append(str(error))
            else:
                (self.equal if same else self.different).append(file.name)

    def _digest(self, path: Path, file: Listed) -> str:
        elsewhere = far_at(path)
        here = path if elsewhere is None else elsewhere.local()
        kind = file.digest.partition(":")[0]
        if elsewhere is not None and elsewhere.digest.partition(":")[0] == kind and here is None:
            return elsewhere.digest
        # A copy in the cache may have been damaged there since.
        return f"{kind}:{content_digest(here or path, kind, self._told(file.name))}"

    def _told(self, name: str) -> Callable[[int], None]:
        def told(nbytes: int) -> None:
            self._stop.check()
            if self._progress is not None:
                with self._lock:
                    self._progress(nbytes, name)

        return told

    def _extra(self) -> list[str]:
        """What is here and not on the hub; what could do harm there is a problem."""
        if self._bare is not None:
            known = {file.name for file in self._listed}
            self.problems += [
                f"{printable(name)}: is not on the hub ({self._published.asked})."
                for name in sorted(self._bare - known)
            ]
            return sorted(self._bare - known)
        known = {file.name for file in self._published.files}
        extra = []
        for entry in sorted(contents(self._folder), key=lambda one: one.name):
            if entry.name in known or entry.name.endswith("/"):
                continue
            extra.append(entry.name)
            problem = harm(entry)
            if problem is not None:
                self.problems.append(f"{printable(entry.name)}: {problem}.")
        return extra
