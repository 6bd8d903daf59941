"""The tables of `families`, compiled for looking up the names of either layout."""

from __future__ import annotations

import re
from dataclasses import dataclass
from functools import cache

from streamshard.errors import nearest
from streamshard.families import FAMILIES, OTHER, Row
from streamshard.spelling import flat_name

__all__ = [
    "TITLES",
    "Entry",
    "Holes",
    "Table",
    "counterparts",
    "expert_names",
    "find",
    "nearest_names",
    "opened",
    "table_of",
]

# An index in a name. Longer ones, and ones with leading zeros, are no indexes of layers.
_INDEX = re.compile(r"(?<=\.)(0|[1-9][0-9]{0,5})(?=\.)")
_HOLE = re.compile(r"\{(\w+)\}")

TITLES = {"custom": "custom", "hf": "HF"}

Holes = tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Entry:
    """A row as compiled: its names with empty holes, and what the holes count."""

    row: Row
    custom: tuple[str, ...]
    hf: tuple[str, ...]
    holes: tuple[str, ...]

    def names(self, side: str) -> tuple[str, ...]:
        return self.custom if side == "custom" else self.hf


@dataclass(frozen=True, slots=True)
class Table:
    """The rows of a family, found by a name of one side with its indexes taken out."""

    entries: tuple[Entry, ...]
    found: dict[str, dict[str, tuple[int, int]]]
    """Side to name to the row's number and the name's place in the row."""


@cache
def table_of(family: str, packed: bool = False) -> Table:  # noqa: FBT002
    """The compiled table of a family, or that of its packed experts."""
    rows = FAMILIES[family].packed if packed else FAMILIES[family].rows
    entries = []
    found: dict[str, dict[str, tuple[int, int]]] = {"custom": {}, "hf": {}}
    for number, row in enumerate(rows):
        empty = {side: tuple(_HOLE.sub("{}", n) for n in row.names(side)) for side in found}
        holes = tuple(_HOLE.findall(row.custom))
        entries.append(Entry(row, empty["custom"], empty["hf"], holes))
        for side, names in empty.items():
            for place, name in enumerate(names):
                found[side][name] = number, place
    return Table(tuple(entries), found)


def opened(name: str) -> tuple[str, Holes]:
    """A name with empty holes, and what was in them."""
    parts = _INDEX.split(name)
    return "{}".join(parts[::2]), tuple(map(int, parts[1::2]))


def find(table: Table, side: str, name: str) -> tuple[int, int, Holes] | None:
    """Row, place in the row, and indexes of a name; None if the table has no such name."""
    known = table.found[side]
    if name in known and "{" not in name:  # also names with a digit of their own, as mlp1.0
        return (*known[name], ())
    key, holes = opened(name)
    match = known.get(key)
    if match is None or key.count("{}") != len(holes):
        return None
    return (*match, holes)


def counterparts(table: Table, side: str, name: str) -> list[str]:
    """The names of the other side in the row of a name; none if the table has no such name."""
    match = find(table, side, name)
    if match is None:
        return []
    number, _, holes = match
    return [other.format(*holes) for other in table.entries[number].names(OTHER[side])]


def expert_names(entry: Entry, holes: Holes, experts: int) -> list[str]:
    """The names of all experts' tensors in the order in which they are packed."""
    return [name.format(*holes, e) for e in range(experts) for name in entry.custom]


def nearest_names(name: str, table: Table, side: str) -> list[str]:
    """Names of the tables that are most like this one, with its own indexes."""
    name = flat_name(name) if side == "hf" else name
    holes = opened(name)[1]
    filled = (*holes, 0, 0)
    known = [known.format(*filled) for entry in table.entries for known in entry.names(side)]
    return nearest(name, known)
