"""Which part of an output writes which shards."""

from __future__ import annotations

import heapq
from collections.abc import Sequence
from typing import Any

from streamshard.checkpoint.shards import Shard
from streamshard.engine.option_values import Part

__all__ = ["divided", "of_neighbour", "shards_of", "who_does_what"]


def divided(shards: Sequence[Shard], count: int) -> list[list[Shard]]:
    """The shards of each of so many parts: about the same bytes, and the same whoever asks."""
    parts: list[list[int]] = [[] for _ in range(count)]
    loads = [(0, part) for part in range(count)]
    for place in sorted(range(len(shards)), key=lambda place: (-shards[place].nbytes, place)):
        load, part = loads[0]
        parts[part].append(place)
        heapq.heapreplace(loads, (load + shards[place].nbytes, part))
    return [[shards[place] for place in sorted(part)] for part in parts]


def who_does_what(shards: Sequence[Shard], part: Part) -> list[dict[str, Any]]:
    """What every part writes, as the report of a dry run shows it."""
    return [
        {
            "part": f"{number}/{part.count}",
            "bytes": sum(shard.nbytes for shard in own),
            "files": [shard.name for shard in own],
        }
        for number, own in enumerate(divided(shards, part.count) if part.number else (), start=1)
    ]


def shards_of(shards: Sequence[Shard], part: Part | None) -> Sequence[Shard]:
    """The shards of one part; all if none is wanted, and none if the output is to be completed."""
    if part is None:
        return shards
    return divided(shards, part.count)[part.number - 1] if part.number else []


def of_neighbour(shards: Sequence[Shard], part: Part) -> Sequence[Shard]:
    """The shards of the part before this one, the last before the first; none if there is no other."""
    before = (part.number - 2) % part.count + 1 if part.number else 0
    return () if before in (0, part.number) else shards_of(shards, Part(before, part.count))
