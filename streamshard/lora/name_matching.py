"""Which tensors of a base an adapter's names mean: one rewrite of names for the whole adapter."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import NamedTuple, Protocol, TypeAlias

from streamshard.errors import AdapterError, listed, nearest, printable
from streamshard.tensors.lazy import Lazy

__all__ = ["Homes", "OtherNames", "Place", "Wanted", "find_homes", "refuse_overlap"]


@dataclass(frozen=True, slots=True)
class Place:
    """Where rows of a change go: `rows` from `source_start` on, to `target` from `start` on.

    Rows of a target of experts, (experts, rows, columns), are counted over all experts. `whole`
    says that they must be all rows of the target, `turned` that the target has the transpose.
    """

    target: str
    start: int
    source_start: int
    rows: int
    whole: bool
    turned: bool = False


class Wanted(NamedTuple):
    """Rows that an adapter has for a tensor, and one of its keys for it, for messages."""

    rows: int
    key: str


class Known(Protocol):
    """Names that an adapter may use, to those of the base."""

    def get(self, name: str, /) -> str | None:
        """The name in the base, or None."""


@dataclass(frozen=True, slots=True)
class OtherNames:
    """By which other names an adapter may call the weights of a base.

    `spelled` brings a name into the one spelling in which names are compared. `places` finds the
    places of a tensor of another layout, given its name and its rows (none if unknown); without it
    there is no other layout.
    """

    spelled: Callable[[str], str]
    places: Callable[[str, int], Sequence[Place]] | None = None


Homes: TypeAlias = dict[str, list[Place]]

_EXPERTS = re.compile(r"(?P<experts>.+\.experts)\.(?P<name>gate_up_proj|down_proj)")
_EXPERT = re.compile(
    r"(?P<experts>.+\.experts)\.(?P<number>\d{1,6})\.(?P<part>gate|up|down)_proj\.weight"
)
# GPT-OSS as unsloth loads it: a layer for each expert, with the transpose of what the model has.
_LISTED = re.compile(
    r"(?P<experts>.+\.experts)\.(?P<name>gate_up_proj|down_proj)s\.(?P<number>\d{1,6})\.weight"
)


_REWRITES: tuple[tuple[str, Callable[[str], str]], ...] = (
    ("as named", lambda name: name),
    ("without leading 'model.'", lambda name: re.sub(r"^model\.", "", name)),
    ("with leading 'model.'", lambda name: f"model.{name}"),
    ("without leading 'language_model.'", lambda name: re.sub(r"^language_model\.", "", name)),
    ("with leading 'language_model.'", lambda name: f"language_model.{name}"),
)


def find_homes(
    base: Mapping[str, Lazy], wanted: Mapping[str, Wanted], where: str, others: OtherNames
) -> Homes:
    """The places of every tensor that an adapter changes.

    `wanted` are these tensors by their names in the model that was trained. Names are rewritten all
    in one way. Raises `AdapterError` if no rewrite, or more than one, fits them all.
    """
    same = _Names(base)
    spelled = others.spelled
    flat = _spelled_names(base, wanted, spelled)
    candidates: list[tuple[str, Known, Callable[[str], str]]]
    candidates = [(how, same, rewrite) for how, rewrite in _REWRITES]
    candidates.append(("by the spellings of transformers' InternVL", flat, spelled))
    found: dict[str, Homes] = {}
    best: tuple[int, str, list[str]] = (-1, "", [])
    for how, known, rewrite in candidates:
        homes = {n: _places(rewrite(n), w.rows, known, base) for n, w in wanted.items()}
        homeless = [name for name, places in homes.items() if not places]
        if not homeless and _overlap(homes) is None:
            found.setdefault(how, homes)
        elif len(wanted) - len(homeless) > best[0]:
            best = (len(wanted) - len(homeless), how, homeless)
    different: list[tuple[str, Homes]] = []
    for how, homes in found.items():
        if all(homes != other for _, other in different):
            different.append((how, homes))
    if len(different) > 1:
        raise AdapterError(
            f"{where}: its module names fit this base in more than one way "
            f"({', '.join(how for how, _ in different)}). Rename the keys as the base has them."
        )
    if different:
        return different[0][1]
    if others.places is not None:
        homes = {name: list(others.places(name, own.rows)) for name, own in wanted.items()}
        homeless = [name for name, places in homes.items() if not places]
        if not homeless:
            refuse_overlap(homes, where)
            return homes
        if len(wanted) - len(homeless) > best[0]:
            best = (len(wanted) - len(homeless), "by the names of the other layout", homeless)
    if not best[2]:  # all have homes, but two have the same
        refuse_overlap(
            {n: _places(spelled(n), w.rows, flat, base) for n, w in wanted.items()}, where
        )
    raise _no_home(base, where, wanted, best)


class _Names:
    """The names of a base, each known by itself."""

    def __init__(self, base: Mapping[str, Lazy]) -> None:
        self._base = base

    def get(self, name: str) -> str | None:
        """The name if it is one of them."""
        return name if name in self._base else None


def _spelled_names(
    base: Mapping[str, Lazy], wanted: Mapping[str, Wanted], spelled: Callable[[str], str]
) -> dict[str, str]:
    """Names in one spelling to those of the base, of what may be wanted: a base may have 40,000."""
    names = {spelled(name) for name in wanted}
    experts = {name.partition(".experts.")[0] for name in names if ".experts." in name}
    found = {}
    for name in base:
        flat = spelled(name)
        stem, mark, _ = flat.partition(".experts.")
        if flat in names or (mark and stem in experts):
            found[flat] = name
    return found


def _places(name: str, rows: int, known: Known, base: Mapping[str, Lazy]) -> list[Place]:
    """The places of a tensor in the layout that the base has, experts fused or one by one."""
    own = known.get(name)
    if own is not None:
        return [Place(own, 0, 0, rows, whole=True)]
    match = _EXPERTS.fullmatch(name)
    if match is not None:
        parts = ("gate", "up") if match["name"] == "gate_up_proj" else ("down",)
        return _one_by_one(match["experts"], parts, known, base)
    match = _LISTED.fullmatch(name)
    if match is not None:
        target = known.get(f"{match['experts']}.{match['name']}")
        if target is None or len(base[target].shape) != 3:
            return []
        height = base[target].shape[1]
        return [Place(target, int(match["number"]) * height, 0, height, whole=False, turned=True)]
    match = _EXPERT.fullmatch(name)
    if match is None:
        return []
    fused = "down_proj" if match["part"] == "down" else "gate_up_proj"
    target = known.get(f"{match['experts']}.{fused}")
    if target is None or len(base[target].shape) != 3:
        return []
    start = int(match["number"]) * base[target].shape[1]
    return [Place(target, start + (rows if match["part"] == "up" else 0), 0, rows, whole=False)]


def _one_by_one(
    experts: str, parts: Sequence[str], known: Known, base: Mapping[str, Lazy]
) -> list[Place]:
    """Where the rows of fused experts are, if the base has each by itself: gate rows, then up rows.

    transformers 5 fuses them so when it loads such files.
    """
    found: list[Place] = []
    at = number = 0
    while known.get(f"{experts}.{number}.{parts[0]}_proj.weight") is not None:
        for part in parts:
            target = known.get(f"{experts}.{number}.{part}_proj.weight")
            if target is None:
                return []
            found.append(Place(target, 0, at, base[target].rows, whole=True))
            at += base[target].rows
        number += 1
    return found


def _overlap(homes: Mapping[str, Sequence[Place]]) -> tuple[str, str, str] | None:
    """Two names that go to the same rows of one tensor, and that tensor."""
    spans = sorted(
        (place.target, place.start, place.start + place.rows, name)
        for name, places in homes.items()
        for place in places
    )
    for (target, _, stop, one), (other_target, start, _, other) in pairwise(spans):
        if target == other_target and start < stop:
            return one, other, target
    return None


def refuse_overlap(homes: Mapping[str, Sequence[Place]], where: str) -> None:
    """Raise `AdapterError` if two names go to the same rows of one tensor."""
    twice = _overlap(homes)
    if twice is not None:
        one, other, target = map(printable, twice)
        raise AdapterError(
            f"{where}: '{one}' and '{other}' are both for the same rows of '{target}'. The file "
            "mixes spellings: keep one of each."
        )


def _no_home(
    base: Mapping[str, Lazy],
    where: str,
    wanted: Mapping[str, Wanted],
    best: tuple[int, str, list[str]],
) -> AdapterError:
    matched, how, homeless = best
    lines = [
        f"{where}: {len(homeless)} of {len(wanted)} modules are not in the base "
        f"({matched} are, {how}):"
    ]
    for name in homeless[:3]:
        near = nearest(name, base.keys())
        lines.append(
            f"  '{printable(wanted[name].key)}': nearest in the base: "
            + (listed(near) if near else "nothing like it")
        )
    lines.append("Is this the base that the adapter was trained on, in the same layout?")
    return AdapterError("\n".join(lines))
