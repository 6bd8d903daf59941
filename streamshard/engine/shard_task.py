"""The unit of work: some bytes of an output file, as a value; `do_task.py` does it.

A task knows the file and the range, the tensors that lie there, and what they are compared with. It
can be pickled, and done by a thread, another process or another machine that sees the same files,
always with the same bytes and figures.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import field
from pathlib import Path

from streamshard.checkpoint.shards import Shard
from streamshard.disk.inputs import Stamp
from streamshard.tensors.lazy import Lazy, Stored
from streamshard.tensors.rounding import Changes
from streamshard.values import frozen

__all__ = ["Member", "Result", "ShardTask", "parts_of", "task_of"]


# A tensor is cut into no smaller parts.
PART_BYTES = 8 * 1024 * 1024


@frozen
class Member:
    """A tensor of a file: where its first byte is, and with what of another file it is compared."""

    name: str
    begin: int
    tensor: Lazy
    reference: Stored | None = None

    @property
    def end(self) -> int:
        """Where what follows begins."""
        return self.begin + self.tensor.nbytes


@frozen
class ShardTask:
    """To write bytes `[begin, end)` of a file that has its full length already.

    `members` are the tensors that are there, in whole or in part. `stamps` are what the files that
    they are read from were like when the plan was made, by path.
    """

    path: Path
    file_nbytes: int
    begin: int
    end: int
    members: tuple[Member, ...]
    stamps: Mapping[str, Stamp] = field(default_factory=dict)

    def holds(self, member: Member) -> bool:
        """Whether all of a tensor is in the range."""
        return self.begin <= member.begin and member.end <= self.end


@frozen
class Result:
    """What is known of a tensor, or of a part of one, that was written.

    `digest` is empty for a part. `distance` is the squared one from the reference, None for a part or
    without one; `changes` are what was done to elements of the source. `not_finite` says that numbers
    in it are NaN or infinite, `zero` that all are 0; both False for a part.
    """

    digest: bytes
    distance: float | None
    changes: Changes
    not_finite: bool = False
    zero: bool = False

    @property
    def squared(self) -> float:
        """The squared distance from the reference, or from what it is made of."""
        return self.changes.total().squared if self.distance is None else self.distance


def task_of(
    shard: Shard,
    path: Path,
    begin: int,
    end: int,
    *,
    reference: Mapping[str, Stored] | None = None,
    stamps: Mapping[str, Stamp] | None = None,
) -> ShardTask:
    """The task for any range of a shard that is written at `path`; its header is not in it."""
    known = reference or {}
    members = (
        Member(name, first, shard.tensors[name], known.get(name))
        for name, first in shard.header()[1].items()
    )
    # A tensor without bytes is where it begins, at the very end in the last range.
    last = shard.nbytes
    inside = tuple(
        member
        for member in members
        if max(member.begin, begin) < min(member.end, end)
        or (
            member.begin == member.end
            and (begin <= member.begin < end or member.begin == end == last)
        )
    )
    return ShardTask(path, shard.nbytes, begin, end, inside, stamps or {})


def parts_of(tensor: Lazy) -> int:
    """Into how many parts a tensor may be cut, so that as many workers write it."""
    return max(tensor.nbytes // PART_BYTES, 1) if tensor.divides() else 1
