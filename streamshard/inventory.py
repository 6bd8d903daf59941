"""What a checkpoint has of its family's table, what it lacks, and what has no place in it."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from typing import Any

from streamshard.families import Dims
from streamshard.tables import Entry, Holes, Table, find

__all__ = [
    "MAX_MISSING",
    "UNKNOWN",
    "Found",
    "counted",
    "matched",
    "missing_names",
    "remove_misplaced",
]

# More missing names than this are not looked for: nobody reads them.
MAX_MISSING = 1000

UNKNOWN = "no row of the tables has this name"
_HOLES = {"block": "vision layers", "layer": "language model layers", "expert": "experts"}
_SWITCHES = {
    "qkv_bias": "bias of the vision encoder's q, k, v",
    "qk_norm": "norm of the vision encoder's q and k",
    "norm_bias": "bias of the vision encoder's norms",
    "attention_bias": "bias of the language model's attention",
    "mlp_bias": "bias of the language model's MLP",
}

# What the source has of the tables: the number of a row with its indexes, to a bit for each of the
# row's names. Small, because a large mixture of experts has 40,000 of these.
Found = dict[Holes, int]


def matched(source: Iterable[str], table: Table, side: str) -> tuple[Found, dict[str, str]]:
    """What of the tables the source has, in its order, and names that no row has."""
    found: Found = {}
    unknown: dict[str, str] = {}
    for name in source:
        match = find(table, side, name)
        if match is None:
            unknown[name] = UNKNOWN
            continue
        number, place, holes = match
        key = (number, *holes)
        found[key] = found.get(key, 0) | 1 << place
    return found, unknown


def counted(dims: Dims, found: Found, table: Table) -> Dims:
    """`dims` with counts and switches that are None taken from what was found."""
    indexes: dict[str, set[int]] = {"block": set(), "layer": set(), "expert": set()}
    switches: dict[str, Any] = {}
    dense = set()
    for number, *holes in found:
        entry = table.entries[number]
        if entry.row.op == "drop":
            continue
        for hole, index in zip(entry.holes, holes, strict=True):
            indexes[hole].add(index)
        if entry.row.only:
            switches[entry.row.only] = True
        if entry.row.layers == "dense":
            dense.add(holes[entry.holes.index("layer")])
    counts = {hole: max(seen, default=0) + 1 for hole, seen in indexes.items()}
    for entry in table.entries:
        if entry.row.only:
            switches.setdefault(entry.row.only, False)
    return replace(
        dims,
        blocks=dims.blocks or counts["block"],
        layers=dims.layers or counts["layer"],
        experts=dims.experts or counts["expert"],
        dense_layers=frozenset(dense) if dims.dense_layers is None else dims.dense_layers,
        **{only: on for only, on in switches.items() if getattr(dims, only) is None},
    )


def _count(dims: Dims, hole: str) -> int:
    return {"block": dims.blocks, "layer": dims.layers, "expert": dims.experts}[hole] or 0


def _is_in_layer(entry: Entry, holes: Sequence[int], dims: Dims) -> bool:
    """Whether a row that only dense or only sparse layers have belongs in this one."""
    if not entry.row.layers:
        return True
    is_dense = holes[entry.holes.index("layer")] in (dims.dense_layers or ())
    return is_dense == (entry.row.layers == "dense")


def remove_misplaced(found: Found, table: Table, dims: Dims, side: str) -> dict[str, str]:
    """Take out what a model of these dimensions does not have, and say why."""
    misplaced: dict[str, str] = {}
    for number, *holes in list(found):
        entry = table.entries[number]
        beyond = [
            f"there are {_count(dims, hole)} {_HOLES[hole]}"
            for hole, index in zip(entry.holes, holes, strict=True)
            if index >= _count(dims, hole)
        ]
        if beyond:
            reason = f"by the config {beyond[0]}"
        elif entry.row.only and not getattr(dims, entry.row.only):
            reason = f"by the config there is no {_SWITCHES[entry.row.only]}"
        elif not _is_in_layer(entry, holes, dims):
            has = "has" if entry.row.layers == "dense" else "has no"
            reason = f"by the config this layer {has} experts"
        else:
            continue
        bits = found.pop((number, *holes))
        for place, name in enumerate(entry.names(side)):
            if bits >> place & 1:
                misplaced[name.format(*holes)] = reason
    return misplaced


def missing_names(found: Found, table: Table, dims: Dims, side: str) -> Iterator[str]:
    """Names that a model of these dimensions has and the source has not."""
    for number, entry in enumerate(table.entries):
        row, names = entry.row, entry.names(side)
        tied = side == "hf" and row.tied_to and dims.tied
        if row.op == "drop" or tied or (row.only and not getattr(dims, row.only)):
            continue
        for holes in itertools.product(*(range(_count(dims, hole)) for hole in entry.holes)):
            if _is_in_layer(entry, holes, dims):
                bits = found.get((number, *holes), 0)
                for place, name in enumerate(names):
                    if not bits >> place & 1:
                        yield name.format(*holes)
