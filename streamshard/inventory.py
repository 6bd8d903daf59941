"""What a checkpoint has of its family's table, what it lacks, and what has no place in it."""

from __future__ import annotations

import itertools
from collections.abc import Collection, Iterable, Iterator, Sequence
from dataclasses import replace
from typing import Any

from streamshard.families import Dims
from streamshard.tables import Entry, Holes, Table, find

__all__ = [
    "MAX_MISSING",
    "UNKNOWN",
    "counted",
    "misplaced",
    "missing_names",
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
}


def counted(dims: Dims, source: Iterable[str], table: Table, side: str) -> Dims:
    """`dims` with counts and switches that are None taken from the names in the source."""
    if all(getattr(dims, name) is not None for name in _asked(table)):
        return dims
    indexes: dict[str, set[int]] = {"block": set(), "layer": set(), "expert": set()}
    switches: dict[str, Any] = {}
    dense = set()
    for name in source:
        match = find(table, side, name)
        if match is None or table.entries[match[0]].row.op == "drop":
            continue
        entry, holes = table.entries[match[0]], match[2]
        for hole, index in zip(entry.holes, holes, strict=True):
            indexes[hole].add(index)
        if entry.row.only:
            switches[entry.row.only] = True
        if entry.row.layers == "dense":
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
    asked |= {entry.row.only for entry in table.entries if entry.row.only}
    return asked | {"dense_layers" for entry in table.entries if entry.row.layers}


def _count(dims: Dims, hole: str) -> int:
    return getattr(dims, _COUNTS[hole]) or 0


def _is_in_layer(entry: Entry, holes: Sequence[int], dims: Dims) -> bool:
    """Whether a row that only dense or only sparse layers have belongs in this one."""
    if not entry.row.layers:
        return True
    is_dense = holes[entry.holes.index("layer")] in (dims.dense_layers or ())
    return is_dense == (entry.row.layers == "dense")


def misplaced(entry: Entry, holes: Holes, dims: Dims) -> str | None:
    """Why a model of these dimensions does not have a name of this row, None if it does."""
    for hole, index in zip(entry.holes, holes, strict=True):
        if index >= _count(dims, hole):
            return f"by the config there are {_count(dims, hole)} {_HOLES[hole]}"
    if entry.row.only and not getattr(dims, entry.row.only):
        return f"by the config there is no {_SWITCHES[entry.row.only]}"
    if not _is_in_layer(entry, holes, dims):
        has = "has" if entry.row.layers == "dense" else "has no"
        return f"by the config this layer {has} experts"
    return None


def missing_names(source: Collection[str], table: Table, dims: Dims, side: str) -> Iterator[str]:
    """Names that a model of these dimensions has and the source has not."""
    for entry in table.entries:
        row = entry.row
        tied = side == "hf" and row.tied_to and dims.tied
        if row.op == "drop" or tied or (row.only and not getattr(dims, row.only)):
            continue
        for holes in itertools.product(*(range(_count(dims, hole)) for hole in entry.holes)):
            if _is_in_layer(entry, holes, dims):
                names = (name.format(*holes) for name in entry.names(side))
                yield from (name for name in names if name not in source)
