"""Telling the layouts of InternVL checkpoints apart, and carrying tensors from one to the other.

The tables of `families` say what is called how; this module only reads them, in both directions:
a row that joins three tensors read forwards splits them read backwards. Nothing here does more to
a tensor than taking rows and joining them, so whatever can do that, can be converted.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache
from typing import Any, Generic, Protocol, TypeVar, overload

from streamshard.errors import InputError, UsageError, listed, nearest, printable
from streamshard.families import FAMILIES, Dims, Row, config_layout, llm_architecture
from streamshard.tensors import Lazy, concat

__all__ = [
    "LAZY",
    "Converted",
    "Detected",
    "Ops",
    "Piece",
    "convert",
    "detect",
    "dims_from_names",
    "flat_name",
    "flat_names",
    "in_memory",
    "layout_of",
    "pieces",
    "spell",
    "to_custom",
    "to_hf",
]


class Tensor(Protocol):
    """What the tables ask of a tensor; torch, numpy and `Lazy` have it."""

    @property
    def shape(self) -> Sequence[int]: ...
    @property
    def dtype(self) -> Any: ...
    def reshape(self, shape: Any, /) -> Any: ...


T = TypeVar("T", bound=Tensor)


@dataclass(frozen=True, slots=True)
class Ops(Generic[T]):
    """The two things done to tensors: rows `[start, stop)` of one, and several joined by rows."""

    rows: Callable[[T, int, int], T]
    join: Callable[[Sequence[T]], T]


def _take(tensor: Lazy, start: int, stop: int) -> Lazy:
    return tensor.take(start, stop)


LAZY: Ops[Lazy] = Ops(_take, concat)


def in_memory(join: Callable[[Sequence[Any]], Any]) -> Ops[Any]:
    """Operations on tensors that slice: `in_memory(torch.cat)`, `in_memory(np.concatenate)`."""
    return Ops(lambda tensor, start, stop: tensor[start:stop], join)


@dataclass(frozen=True, slots=True)
class Converted(Generic[T]):
    """Tensors in the other layout, and what kept the rest of the model from being converted.

    `missing` are names of the source layout that the tables ask for and the source has not (at
    most `MAX_MISSING` of them), `unexpected` are names in the source that have no place in the
    tables, each with the reason. Whatever needs a missing tensor is left out: nothing is invented.
    """

    tensors: dict[str, T]
    missing: tuple[str, ...]
    unexpected: dict[str, str]


@dataclass(frozen=True, slots=True)
class Piece:
    """Rows of a tensor in one layout that are rows of a tensor in the other."""

    target: str
    target_start: int
    source_start: int
    rows: int


@dataclass(frozen=True, slots=True)
class Detected:
    """What the names of a checkpoint's tensors say it is.

    `spelling` is that of HF names (see `SPELLINGS`), "mixed" if of several, None for custom.
    `family` is None if the names fit no table. `evidence` names what decided.
    """

    layout: str
    spelling: str | None
    family: str | None
    lora_wrapped: bool
    packed_experts: bool
    evidence: tuple[str, ...]
    warnings: tuple[str, ...]


# Beginnings of HF names as transformers wrote or writes them: head, language model, and what is
# before vision tower and projector. "flat" is on the hubs and read by every version; "nested" are
# the names of modules in memory; "hybrid" is what 5.4 and 5.5 wrote and others cannot read.
SPELLINGS: dict[str, tuple[str, str, str]] = {
    "flat": ("language_model.lm_head.", "language_model.model.", ""),
    "nested": ("lm_head.", "model.language_model.", "model."),
    "hybrid": ("language_model.lm_head.", "model.language_model.model.", "model."),
    "mid": ("lm_head.", "language_model.model.", ""),
    "short": ("lm_head.", "language_model.", ""),
}
WRITTEN_SPELLINGS = ("flat", "nested")

_WRAPPERS = re.compile(
    r"^(?:(?:_orig_mod|module)\.)+"
    r"|(?:^|(?<=\.))(?:_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module)\."
)
_PEFT = re.compile(r"^(?:base_model\.model\.)+|(?<=^language_model\.)(?:base_model\.model\.)+"
                   r"|(?<=^vision_model\.)(?:base_model\.model\.)+")  # fmt: skip
_CUSTOM = re.compile(r"(?:vision_model|mlp1)\.")
_HF = re.compile(r"(?:model\.)?(?:vision_tower|multi_modal_projector)\.")

# An index in a name. Longer ones, and ones with leading zeros, are no indexes of layers.
_INDEX = re.compile(r"(?<=\.)(0|[1-9][0-9]{0,5})(?=\.)")
_HOLE = re.compile(r"\{(\w+)\}")

# More missing names than this are not looked for: nobody reads them.
MAX_MISSING = 1000

_OTHER = {"custom": "hf", "hf": "custom"}
_TITLES = {"custom": "custom", "hf": "HF"}
_UNKNOWN = "no row of the tables has this name"
_HOLES = {"block": "vision layers", "layer": "language model layers", "expert": "experts"}
_SWITCHES = {
    "qkv_bias": "bias of the vision encoder's q, k, v",
    "qk_norm": "norm of the vision encoder's q and k",
    "norm_bias": "bias of the vision encoder's norms",
    "attention_bias": "bias of the language model's attention",
    "mlp_bias": "bias of the language model's MLP",
}

Holes = tuple[int, ...]


def flat_name(name: str) -> str:
    """An HF name in the flat spelling, training wrappers removed; other names stay as they are.

    >>> flat_name("module.model.language_model.layers.0.mlp.up_proj.weight")
    'language_model.model.layers.0.mlp.up_proj.weight'
    >>> flat_name("model.lm_head.weight")
    'language_model.lm_head.weight'
    """
    return _flat(_unwrap(name))[0]


def _unwrap(name: str) -> str:
    """A name without wrappers of training."""
    # All wrappers hold one of these words, and searching for words is quick.
    wrapped = "module." in name or "_orig_mod." in name
    return _WRAPPERS.sub("", name) if wrapped else name


def _flat(name: str) -> tuple[str, str, str]:
    """A name in the flat spelling, its place in the entries of `SPELLINGS`, and its beginning."""
    rest = name.removeprefix("model.")
    if rest in {"lm_head.weight", "language_model.lm_head.weight"}:
        return "language_model.lm_head.weight", "head", name.removesuffix("weight")
    if rest.startswith(("vision_tower.", "multi_modal_projector.")):
        return rest, "vision", name.removesuffix(rest)
    if rest.startswith("language_model."):
        tail = rest.removeprefix("language_model.").removeprefix("model.")
        return f"language_model.model.{tail}", "llm", name.removesuffix(tail)
    return name, "", ""


def spell(name: str, spelling: str) -> str:
    """A flat HF name in a spelling that may be written: "flat" or "nested".

    >>> spell("language_model.lm_head.weight", "nested")
    'lm_head.weight'
    """
    if spelling not in WRITTEN_SPELLINGS:
        raise UsageError(
            f"the spelling {spelling!r} cannot be written; {', '.join(WRITTEN_SPELLINGS)} can. "
            "Other spellings cannot be read by all versions of transformers."
        )
    if spelling == "flat":
        return name
    head, llm, vision = SPELLINGS[spelling]
    if name.startswith("language_model.lm_head."):
        return name.replace("language_model.lm_head.", head, 1)
    if name.startswith("language_model.model."):
        return name.replace("language_model.model.", llm, 1)
    return vision + name


def flat_names(names: Iterable[str], layout: str) -> dict[str, str]:
    """Each name as the tables have it (flat, no wrappers) to the name as given.

    Raises `InputError` if two of them are the same tensor.
    """
    found: dict[str, str] = {}
    for name in names:
        plain = flat_name(name) if layout == "hf" else _unwrap(name)
        if plain in found:
            raise InputError(
                f"'{printable(found[plain])}' and '{printable(name)}' are both "
                f"'{printable(plain)}'. The checkpoint mixes spellings of several writers: keep "
                "one of each."
            )
        found[plain] = name
    return found


def layout_of(names: Iterable[str]) -> str | None:
    """Answer "custom", "hf", or None where the names do not tell.

    Names of the language model prove nothing: most families have the same in both layouts.
    """
    custom, hf = _evidence(names)
    if (custom is None) == (hf is None):
        return None
    return "custom" if hf is None else "hf"


def _evidence(names: Iterable[str]) -> tuple[str | None, str | None]:
    """The first name that proves the custom layout, and the first that proves the HF layout."""
    custom = hf = None
    for name in names:
        if "vision_" in name or "mlp1." in name or "projector." in name:
            plain = _plain(name)
            if custom is None and _CUSTOM.match(plain):
                custom = name
            elif hf is None and _HF.match(plain):
                hf = name
    return custom, hf


def _plain(name: str) -> str:
    """A name without wrappers of training and of PEFT."""
    plain = _unwrap(name)
    return _PEFT.sub("", plain).replace(".base_layer.", ".") if "base_" in plain else plain


def detect(names: Collection[str], config: Mapping[str, Any] | None = None) -> Detected:
    """Tell layout, spelling and family of a checkpoint by its names; the config is a cross-check.

    The names are trusted where the config disagrees, with a warning. Raises `InputError` if the
    names are of both layouts, or if neither names nor config tell.
    """
    by_config = None if config is None else config_layout(config)
    custom, hf = _evidence(names)
    if custom is not None and hf is not None:
        raise InputError(_mixed(custom, hf))
    layout = "custom" if custom is not None else "hf" if hf is not None else by_config
    if layout is None:
        raise InputError(
            f"no tensor of a vision encoder or projector among {listed(names)}, and no config that "
            "says what this is. Names of a language model do not tell the layout: give the folder "
            "of a whole InternVL checkpoint."
        )
    evidence = [name for name in (custom, hf) if name is not None] or ["config.json: model_type"]
    warnings = []
    if by_config not in (None, layout):
        warnings.append(
            f"config.json is of the {_TITLES[str(by_config)]} layout, but "
            f"'{printable(evidence[0])}' of the {_TITLES[layout]} layout; the names are believed"
        )
    spelling, example = _spelling(map(_plain, names)) if layout == "hf" else (None, None)
    if example is not None:
        evidence.append(example)
    keys = _llm_keys(names, layout)
    families = [family for family in FAMILIES if _fits(keys, family, layout)]
    family = families[0] if families else None
    stated = None if config is None else _stated_families(config)
    if stated and families and not set(stated) & set(families):
        warnings.append(
            f"config.json says that the language model is {stated[0]}, but the names are those of "
            f"{families[0]}; the names are believed"
        )
    elif stated and families:
        family = next(f for f in families if f in stated)
    return Detected(
        layout=layout,
        spelling=spelling,
        family=family,
        lora_wrapped=_has_lora(names),
        packed_experts=bool(family)
        and not keys.isdisjoint(_table(family, packed=True).found["hf"]),
        evidence=tuple(evidence),
        warnings=tuple(warnings),
    )


def dims_from_names(names: Collection[str], layout: str) -> Dims:
    """What names alone say: the family, the first of several that have the same HF names.

    For state dicts without a config. Raises `InputError` if the names fit no family.
    """
    keys = _llm_keys(names, layout)
    fitting = [family for family in FAMILIES if _fits(keys, family, layout)]
    if not fitting:
        raise InputError(
            f"the names of the language model, such as {listed(sorted(keys))}, are not those of "
            f"any of the families {listed(FAMILIES, len(FAMILIES))}. Give the config."
        )
    return Dims(fitting[0])


def _stated_families(config: Mapping[str, Any]) -> list[str]:
    """The families that a config may mean."""
    if config_layout(config) == "custom":
        try:
            architecture = llm_architecture(config)
        except InputError:
            return []
        return [f.name for f in FAMILIES.values() if f.architecture == architecture]
    text = config.get("text_config")
    kind = text.get("model_type", "qwen2") if isinstance(text, dict) else None
    return [f.name for f in FAMILIES.values() if f.hf_type == kind]


def _spelling(names: Iterable[str]) -> tuple[str, str | None]:
    """The spelling that fits all names, and a name of the language model as an example."""
    seen: dict[str, set[str]] = {"head": set(), "llm": set(), "vision": set()}
    example = None
    for name in names:
        _, kind, beginning = _flat(name)
        if kind:
            seen[kind].add(beginning)
            example = name if kind == "llm" and example is None else example
    for spelling, beginnings in SPELLINGS.items():
        if all(seen[kind] <= {b} for kind, b in zip(seen, beginnings, strict=True)):
            return spelling, example
    return "mixed", example


@dataclass(frozen=True, slots=True)
class _Entry:
    """A row as compiled: its names with empty holes, and what the holes count."""

    row: Row
    custom: tuple[str, ...]
    hf: tuple[str, ...]
    holes: tuple[str, ...]

    def names(self, side: str) -> tuple[str, ...]:
        return self.custom if side == "custom" else self.hf


@dataclass(frozen=True, slots=True)
class _Table:
    """The rows of a family, found by a name of one side with its indexes taken out."""

    entries: tuple[_Entry, ...]
    found: dict[str, dict[str, tuple[int, int]]]
    """Side to name to the row's number and the name's place in the row."""


@cache
def _table(family: str, packed: bool = False) -> _Table:  # noqa: FBT002
    rows = FAMILIES[family].packed if packed else FAMILIES[family].rows
    entries = []
    found: dict[str, dict[str, tuple[int, int]]] = {"custom": {}, "hf": {}}
    for number, row in enumerate(rows):
        empty = {side: tuple(_HOLE.sub("{}", n) for n in row.names(side)) for side in found}
        holes = tuple(_HOLE.findall(row.custom))
        entries.append(_Entry(row, empty["custom"], empty["hf"], holes))
        for side, names in empty.items():
            for place, name in enumerate(names):
                found[side][name] = number, place
    return _Table(tuple(entries), found)


def _open(name: str) -> tuple[str, Holes]:
    """A name with empty holes, and what was in them."""
    parts = _INDEX.split(name)
    return "{}".join(parts[::2]), tuple(map(int, parts[1::2]))


def _find(table: _Table, side: str, name: str) -> tuple[int, int, Holes] | None:
    """Row, place in the row, and indexes of a name; None if the table has no such name."""
    known = table.found[side]
    if name in known and "{" not in name:  # also names with a digit of their own, as mlp1.0
        return (*known[name], ())
    key, holes = _open(name)
    match = known.get(key)
    if match is None or key.count("{}") != len(holes):
        return None
    return (*match, holes)


# What the source has of the tables: the number of a row with its indexes, to a bit for each of the
# row's names. Small, because a large mixture of experts has 40,000 of these.
_Found = dict[Holes, int]


@overload
def convert(
    tensors: Mapping[str, Lazy], dims: Dims, layout: str, *, spelling: str = ...
) -> Converted[Lazy]: ...
@overload
def convert(
    tensors: Mapping[str, T], dims: Dims, layout: str, ops: Ops[T], *, spelling: str = ...
) -> Converted[T]: ...
def convert(
    tensors: Mapping[str, Any],
    dims: Dims,
    layout: str,
    ops: Ops[Any] = LAZY,
    *,
    spelling: str = "flat",
) -> Converted[Any]:
    """Carry a checkpoint from the other layout to `layout`, "custom" or "hf", as far as it goes.

    The order is that of the source. HF names may come in any spelling and leave in `spelling`.
    Raises `InputError` for the wrong layout, tensors that are there twice, and shapes and dtypes
    that do not fit; what is missing or unexpected is part of the answer.
    """
    side = _OTHER[layout]
    _check_side(tensors, side)
    given = flat_names(tensors, side)
    source = _unpack({flat: tensors[name] for flat, name in given.items()}, dims, ops)
    table = _table(dims.family)
    found, unexpected = _match(source, table, side)
    actual = _counted(dims, found, table)
    unexpected |= _remove_misplaced(found, table, actual, side)
    missing = tuple(itertools.islice(_missing(found, table, actual, side), MAX_MISSING))
    out: dict[str, Any] = {}
    for (number, *holes), bits in found.items():
        entry = table.entries[number]
        if entry.row.op != "drop" and bits == (1 << len(entry.names(side))) - 1:
            names = [name.format(*holes) for name in entry.names(side)]
            targets = [name.format(*holes) for name in entry.names(layout)]
            parts = {name: source[name] for name in names}
            out |= _carry(parts, targets, entry.row, dims, ops)
    for entry in table.entries:
        tied = side == "hf" and dims.tied and entry.hf[0] not in source
        if tied and entry.row.tied_to in source:
            out[entry.custom[0]] = source[entry.row.tied_to]
    if layout == "hf":
        out = {spell(name, spelling): tensor for name, tensor in out.items()}
    reasons = {given.get(name, name): reason for name, reason in unexpected.items()}
    return Converted(out, missing, reasons)


@overload
def to_custom(tensors: Mapping[str, Lazy], dims: Dims) -> dict[str, Lazy]: ...
@overload
def to_custom(tensors: Mapping[str, T], dims: Dims, ops: Ops[T]) -> dict[str, T]: ...
def to_custom(tensors: Mapping[str, Any], dims: Dims, ops: Ops[Any] = LAZY) -> dict[str, Any]:
    """A whole HF checkpoint, in any spelling, in the custom layout.

    A head that the HF checkpoint leaves out because it is tied becomes a copy of the embedding:
    `InternVLChatModel` has a head of its own, of random values where none is stored. Raises
    `InputError` where `convert` does, and for anything missing or unexpected.
    """
    return _complete(convert(tensors, dims, "custom", ops), dims, "hf")


@overload
def to_hf(tensors: Mapping[str, Lazy], dims: Dims, *, spelling: str = ...) -> dict[str, Lazy]: ...
@overload
def to_hf(
    tensors: Mapping[str, T], dims: Dims, ops: Ops[T], *, spelling: str = ...
) -> dict[str, T]: ...
def to_hf(
    tensors: Mapping[str, Any], dims: Dims, ops: Ops[Any] = LAZY, *, spelling: str = "flat"
) -> dict[str, Any]:
    """A whole custom checkpoint in the HF layout, experts one by one, head and embedding both.

    Raises `InputError` where `convert` does, and for anything missing or unexpected.
    """
    return _complete(convert(tensors, dims, "hf", ops, spelling=spelling), dims, "custom")


def pieces(name: str, rows: int, dims: Dims, layout: str) -> list[Piece]:
    """Where in `layout` the rows of the other layout's tensor `name` are.

    `name` is a tensor and not a module, HF names in any spelling; the targets are flat. `rows`
    is how many rows it has; packed experts count as a matrix, (experts, rows, columns) flattened
    to (experts * rows, columns). What holds for the rows of a weight holds for the rows of an
    update `B @ A`, so `B` goes with the rows and `A` stays. A dropped tensor has no pieces.
    Raises `InputError` for a name that the tables do not have, and rows that do not fit.

    >>> for piece in pieces("vision_model.encoder.layers.0.attn.qkv.weight", 96, Dims("qwen2"),
    ...                     "hf"):
    ...     print(piece.target, piece.target_start, piece.source_start, piece.rows)
    vision_tower.encoder.layer.0.attention.q_proj.weight 0 0 32
    vision_tower.encoder.layer.0.attention.k_proj.weight 0 32 32
    vision_tower.encoder.layer.0.attention.v_proj.weight 0 64 32
    """
    side = _OTHER[layout]
    plain = next(iter(flat_names([name], side)))
    packed = _table(dims.family, packed=True)
    match = _find(packed, "hf", plain)
    if match is not None:
        entry, holes = packed.entries[match[0]], match[2]
        if dims.experts is None:
            raise InputError(f"'{printable(name)}': the config must say num_experts.")
        targets = _expert_names(entry, holes, dims.experts)
        sizes = _rows_of_parts(entry.row, len(targets), dims, rows, plain)
        return [
            replace(piece, source_start=start + piece.source_start)
            for target, start, size in zip(
                targets, itertools.accumulate(sizes, initial=0), sizes, strict=False
            )
            for piece in pieces(target, size, dims, layout)
        ]
    table = _table(dims.family)
    match = _find(table, side, plain)
    if match is None:
        near = _nearest(plain, table, side)
        raise InputError(
            f"'{printable(name)}' is no tensor of the {_TITLES[side]} layout of {dims.family}; "
            f"nearest: {listed(near) if near else 'nothing like it'}."
        )
    number, place, holes = match
    entry = table.entries[number]
    targets = [target.format(*holes) for target in entry.names(layout)]
    if entry.row.op == "drop":
        return []
    if entry.row.op == "same":
        return [Piece(targets[0], 0, 0, rows)]
    if len(targets) > 1:
        sizes = _rows_of_parts(entry.row, len(targets), dims, rows, plain)
        return [
            Piece(targets[part], start, at, stop - start)
            for at, part, start, stop in _segments(entry.row, sizes, dims)
        ]
    sizes = _part_rows(entry.row, len(entry.names(side)), dims, rows, plain)
    if sizes[place] != rows:
        raise _wrong_rows(plain, rows, f"{sizes[place]:,}")
    return [
        Piece(targets[0], at, start, stop - start)
        for at, part, start, stop in _segments(entry.row, sizes, dims)
        if part == place
    ]


def _check_side(names: Iterable[str], side: str) -> None:
    custom, hf = _evidence(names)
    if custom is not None and hf is not None:
        raise InputError(_mixed(custom, hf))
    found = custom if side == "hf" else hf
    if found is not None:
        raise InputError(
            f"'{printable(found)}' is of the {_TITLES[_OTHER[side]]} layout, but a checkpoint of "
            f"the {_TITLES[side]} layout was expected. Are the folders given the wrong way round?"
        )


def _mixed(custom: str, hf: str) -> str:
    return (
        f"'{printable(custom)}' is of the custom layout and '{printable(hf)}' of the HF layout: "
        "two checkpoints are mixed. Keep the files of one."
    )


def _match(source: Iterable[str], table: _Table, side: str) -> tuple[_Found, dict[str, str]]:
    """What of the tables the source has, in its order, and names that no row has."""
    found: _Found = {}
    unknown: dict[str, str] = {}
    for name in source:
        match = _find(table, side, name)
        if match is None:
            unknown[name] = _UNKNOWN
            continue
        number, place, holes = match
        key = (number, *holes)
        found[key] = found.get(key, 0) | 1 << place
    return found, unknown


def _counted(dims: Dims, found: _Found, table: _Table) -> Dims:
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


def _is_in_layer(entry: _Entry, holes: Sequence[int], dims: Dims) -> bool:
    """Whether a row that only dense or only sparse layers have belongs in this one."""
    if not entry.row.layers:
        return True
    is_dense = holes[entry.holes.index("layer")] in (dims.dense_layers or ())
    return is_dense == (entry.row.layers == "dense")


def _remove_misplaced(found: _Found, table: _Table, dims: Dims, side: str) -> dict[str, str]:
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


def _missing(found: _Found, table: _Table, dims: Dims, side: str) -> Iterator[str]:
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


def _carry(
    parts: Mapping[str, Any], targets: Sequence[str], row: Row, dims: Dims, ops: Ops[Any]
) -> dict[str, Any]:
    """The targets of one row, from all of its parts."""
    if row.op == "same":
        return dict(zip(targets, parts.values(), strict=True))
    if len(targets) > 1:
        ((name, whole),) = parts.items()
        return _split(name, whole, targets, row, dims, ops)
    return {targets[0]: _fuse(parts, row, dims, ops)}


def _split(
    name: str, whole: Any, targets: Sequence[str], row: Row, dims: Dims, ops: Ops[Any]
) -> dict[str, Any]:
    sizes = _rows_of_parts(row, len(targets), dims, _rows(whole, name), name)
    taken: list[list[Any]] = [[] for _ in targets]
    for at, part, start, stop in _segments(row, sizes, dims):
        taken[part].append(ops.rows(whole, at, at + stop - start))
    return {
        target: rows[0] if len(rows) == 1 else ops.join(rows)
        for target, rows in zip(targets, taken, strict=True)
    }


def _fuse(parts: Mapping[str, Any], row: Row, dims: Dims, ops: Ops[Any]) -> Any:
    names, tensors = list(parts), list(parts.values())
    sizes = _part_rows(row, len(parts), dims, _rows(tensors[0], names[0]), names[0])
    first = _kind(tensors[0])
    for (name, tensor), size in zip(parts.items(), sizes, strict=True):
        if _rows(tensor, name) != size:
            raise _wrong_rows(name, _rows(tensor, name), f"{size:,}")
        if _kind(tensor) != first:
            raise InputError(
                f"'{printable(names[0])}' is {first} and '{printable(name)}' is {_kind(tensor)}, "
                "but they are to become one tensor. Dtype and columns must be the same."
            )
    return ops.join(
        [
            tensors[part]
            if (start, stop) == (0, sizes[part])
            else ops.rows(tensors[part], start, stop)
            for _, part, start, stop in _segments(row, sizes, dims)
        ]
    )


def _rows(tensor: Any, name: str) -> int:
    if not len(tensor.shape):
        raise InputError(f"'{printable(name)}' is a single number; a matrix or vector is needed.")
    return int(tensor.shape[0])


def _kind(tensor: Any) -> str:
    columns = ", ".join(str(int(size)) for size in tensor.shape[1:])
    return f"{tensor.dtype} with columns [{columns}]"


def _segments(row: Row, sizes: Sequence[int], dims: Dims) -> Iterator[tuple[int, int, int, int]]:
    """The rows of the one tensor in order: where they begin, of which part they are which rows.

    Joined parts follow each other. Grouped ones (`InternLM2Attention`) alternate: for each
    key-value head the query heads that share it, then the key head, then the value head.
    """
    groups = dims.kv_heads or 1 if row.op == "grouped" else 1
    at = 0
    for group in range(groups):
        for part, size in enumerate(sizes):
            rows = size // groups
            yield at, part, group * rows, (group + 1) * rows
            at += rows


def _part_rows(row: Row, count: int, dims: Dims, guess: int, name: str) -> list[int]:
    """Rows of each part by the config, or as many as guessed where it does not say.

    Raises `InputError` if the config does not divide, or says nothing and a guess cannot be made.
    """
    if row.op != "grouped":
        stated = getattr(dims, row.part_rows) if row.part_rows else None
        return [guess if stated is None else stated] * count
    heads, kv_heads, head_dim = dims.heads, dims.kv_heads, dims.head_dim
    if heads is None or kv_heads is None or head_dim is None:
        raise InputError(
            f"'{printable(name)}': its rows are grouped by heads, so the config must say "
            "num_attention_heads, num_key_value_heads and hidden_size or head_dim."
        )
    if heads % kv_heads:
        raise InputError(
            f"'{printable(name)}': {heads} heads cannot be shared by {kv_heads} key-value heads."
        )
    return [heads * head_dim, kv_heads * head_dim, kv_heads * head_dim]


def _rows_of_parts(row: Row, count: int, dims: Dims, total: int, name: str) -> list[int]:
    """Rows of each part of a tensor of `total` rows; raises `InputError` if they do not fit."""
    sizes = _part_rows(row, count, dims, total // count, name)
    if sum(sizes) != total:
        equal = len(set(sizes)) == 1
        expected = f"{count} x {sizes[0]:,}" if equal else " + ".join(f"{n:,}" for n in sizes)
        raise _wrong_rows(name, total, expected)
    return sizes


def _wrong_rows(name: str, found: int, expected: str) -> InputError:
    return InputError(
        f"'{printable(name)}' has {found:,} rows; {expected} were expected. "
        "Is this the config of that checkpoint?"
    )


def _unpack(tensors: Mapping[str, Any], dims: Dims, ops: Ops[Any]) -> Mapping[str, Any]:
    """The like with packed experts one by one."""
    table = _table(dims.family, packed=True)
    ends = tuple(entry.hf[0].rpartition("}")[2] for entry in table.entries)
    if not any(name.endswith(ends) for name in tensors):
        return tensors
    out: dict[str, Any] = {}
    for name, tensor in tensors.items():
        match = _find(table, "hf", name) if name.endswith(ends) else None
        new = {name: tensor}
        if match is not None:
            entry, holes = table.entries[match[0]], match[2]
            experts = dims.experts or _rows(tensor, name)
            if len(tensor.shape) != 3 or tensor.shape[0] != experts:
                raise InputError(
                    f"'{printable(name)}' has the shape {[int(n) for n in tensor.shape]}; "
                    f"[{experts}, rows, columns] was expected, one matrix for each expert."
                )
            matrix = tensor.reshape((experts * int(tensor.shape[1]), int(tensor.shape[2])))
            targets = _expert_names(entry, holes, experts)
            new = _split(name, matrix, targets, entry.row, dims, ops)
        twice = next((key for key in new if key in out), None)
        if twice is not None:
            raise InputError(
                f"'{printable(twice)}' is there twice: by itself, and packed with other experts. "
                "Keep the files of one writer."
            )
        out |= new
    return out


def _expert_names(entry: _Entry, holes: Holes, experts: int) -> list[str]:
    """The names of all experts' tensors in the order in which they are packed."""
    return [name.format(*holes, e) for e in range(experts) for name in entry.custom]


