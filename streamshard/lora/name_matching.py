"""Which tensors of a base an adapter's names mean: one rewrite of names for the whole adapter."""

from __future__ import annotations

import re
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import partial
from itertools import pairwise
from typing import NamedTuple, TypeAlias

from streamshard.errors import AdapterError, listed, nearest, printable
from streamshard.lora.name_rewrites import REWRITES, part_rewrites
from streamshard.lora.too_deep import too_deep
from streamshard.tensors.lazy import Lazy
from streamshard.values import frozen

__all__ = ["Homes", "OtherNames", "Place", "Wanted", "find_homes", "refuse_overlap"]


@frozen
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


@frozen
class OtherNames:
    """By which other names an adapter may call the weights of a base.

    `spelled` brings a name into the one spelling in which names are compared. `places` finds the
    places of a tensor of another layout, given its name and its rows (none if unknown); without it
    there is no other layout. `parts` is how names there begin, of models that are parts of one.
    `never_ties` says whether names are of a class that never has embedding and head as one tensor.
    """

    spelled: Callable[[str], str]
    places: Callable[[str, int], Sequence[Place]] | None = None
    parts: Callable[[], Iterable[str]] = tuple
    never_ties: Callable[[Iterable[str], str | None], bool] = lambda _names, _class: False


Homes: TypeAlias = dict[str, list[Place]]

_EXPERTS = re.compile(r"(?P<experts>.+\.experts)\.(?P<name>gate_up_proj|down_proj)")
_EXPERT = re.compile(
    r"(?P<experts>.+\.experts)\.(?P<number>\d{1,6})\.(?P<part>gate|up|down)_proj\.weight"
)
# GPT-OSS as unsloth loads it: a layer for each expert, with the transpose of what the model has.
_LISTED = re.compile(
    r"(?P<experts>.+\.experts)\.(?P<name>gate_up_proj|down_proj)s\.(?P<number>\d{1,6})\.weight"
)


@frozen
class _Reading:
    """One way to read all names of an adapter: what it is called, and where it puts rows of a name."""

    how: str
    places: Callable[[str, int], Sequence[Place]]


def find_homes(
    base: Mapping[str, Lazy],
    wanted: Mapping[str, Wanted],
    where: str,
    others: OtherNames,
    fits: Callable[[Homes], bool] = lambda _: True,
) -> Homes:
    """The places of every tensor that an adapter changes.

    `wanted` are these tensors by their names in the model that was trained: this base, the like in
    another layout, or a part of one. Names are read all in one way. Raises `AdapterError` if no way,
    or more than one, fits them all; `fits` says whether the shapes could, where the names leave it open.
    """
    search = _Search(base, wanted, where, fits)
    for readings in (_of_the_model, _of_another_layout, _of_a_part):
        homes = search.first(readings(base, wanted, others))
        if homes is not None:
            return homes
    raise search.error()


def _of_the_model(
    base: Mapping[str, Lazy], wanted: Mapping[str, Wanted], others: OtherNames
) -> Iterator[_Reading]:
    same = {name: name for name in base}
    for how, rewrite in REWRITES:
        yield _Reading(how, partial(_places, rewrite, same, base))
    flat = _spelled_names(base, wanted, others.spelled)
    how = "by the spellings of transformers' InternVL"
    yield _Reading(how, partial(_places, others.spelled, flat, base))


def _of_another_layout(
    _base: Mapping[str, Lazy], _wanted: Mapping[str, Wanted], others: OtherNames
) -> Iterator[_Reading]:
    if others.places is not None:
        yield _Reading("by the names of the other layout", others.places)


def _of_a_part(
    base: Mapping[str, Lazy], wanted: Mapping[str, Wanted], others: OtherNames
) -> Iterator[_Reading]:
    """Of a model that is a part of this one, or that this one is a part of."""
    example = max(wanted, key=len, default="")
    for known, rewrite in part_rewrites(base, example, others.spelled):
        yield _Reading(rewrite.how, partial(_places, rewrite, known, base))
    if others.places is not None:
        for part in others.parts():
            how = f"with leading '{part}' of the other layout"
            for removed in ("", "model."):
                yield _Reading(how, partial(_inside, part, removed, others.places))


def _inside(
    part: str,
    removed: str,
    places: Callable[[str, int], Sequence[Place]],
    name: str,
    rows: int,
) -> Sequence[Place]:
    return places(f"{part}{name.removeprefix(removed)}", rows)


