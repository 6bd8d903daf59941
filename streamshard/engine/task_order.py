"""In which order the tensors of a shard are begun, and into which parts large ones are cut."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from itertools import groupby

from streamshard.engine.shard_task import Member, parts_of

__all__ = ["cuts_of", "is_copied", "ordered"]

# What is only copied is worth an order of its own from here on.
STRETCH_BYTES = 32 * 1024 * 1024
# A part of a tensor begins on a multiple.
ALIGNED_BYTES = 4096


def is_copied(member: Member) -> bool:
    """Whether all bytes of a tensor are those of files."""
    return all(piece.ranges() is not None for piece in member.tensor.pieces)


def ordered(members: Sequence[Member], idle: Callable[[], bool]) -> Iterator[tuple[int, bool]]:
    """The places of members in the order in which they are begun, and whether it is a long copy.

    A stretch that is only copied keeps the disk busy and the processor idle, so one of it is begun
    whenever `idle` says that nobody copies. What is copied between others stays there: ahead of these,
    its ends would wait for the rest of their blocks in memory.
    """
    copied, others = deque[int](), deque[int]()
    for kind, places in groupby(range(len(members)), lambda place: is_copied(members[place])):
        stretch = [*places]
        long = sum(members[place].tensor.nbytes for place in stretch) >= STRETCH_BYTES
        (copied if kind and long else others).extend(stretch)
    while copied or others:
        alone = bool(copied) and (not others or idle())
        yield (copied if alone else others).popleft(), alone


def cuts_of(member: Member, left: int, workers: int, *, direct: bool = False) -> list[int]:
    """Where a tensor is cut into parts, its two ends among that; `left` are all bytes not begun yet.

    Only one that is more than a worker's share of what is left: the others would have to wait for
    it. Parts are measured in a second pass, which costs less than that, but not nothing. What goes
    around the page cache (`direct`) would have to be read from the disk for it, and of what is only
    copied one worker has more to write than the disk can: that is not cut.
    """
    most = 1 if direct and is_copied(member) else parts_of(member.tensor)
    if member.tensor.nbytes * workers <= left or workers < 2 or most < 2:
        return [member.begin, member.end]
    step = max(left // (2 * workers), member.tensor.nbytes // most)
    step = -(-step // ALIGNED_BYTES) * ALIGNED_BYTES
    first = (member.begin // ALIGNED_BYTES + 1) * ALIGNED_BYTES + step
    return [member.begin, *range(first, member.end - step // 2, step), member.end]
