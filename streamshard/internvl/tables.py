"""The tables of `families`, compiled for looking up the names of either layout.

And what a checkpoint has of its family's table, what it lacks, and what has no place in it.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Collection, Iterable, Iterator, Sequence
from dataclasses import replace
from functools import cache
from typing import Any

from streamshard.errors import nearest
from streamshard.internvl.families import FAMILIES, LAYOUTS, Layout, Rule
from streamshard.internvl.model_config import OTHER, Dims
from streamshard.internvl.spelling import flat_name
from streamshard.values import frozen

__all__ = [
    "MAX_MISSING",
    "TITLES",
    "UNKNOWN",
    "Entry",
    "Holes",
    "Table",
    "compared_names",
    "counted",
    "counterparts",
    "expert_names",
    "find",
    "misplaced",
    "missing_names",
    "nearest_names",
    "opened",
    "table_of",
    "tied_twin",
]


# More missing names than this are not looked for: nobody reads them.
MAX_MISSING = 1000

UNKNOWN = "no row of the tables has this name"
_COUNTS = {"block": "blocks", "layer": "layers", "expert": "experts"}
_HOLES = {"block": "vision layers", "layer": "language model layers", "expert": "experts"}
_SWITCHES = {
    "qkv_bias": "bias of the vision encoder's q, k, v",
    "qk_norm": "norm of the vision encoder's q and k",
    "norm_bias": "bias of the vision encoder's norms",
    "attention_bias": "bias of the language model's attention",
    "mlp_bias": "bias of the language model's MLP",
    "position_table": "table of the vision encoder's positions",
}

# An index in a name. Longer ones, and ones with leading zeros, are no indexes of layers.
_INDEX = re.compile(r"(?<=\.)(0|[1-9][0-9]{0,5})(?=\.)")
_HOLE = re.compile(r"\{(\w+)\}")

TITLES: dict[Layout, str] = {"custom": "custom", "hf": "HF"}

Holes = tuple[int, ...]


@frozen
class Entry:
    """A rule as compiled: its names with empty holes, and what the holes count."""

    rule: Rule
    custom: tuple[str, ...]
    hf: tuple[str, ...]
    holes: tuple[str, ...]

    def names(self, side: Layout) -> tuple[str, ...]:
        return self.custom if side == "custom" else self.hf


@frozen
class Table:
    """The rules of a family, found by a name of one side with its indexes taken out."""

    entries: tuple[Entry, ...]
    found: dict[Layout, dict[str, tuple[int, int]]]
    """Side to name to the rule's number and the name's position in the rule."""


@cache
def table_of(family: str, packed: bool = False) -> Table:  # noqa: FBT002
    """The compiled table of a family, or that of its packed experts."""
    rules = FAMILIES[family].packed if packed else FAMILIES[family].rules
    entries = []
    found: dict[Layout, dict[str, tuple[int, int]]] = {side: {} for side in LAYOUTS}
    for number, rule in enumerate(rules):
        empty = {side: tuple(_HOLE.sub("{}", n) for n in rule.names(side)) for side in LAYOUTS}
        holes = tuple(_HOLE.findall(rule.custom))
        entries.append(Entry(rule, empty["custom"], empty["hf"], holes))
        for side, names in empty.items():
            for position, name in enumerate(names):
                found[side][name] = number, position
    return Table(tuple(entries), found)


def opened(name: str) -> tuple[str, Holes]:
    """A name with empty holes, and what was in them."""
    parts = _INDEX.split(name)
    return "{}".join(parts[::2]), tuple(map(int, parts[1::2]))


def find(table: Table, side: Layout, name: str) -> tuple[int, int, Holes] | None:
    """Rule, position in the rule, and indexes of a name; None if the table has no such name."""
    known = table.found[side]
    if name in known and "{" not in name:  # also names with a digit of their own, as mlp1.0
        return (*known[name], ())
    key, holes = opened(name)
    match = known.get(key)
    if match is None or key.count("{}") != len(holes):
        return None
    return (*match, holes)


def counterparts(table: Table, side: Layout, name: str) -> list[str]:
    """The names of the other side in the rule of a name; none if the table has no such name."""
    match = find(table, side, name)
    if match is None:
        return []
    number, _, holes = match
    return [other.format(*holes) for other in table.entries[number].names(OTHER[side])]


def tied_twin(table: Table, entry: Entry, side: Layout) -> str | None:
    """The name of the tensor that one which may be absent is a copy of; None if it may not."""
    if not entry.rule.tied_to:
        return None
    number, position = table.found["hf"][entry.rule.tied_to]
    return table.entries[number].names(side)[position]


def expert_names(entry: Entry, holes: Holes, experts: int) -> list[str]:
    """The names of all experts' tensors in the order in which they are packed."""
    return [name.format(*holes, e) for e in range(experts) for name in entry.custom]