def _complete(result: Converted[T], dims: Dims, side: str) -> dict[str, T]:
    """The tensors of a conversion that left nothing over; raises `InputError` otherwise."""
    table = _table(dims.family)
    layout = f"the {_TITLES[side]} layout of {dims.family}"
    lines = []
    if result.unexpected:
        lines.append(f"not in {layout} ({len(result.unexpected):,}):")
        for name, reason in itertools.islice(result.unexpected.items(), 5):
            near = _nearest(name, table, side) if reason == _UNKNOWN else []
            lines.append(f"  '{printable(name)}': {f'nearest: {listed(near)}' if near else reason}")
    if result.missing:
        more = " or more" if len(result.missing) == MAX_MISSING else ""
        lines.append(
            f"missing in {layout} ({len(result.missing):,}{more}): {listed(result.missing)}"
        )
        heads = {entry.names(side)[0] for entry in table.entries if entry.row.tied_to}
        if not heads.isdisjoint(result.missing):
            lines.append("Nothing ties the head to the embedding, and a head is never invented.")
    if not lines:
        return result.tensors
    if _has_lora(result.unexpected):
        lines.append("This is a LoRA-wrapped training checkpoint: merge its pairs first.")
    else:
        lines.append("Is the checkpoint complete, and is this its config?")
    raise InputError("\n".join(lines))