class _Search:
    """Tries readings of an adapter's names, and remembers the one that came closest."""

    def __init__(
        self,
        base: Mapping[str, Lazy],
        wanted: Mapping[str, Wanted],
        where: str,
        fits: Callable[[Homes], bool],
    ) -> None:
        self._base, self._wanted, self._where, self._fits = base, wanted, where, fits
        self._matched, self._how, self._homeless = -1, "", list(wanted)
        self._twice: Homes | None = None

    def first(self, readings: Iterable[_Reading]) -> Homes | None:
        """Where one reading puts everything; None if none does. Raises if several do, differently."""
        found: dict[str, Homes] = {}
        for reading in readings:
            homes = self._homes(reading, tells=not found)
            if homes is not None and homes not in found.values():
                found[reading.how] = homes
        if len(found) > 1:
            # What does not fit in shape was not meant.
            found = {how: homes for how, homes in found.items() if self._fits(homes)} or found
        if len(found) > 1:
            examples = {how: next(iter(homes.values()))[0].target for how, homes in found.items()}
            raise AdapterError(
                f"{self._where}: its module names fit this base in more than one way "
                f"({', '.join(examples)}), so that the first is {listed(examples.values())}. Rename "
                "the keys as the base has them."
            )
        return next(iter(found.values()), None)

    def _homes(self, reading: _Reading, *, tells: bool) -> Homes | None:
        """Where a reading puts everything, or None; how near it comes is only noted if it may be told."""
        homes: Homes = {}
        homeless: list[str] = []
        for name, wanted in self._wanted.items():
            places = list(reading.places(name, wanted.rows))
            if places:
                homes[name] = places
            elif tells:
                homeless.append(name)
            else:
                return None
        if not homeless and _overlap(homes) is None:
            return homes
        if not homeless and self._twice is None:
            self._twice = homes
        if homeless and len(homes) > self._matched:
            self._matched, self._how, self._homeless = len(homes), reading.how, homeless
        return None

    def error(self) -> AdapterError:
        """Why no reading fits."""
        if self._twice is not None:
            return _overlapping(self._twice, self._where)
        best = self._matched, self._how, self._homeless
        return _no_home(self._base, self._where, self._wanted, best)


def _spelled_names(
    base: Mapping[str, Lazy], wanted: Mapping[str, Wanted], spelled: Callable[[str], str]
) -> dict[str, str]:
    """Names in one spelling to those of the base, of what may be wanted: a base may have 40,000."""
    # Interned: most are spelled so in the base, too, and are in memory once.
    names = {sys.intern(spelled(name)) for name in wanted}
    experts = {name.partition(".experts.")[0] for name in names if ".experts." in name}
    found = {}
    for name in base:
        flat = sys.intern(spelled(name))
        stem, mark, _ = flat.partition(".experts.")
        if flat in names or (mark and stem in experts):
            found[flat] = name
    return found


def _places(
    change: Callable[[str], str],
    known: Mapping[str, str],
    base: Mapping[str, Lazy],
    name: str,
    rows: int,
) -> list[Place]:
    """The places of a tensor in the layout that the base has, experts fused or one by one."""
    name = change(name)
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
    experts: str, parts: Sequence[str], known: Mapping[str, str], base: Mapping[str, Lazy]
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
    targets = [place.target for places in homes.values() for place in places]
    if len({*targets}) == len(targets):
        return None
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
    if _overlap(homes) is not None:
        raise _overlapping(homes, where)


def _overlapping(homes: Mapping[str, Sequence[Place]], where: str) -> AdapterError:
    one, other, target = map(printable, _overlap(homes) or ("", "", ""))
    return AdapterError(
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
    deeper = too_deep(wanted, homeless)
    if deeper is not None:
        return AdapterError(f"{where}: {deeper}")
    lines = [
        f"{where}: {len(homeless)} of {len(wanted)} modules are not in the base "
        f"({matched} are, {how}):"
    ]
    for name in homeless[:3]:
        near = nearest(name, base.keys(), count=1)
        lines.append(f"  '{printable(wanted[name].key)}'")
        lines.append(f"    nearest in the base: {listed(near) if near else 'nothing like it'}")
    if all(".lora_" not in wanted[name].key for name in homeless):
        lines.append(
            "These are whole tensors, as of a new head (modules_to_save): a base that has no such "
            "module has no place for them. Remove them from the file to merge the rest."
        )
    lines.append(
        "Is this the base that the adapter was trained on? Names are read in one way for the whole "
        "adapter. Give its own base, or rename its keys as this one has them."
    )
    return AdapterError("\n".join(lines))