def nearest_names(name: str, table: Table, side: Layout) -> list[str]:
    """Names of the tables that are most like this one, with its own indexes."""
    name = flat_name(name) if side == "hf" else name
    holes = opened(name)[1]
    filled = (*holes, 0, 0)
    known = [known.format(*filled) for entry in table.entries for known in entry.names(side)]
    return nearest(name, known)


def counted(dims: Dims, source: Iterable[str], table: Table, side: Layout) -> Dims:
    """`dims` with counts and switches that are None taken from the names in the source."""
    if all(getattr(dims, name) is not None for name in _asked(table)):
        return dims
    indexes: dict[str, set[int]] = {"block": set(), "layer": set(), "expert": set()}
    switches: dict[str, Any] = {}
    dense = set()
    for name in source:
        match = find(table, side, name)
        if match is None or table.entries[match[0]].rule.op == "drop":
            continue
        entry, holes = table.entries[match[0]], match[2]
        for hole, index in zip(entry.holes, holes, strict=True):
            indexes[hole].add(index)
        if entry.rule.only:
            switches[entry.rule.only] = True
        if entry.rule.layers == "dense":
            dense.add(holes[entry.holes.index("layer")])
    counts: dict[str, Any] = {
        _COUNTS[hole]: max(seen, default=0) + 1 for hole, seen in indexes.items()
    }
    counts["dense_layers"] = frozenset(dense)
    said = {name: counts.get(name, switches.get(name, False)) for name in _asked(table)}
    return replace(dims, **{n: value for n, value in said.items() if getattr(dims, n) is None})


def _asked(table: Table) -> set[str]:
    """The fields of `Dims` that say which names a model has."""
    asked = {_COUNTS[hole] for entry in table.entries for hole in entry.holes}
    asked |= {entry.rule.only for entry in table.entries if entry.rule.only}
    return asked | {"dense_layers" for entry in table.entries if entry.rule.layers}


def _count(dims: Dims, hole: str) -> int:
    return getattr(dims, _COUNTS[hole]) or 0


def _is_in_layer(entry: Entry, holes: Sequence[int], dims: Dims) -> bool:
    """Whether a rule that only dense or only sparse layers have belongs in this one."""
    if not entry.rule.layers:
        return True
    is_dense = holes[entry.holes.index("layer")] in (dims.dense_layers or ())
    return is_dense == (entry.rule.layers == "dense")


def misplaced(entry: Entry, holes: Holes, dims: Dims) -> str | None:
    """Why a model of these dimensions does not have a name of this rule, None if it does."""
    for hole, index in zip(entry.holes, holes, strict=True):
        if index >= _count(dims, hole):
            return f"by the config there are {_count(dims, hole)} {_HOLES[hole]}"
    if entry.rule.only and not getattr(dims, entry.rule.only):
        return f"by the config there is no {_SWITCHES[entry.rule.only]}"
    if not _is_in_layer(entry, holes, dims):
        has = "has" if entry.rule.layers == "dense" else "has no"
        return f"by the config this layer {has} experts"
    return None


def compared_names(
    names: Iterable[str], dims: Dims, layout: Layout, limit: int = MAX_MISSING
) -> tuple[dict[str, str], list[str]]:
    """What a checkpoint of these flat names has besides its model, each with why, and what it lacks.

    At most `limit` names that it lacks are looked for. Packed experts count as all of theirs.
    """
    table = table_of(dims.family)
    found = dict.fromkeys(_unpacked(names, dims))
    actual = counted(dims, found, table, layout)
    others = {}
    for name in found:
        match = find(table, layout, name)
        why = UNKNOWN if match is None else misplaced(table.entries[match[0]], match[2], actual)
        if why is not None:
            others[name] = why
    return others, list(itertools.islice(missing_names(found, table, actual, layout), limit))


def _unpacked(names: Iterable[str], dims: Dims) -> Iterator[str]:
    """The names with those of each expert instead of those of packed experts."""
    packed = table_of(dims.family, packed=True)
    for name in names:
        match = find(packed, "hf", name)
        if match is None:
            yield name
        else:
            yield from expert_names(packed.entries[match[0]], match[2], dims.experts or 0)


def missing_names(source: Collection[str], table: Table, dims: Dims, side: Layout) -> Iterator[str]:
    """Names that a model of these dimensions has and the source has not."""
    for entry in table.entries:
        rule = entry.rule
        tied = rule.tied_to and dims.tied
        if rule.op == "drop" or tied or (rule.only and not getattr(dims, rule.only)):
            continue
        for holes in itertools.product(*(range(_count(dims, hole)) for hole in entry.holes)):
            if _is_in_layer(entry, holes, dims):
                names = (name.format(*holes) for name in entry.names(side))
                yield from (name for name in names if name not in source)
