"""Which tensors one thread writes, one after the other: those of a file that is best read in order.

Of a file on this machine every thread takes the next tensor, whichever that is. One that comes over a
network is read by one thread from its beginning to its end: that takes one stream, and all of it
is seen in the order in which a digest can be taken along.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import cache
from typing import TypeAlias

from streamshard.checkpoint.shards import Shard
from streamshard.disk.far import far_at
from streamshard.disk.files import open_source
from streamshard.tensors.lazy import Lazy, Stored

__all__ = ["Place", "lanes"]

Place: TypeAlias = tuple[Shard, int, str]
"""A tensor of a shard: the how manieth it is, and its name."""


def lanes(
    shards: Sequence[Shard], reference: Mapping[str, Stored]
) -> tuple[list[list[Place]], list[Place]]:
    """The tensors of each file that is best read in order, as they lie there; and all others.

    A tensor that is made of several files, or compared with one, belongs to the first that is so.
    """
    in_order = cache(_is_in_order)
    found: dict[str, list[tuple[int, Place]]] = {}
    others: list[Place] = []
    for shard in shards:
        for number, (name, tensor) in enumerate(shard.tensors.items()):
            place = shard, number, name
            lane = _lane(tensor, reference.get(name), in_order)
            if lane is None:
                others.append(place)
            else:
                found.setdefault(lane[0], []).append((lane[1], place))
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
