"""A disk that may forget what was not synced: which states it can be in after some steps.

Names: a change of a folder since its last sync has reached the disk or not, a rename as a whole. All
combinations are tried; of more than 6 changes all, none, each alone, all but one, and the first ones.

Data: what was written to a file since its last sync is missing, or there, or only the length is and
zeros, or some of the sectors of 512 bytes are; of more than 2 files all alike, or all but one.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

__all__ = ["Disk", "Inode", "Step", "Tree", "written"]

SECTOR = 512
# Which sectors of what is not synced are there; the number is how many the file has.
SECTORS: dict[str, Callable[[int, int], bool]] = {
    "zeros": lambda *_: False,
    "every second": lambda place, _: place % 2 == 0,
    "the first half": lambda place, count: place < count // 2,
    "all but the last": lambda place, count: place < count - 1,
    "all but the first": lambda place, _: place > 0,
}
DATA = ("missing", "there", *SECTORS)
# Up to so many, all combinations are tried.
MANY_NAMES, MANY_FILES = 6, 2

Tree = dict[str, bytes | None]
"""What a state looks like: content by path relative to the folder; None for a folder."""


@dataclass(frozen=True)
class Step:
    """One change of the disk, or a sync.

    `inode` is the file or folder that it is about. A "names" step changes entries of that folder, to
    the inode in its place or None; "write" puts `data` at `offset`; "length" is what it says.
    """

    what: str
    inode: int
    names: tuple[tuple[str, int | None], ...] = ()
    data: bytes = b""
    offset: int = 0


@dataclass
class Inode:
    """A file or folder: what is on disk for certain, and what has come since."""

    folder: bool
    data: bytes = b""
    entries: dict[str, int] = field(default_factory=dict)
    pending: list[Step] = field(default_factory=list)


class Disk:
    """What the disk may hold after some steps."""

    def __init__(self, start: Tree) -> None:
        self.inodes = [Inode(folder=True)]
        for path, data in sorted(start.items()):
            *above, name = path.split("/")
            folder = 0
            for part in above:
                folder = self.inodes[folder].entries[part]
            self.inodes[folder].entries[name] = len(self.inodes)
            self.inodes.append(Inode(data is None, data or b""))

    def apply(self, step: Step) -> None:
        """Take a step."""
        if step.what == "new":
            while len(self.inodes) <= step.inode:
                self.inodes.append(Inode(folder=bool(step.offset)))
            return
        inode = self.inodes[step.inode]
        if step.what != "sync":
            inode.pending.append(step)
        elif inode.folder:
            inode.entries = _renamed(inode.entries, inode.pending)
            inode.pending = []
        else:
            inode.data, inode.pending = written(inode, "there"), []

    def tree(self, subset: Callable[[int], Sequence[Step]], data: Mapping[int, str]) -> Tree:
        """The state in which these changes of names, and such data, have reached the disk."""
        found: Tree = {}

        def walk(number: int, path: str) -> None:
            inode = self.inodes[number]
            if not inode.folder:
                found[path] = written(inode, data.get(number, "there"))
                return
            if path:
                found[path] = None
            for name, child in _renamed(inode.entries, subset(number)).items():
                walk(child, f"{path}/{name}" if path else name)

        walk(0, "")
        return found

    def states(self) -> Iterator[Tree]:
        """All states that are tried."""
        folders = [n for n, inode in enumerate(self.inodes) if inode.folder and inode.pending]
        files = [n for n, inode in enumerate(self.inodes) if not inode.folder and inode.pending]
        changes = [(n, step) for n in folders for step in self.inodes[n].pending]
        for there in _subsets(len(changes)):
            kept = [change for place, change in enumerate(changes) if place in there]

            def subset(number: int, kept: Sequence[tuple[int, Step]] = kept) -> list[Step]:
                return [step for folder, step in kept if folder == number]

            for data in _choices(files):
                yield self.tree(subset, data)


def _choices(files: Sequence[int]) -> Iterator[dict[int, str]]:
    """How the data of files may be: each in every way, or all alike but one if they are many."""
    if len(files) <= MANY_FILES:
        for ways in itertools.product(DATA, repeat=len(files)):
            yield dict(zip(files, ways, strict=True))
        return
    for way in DATA:
        yield dict.fromkeys(files, way)
        for one in files:
            yield dict.fromkeys(files, way) | {one: "missing" if way == "there" else "there"}


def _subsets(count: int) -> list[frozenset[int]]:
    """Which of so many changes may be there; if they are many, only some of these sets."""
    every = frozenset(range(count))
    found = [every, frozenset[int]()]
    if count <= MANY_NAMES:
        return [frozenset(p for p in every if bits >> p & 1) for bits in range(1 << count)]
    for place in range(count):
        found += [frozenset({place}), every - {place}, frozenset(range(place))]
    return list(dict.fromkeys(found))


def _renamed(entries: dict[str, int], steps: Iterable[Step]) -> dict[str, int]:
    entries = dict(entries)
    for step in steps:
        for name, inode in step.names:
            if inode is None:
                entries.pop(name, None)
            else:
                entries[name] = inode
    return entries


def written(inode: Inode, how: str) -> bytes:
    """The content of a file if what is not synced has reached the disk in such a way."""
    if how == "missing" or not inode.pending:
        return inode.data
    whole = bytearray(inode.data)
    for step in inode.pending:
        if step.what == "length":
            whole = whole[: step.offset] + bytes(max(step.offset - len(whole), 0))
        else:
            end = step.offset + len(step.data)
            whole += bytes(max(end - len(whole), 0))
            whole[step.offset : end] = step.data
    if how == "there":
        return bytes(whole)
    before = inode.data[: len(whole)] + bytes(max(len(whole) - len(inode.data), 0))
    sectors = -(-len(whole) // SECTOR)
    for place in range(sectors):
        if not SECTORS[how](place, sectors):
            part = slice(place * SECTOR, (place + 1) * SECTOR)
            whole[part] = before[part]
    return bytes(whole)
