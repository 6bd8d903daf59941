"""In which order tensors are written, and which of them by one thread, one after the other.

Of a file on this machine every thread takes the next tensor, whichever that is. One that comes over a
network is read by one thread from its beginning to its end: that takes one stream, and all of it
is seen in the order in which a digest can be taken along.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import cache
from itertools import groupby
from typing import TypeAlias

from streamshard.checkpoint.shards import Shard
from streamshard.disk.far import far_at, is_any
from streamshard.disk.files import open_source
from streamshard.engine.shard_task import Member, parts_of
from streamshard.tensors.lazy import Lazy, Stored

__all__ = ["Place", "cuts_of", "is_copied", "lanes", "ordered"]

# What is only copied is worth an order of its own from here on.
STRETCH_BYTES = 32 * 1024 * 1024
# A part of a tensor begins on a multiple.
ALIGNED_BYTES = 4096

Place: TypeAlias = tuple[Shard, int, str]
"""A tensor of a shard: the how manieth it is, and its name."""


def lanes(
    shards: Sequence[Shard], reference: Mapping[str, Stored]
) -> tuple[list[list[Place]], Callable[[], Iterator[Place]]]:
    """The tensors of each file that is best read in order, as they lie there; and what yields all others.

    A tensor that is made of several files, or compared with one, belongs to the first that is so.
    """
    in_order = cache(_is_in_order)
    found: dict[str, list[tuple[int, Place]]] = {}
    taken: set[tuple[str, int]] = set()
    for shard in shards if is_any() else ():
        for number, (name, tensor) in enumerate(shard.tensors.items()):
            lane = _lane(tensor, reference.get(name), in_order)
            if lane is not None:
                found.setdefault(lane[0], []).append((lane[1], (shard, number, name)))
                taken.add((shard.name, number))

    def others() -> Iterator[Place]:
        for shard in shards:
            for number, name in enumerate(shard.tensors):
                if (shard.name, number) not in taken:
                    yield shard, number, name

    ordered = [sorted(lane, key=lambda one: one[0]) for lane in found.values()]
    return [[place for _, place in lane] for lane in ordered], others


def _lane(
    tensor: Lazy, reference: Stored | None, in_order: Callable[[str], bool]
) -> tuple[str, int] | None:
    """The file that decides, and where the tensor begins in it; None if there is none."""
    path, first = None, 0
    for one in _read(tensor, reference):
        if path is None and in_order(one.path):
            path, first = one.path, one.offset
        elif path == one.path:
            first = min(first, one.offset)
    return None if path is None else (path, first)


def _read(tensor: Lazy, reference: Stored | None) -> Iterator[Stored]:
    for one in tensor.inputs():
        yield one.tensor
    if reference is not None:
        yield reference


def _is_in_order(path: str) -> bool:
    if far_at(path) is None:  # nothing here is, and nothing need be opened
        return False
    with open_source(path) as source:
        return source.abilities.in_order


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
