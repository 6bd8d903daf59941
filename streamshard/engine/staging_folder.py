"""The folder in which an output is built: what is finished there is noted, what is ours is removed."""

from __future__ import annotations

import contextlib
from collections.abc import Mapping
from pathlib import Path

from streamshard.checkpoint.file_names import JOURNAL_NAME
from streamshard.disk import folders
from streamshard.disk.folders import exists, held, inode_of, sync_folder
from streamshard.disk.held import Held, Inode
from streamshard.disk.system import system, writing
from streamshard.engine.claims import remove_listed, strangers
from streamshard.engine.journal import Elsewhere, FinishedShard, Journal
from streamshard.engine.leftovers import refuse_strangers
from streamshard.engine.long_names import part_name
from streamshard.engine.marks import Mark
from streamshard.errors import OutputError, printable

__all__ = ["Staging"]


class Staging:
    """A folder in which an output is built, and what an earlier run has finished of it."""

    def __init__(self, held: Held, journal: Journal) -> None:
        self.folder = Path(held.path)
        self._held = held
        self._journal = journal
        self._inner = contextlib.ExitStack()
        self.checked: dict[str, Mark] = {}
        """Finished shards that others have read again, and what their files were like."""

    @property
    def finished(self) -> Mapping[str, FinishedShard]:
        """The shards that are finished, by name; their content is for the reader to check."""
        return self._journal.finished

    def add(self, shard: FinishedShard) -> None:
        """Note that a shard is finished and on disk."""
        self.check_place()
        self._journal.add(shard)

    def elsewhere(self, key: str) -> Elsewhere:
        """What was noted of the store with this key."""
        return self._journal.elsewhere.get(key) or Elsewhere()

    def add_elsewhere(self, key: str, noted: Elsewhere) -> None:
        """Note what was sent there."""
        self.check_place()
        self._journal.add_elsewhere(key, noted)

    def drop(self, name: str) -> None:
        """Remove a file, if it is there."""
        with writing(self.folder / name, 0), contextlib.suppress(FileNotFoundError):
            system.unlink(self.folder / name)

    def temporary(self, name: str) -> Path:
        """Where a file is written until it is complete and gets its name."""
        return self.folder / part_name(name)

    def forget(self, name: str) -> None:
        """Remove a shard whose content is not what was noted."""
        self._journal.finished.pop(name, None)
        self.drop(name)

    def drop_ready(self) -> None:
        """Remove what an earlier run had ready beside the weights: it is written anew."""
        for noted in self._journal.elsewhere.values():
            for file in noted.ready:
                if file.name not in self.finished:
                    self.drop(file.name)
            noted.ready = ()

    def make_folders(self, folder: Path) -> list[Path]:
        """Make a folder in this one and those around it; returns what was made, innermost first."""
        made = []
        for part in reversed([folder, *folder.parents]):
            if self.folder in part.parents and not exists(part):
                with writing(part, 0):
                    made += folders.make_folders(part)
                self._inner.enter_context(held(part))
        return made[::-1]

    def check_place(self) -> None:
        """Raise `OutputError` if this folder has lost its name, or something else has it."""
        if not self.is_at(self.folder):
            raise OutputError(
                f"{printable(str(self.folder))}: is no longer the folder in which this run was writing: "
                "something has moved it or put something else there. Nothing of what is there now was "
                "touched. Find out what it was, then run again."
            )

    def check_content(self) -> None:
        """Raise `OutputError` if something has come into this folder that the run did not make."""
        refuse_strangers(self.folder, strangers(self.folder, self._journal.names))

    @property
    def inode(self) -> Inode:
        """What identifies this folder, whatever it is called."""
        return self._held.inode

    def is_at(self, path: Path) -> bool:
        """Whether this folder has such a name."""
        return inode_of(path) == self.inode

    def clear(self) -> None:
        """Remove everything but the journal, finished shards, and what is ready to be sent with them."""
        if not exists(self._journal.path):
            self._journal.restore()
            sync_folder(self.folder)
        ready = (one.name for noted in self._journal.elsewhere.values() for one in noted.ready)
        keep = {JOURNAL_NAME, *self._journal.finished, *ready}
        self._inner.close()
        remove_listed(self.folder, self._journal.names, keep=keep)

    def discard(self) -> list[str]:
        """Remove everything of this run, and the folder; returns what else is in it and stays."""
        self.close()
        stays = remove_listed(self.folder, self._journal.names, last=JOURNAL_NAME)
        if not stays:
            system.rmdir(self.folder)
        return stays

    def remove_journal(self) -> None:
        """Remove the journal, which a complete output does not have."""
        self._journal.close()
        sync_folder(self.folder)  # without it, the record must be there to tell what is ours
        self.drop(self._journal.path.name)
        sync_folder(self.folder)

    def close(self) -> None:
        """Close the journal and inner folders."""
        self._inner.close()
        self._journal.close()