def _nearest(name: str, table: _Table, side: str) -> list[str]:
    """Names of the tables that are most like this one, with its own indexes."""
    name = flat_name(name) if side == "hf" else name
    holes = _open(name)[1]
    filled = (*holes, 0, 0)
    known = [known.format(*filled) for entry in table.entries for known in entry.names(side)]
    return nearest(name, known)


def _llm_keys(names: Iterable[str], layout: str) -> set[str]:
    """The names of the language model with their indexes taken out, LoRA left aside."""
    plain = (_plain(name) for name in names if ".lora_" not in name)
    flat = (_flat(name)[0] for name in plain) if layout == "hf" else plain
    return {_open(name)[0] for name in flat if name.startswith("language_model.")}


def _fits(keys: Collection[str], family: str, layout: str) -> bool:
    """Whether the table of a family has all names of the language model, and misses none."""
    table, packed = _table(family), _table(family, packed=True)
    known, unpacked = table.found[layout], packed.found["hf"]
    seen: set[str] = set()
    for key in keys:
        seen |= set(packed.entries[unpacked[key][0]].custom) if key in unpacked else {key}
    if not keys or not seen <= known.keys():
        return False
    switched: dict[str, set[bool]] = {}
    for entry in table.entries:
        row, mine = entry.row, [n for n in entry.names(layout) if n.startswith("language_model.")]
        if row.op == "drop" or row.layers or (row.tied_to and layout == "hf"):
            continue
        if row.only:
            switched.setdefault(row.only, set()).update(name in seen for name in mine)
        elif not seen.issuperset(mine):
            return False
    return all(len(states) < 2 for states in switched.values())


def _has_lora(names: Iterable[str]) -> bool:
    return any(".lora_" in name or ".base_layer." in name for name in names)
