"""Where finished shards go: what the writer asks of a folder, whoever else writes there."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Protocol

from streamshard.engine.journal import Elsewhere, FinishedShard

__all__ = ["Destination"]


class Destination(Protocol):
    """A folder in which shards are written: of one run (`staging.py`), or of many (`parts_folder.py`)."""

    folder: Path

    @property
    def finished(self) -> Mapping[str, FinishedShard]:
        """The shards that are finished, by name."""

    def temporary(self, name: str) -> Path:
        """Where a file is written until it is complete and gets its name."""

    def add(self, shard: FinishedShard) -> None:
        """Note that a shard is finished, has its name, and is on disk."""

    def elsewhere(self, key: str) -> Elsewhere:
        """What is noted of the store with this key, to which finished shards are sent."""

    def add_elsewhere(self, key: str, noted: Elsewhere) -> None:
        """Note what was sent there."""

    def drop(self, name: str) -> None:
        """Remove a file, if it is there."""
