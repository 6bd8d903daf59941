"""Carrying the tensors of InternVL checkpoints from one layout to the other.

The tables of `families` say what is called how; this module only reads them, in both directions:
a rule that joins three tensors read forwards splits them read backwards. Nothing here does more to
a tensor than taking rows and joining them, so whatever can do that, can be converted.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, Generic, overload

from streamshard.errors import InputError, listed, printable
from streamshard.internvl.detection import check_side
from streamshard.internvl.families import Layout, Rule
from streamshard.internvl.model_config import OTHER, Dims
from streamshard.internvl.relatives import relative_of
from streamshard.internvl.row_parts import (
    LAZY,
    Ops,
    T,
    fuse,
    part_rows,
    rows_of,
    rows_of_parts,
    segments,
    split,
    wrong_rows,
)
from streamshard.internvl.spelling import flat_names, spell
from streamshard.internvl.tables import (
    MAX_MISSING,
    TITLES,
    UNKNOWN,
    counted,
    expert_names,
    find,
    misplaced,
    missing_names,
    nearest_names,
    table_of,
    tied_twin,
)
from streamshard.tensor_names import is_wrapped
from streamshard.tensors.lazy import Lazy
from streamshard.values import frozen

__all__ = ["Converted", "Piece", "convert", "pieces", "to_custom", "to_hf"]


@frozen
class Converted(Generic[T]):
    """Tensors in a layout, and what kept the rest of the model from being carried there.

    `missing` are names of the source layout that the tables ask for and the source has not (at
    most `MAX_MISSING` of them), `unexpected` are names in the source that have no place in the
    tables, each with the reason. Whatever needs a missing tensor is left out: nothing is invented.
    `left` are all names in the source from which nothing was made, HF ones in the flat spelling.
    """

    tensors: dict[str, T]
    missing: tuple[str, ...]
    unexpected: dict[str, str]
    left: tuple[str, ...]


@frozen
class Piece:
    """Rows of a tensor in one layout that are rows of a tensor in the other."""

    target: str
    target_start: int
    source_start: int
    rows: int


@overload
def convert(
    tensors: Mapping[str, Lazy],
    dims: Dims,
    layout: Layout,
    *,
    side: Layout | None = ...,
    spelling: str = ...,
    given: Mapping[str, str] | None = ...,
) -> Converted[Lazy]: ...
@overload
def convert(
    tensors: Mapping[str, T],
    dims: Dims,
    layout: Layout,
    ops: Ops[T],
    *,
    side: Layout | None = ...,
    spelling: str = ...,
    given: Mapping[str, str] | None = ...,
) -> Converted[T]: ...
def convert(
    tensors: Mapping[str, Any],
    dims: Dims,
    layout: Layout,
    ops: Ops[Any] = LAZY,
    *,
    side: Layout | None = None,
    spelling: str = "flat",
    given: Mapping[str, str] | None = None,
) -> Converted[Any]:
    """Carry a checkpoint to `layout`, "custom" or "hf", as far as it goes.

    `side` is the layout it has, by default the other one; if it is the same, names are brought to the
    one spelling, packed experts taken apart and tied heads written out. The order is that of the
    source. HF names may come in any spelling and leave in `spelling`; `given` are those of `tensors` by
    their flat names (`flat_names`), if somebody has asked already. Raises `InputError` for the
    wrong layout, tensors that are there twice, and shapes and dtypes that do not fit; what is
    missing or unexpected is part of the answer.
    """
    side = side or OTHER[layout]
    if given is None:
        check_side(tensors, side)
        given = flat_names(tensors, side)
    named = {flat: tensors[name] for flat, name in given.items()}
    source = _unpack(named, dims, ops)
    table = table_of(dims.family)
    actual = counted(dims, source, table, side)
    missing = tuple(itertools.islice(missing_names(source, table, actual, side), MAX_MISSING))
    out: dict[str, Any] = {}
    unexpected: dict[str, str] = {}
    left: list[str] = []
    for name, tensor in source.items():
        match = find(table, side, name)
        if match is None:
            unexpected[name] = UNKNOWN
            continue
        entry, holes = table.entries[match[0]], match[2]
        reason = misplaced(entry, holes, actual)
        if reason is not None:
            unexpected[name] = reason
        elif entry.rule.op == "drop":
            left.append(name)
        elif entry.names(side) == entry.names(layout):
            out[name] = tensor  # under the same object, as large models have many names
        elif (made := entry.names(layout)[0].format(*holes)) not in out:
            names = [part.format(*holes) for part in entry.names(side)]
            if source.keys() >= set(names):
                targets = [made, *(n.format(*holes) for n in entry.names(layout)[1:])]
                out |= _carry({n: source[n] for n in names}, targets, entry.rule, dims, ops)
            else:
                left.append(name)
    for entry in table.entries:
        twin = tied_twin(table, entry, side) if dims.tied else None
        if twin is not None and twin in source and entry.names(side)[0] not in source:
            out[entry.names(layout)[0]] = source[twin]
    if layout == "hf" and spelling != "flat":
        out = {spell(name, spelling): tensor for name, tensor in out.items()}
    reasons = {given.get(name, name): reason for name, reason in unexpected.items()}
    return Converted(out, missing, reasons, (*unexpected, *left))


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


def pieces(name: str, rows: int, dims: Dims, layout: Layout) -> list[Piece]:
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
    side = OTHER[layout]
    plain = next(iter(flat_names([name], side)))
    packed = table_of(dims.family, packed=True)
    match = find(packed, "hf", plain)
    if match is not None:
        entry, holes = packed.entries[match[0]], match[2]
        if dims.experts is None:
            raise InputError(f"'{printable(name)}': the config must say num_experts.")
        targets = expert_names(entry, holes, dims.experts)
        sizes = rows_of_parts(entry.rule, len(targets), dims, rows, plain)
        return [
            replace(piece, source_start=start + piece.source_start)
            for target, start, size in zip(
                targets, itertools.accumulate(sizes, initial=0), sizes, strict=False
            )
            for piece in pieces(target, size, dims, layout)
        ]
    table = table_of(dims.family)
    match = find(table, side, plain)
    if match is None:
        # Not what it is like: that takes milliseconds, and many readings of an adapter's names end here.
        raise InputError(
            f"'{printable(name)}' is no tensor of the {TITLES[side]} layout of {dims.family}."
        )
    number, position, holes = match
    entry = table.entries[number]
    targets = [target.format(*holes) for target in entry.names(layout)]
    if entry.rule.op == "drop":
        return []
    if entry.rule.op == "same":
        return [Piece(targets[0], 0, 0, rows)]
    if len(targets) > 1:
        sizes = rows_of_parts(entry.rule, len(targets), dims, rows, plain)
        return [
            Piece(targets[part], start, at, stop - start)
            for at, part, start, stop in segments(entry.rule, sizes, dims)
        ]
    sizes = part_rows(entry.rule, len(entry.names(side)), dims, rows, plain)
    if sizes[position] != rows:
        raise wrong_rows(plain, rows, f"{sizes[position]:,}")
    return [
        Piece(targets[0], at, start, stop - start)
        for at, part, start, stop in segments(entry.rule, sizes, dims)
        if part == position
    ]


def _carry(
    parts: Mapping[str, Any], targets: Sequence[str], rule: Rule, dims: Dims, ops: Ops[Any]
) -> dict[str, Any]:
    """The targets of one rule, from all of its parts."""
    if rule.op == "same":
        return dict(zip(targets, parts.values(), strict=True))
    if len(targets) > 1:
        ((name, whole),) = parts.items()
        return split(name, whole, targets, rule, dims, ops)
    return {targets[0]: fuse(parts, rule, dims, ops)}


def _unpack(tensors: Mapping[str, Any], dims: Dims, ops: Ops[Any]) -> Mapping[str, Any]:
    """The like with packed experts one by one."""
    table = table_of(dims.family, packed=True)
    ends = tuple(entry.hf[0].rpartition("}")[2] for entry in table.entries)
    if not any(name.endswith(ends) for name in tensors):
        return tensors
    out: dict[str, Any] = {}
    for name, tensor in tensors.items():
        match = find(table, "hf", name) if name.endswith(ends) else None
        new = {name: tensor}
        if match is not None:
            entry, holes = table.entries[match[0]], match[2]
            experts = dims.experts or rows_of(tensor, name)
            if len(tensor.shape) != 3 or tensor.shape[0] != experts:
                raise InputError(
                    f"'{printable(name)}' has the shape {[int(n) for n in tensor.shape]}; "
                    f"[{experts}, rows, columns] was expected, one matrix for each expert."
                )
            matrix = tensor.reshape((experts * int(tensor.shape[1]), int(tensor.shape[2])))
            targets = expert_names(entry, holes, experts)
            new = split(name, matrix, targets, entry.rule, dims, ops)
        twice = next((key for key in new if key in out), None)
        if twice is not None:
            raise InputError(
                f"'{printable(twice)}' is there twice: by itself, and packed with other experts. "
                "Keep the files of one writer."
            )
        out |= new
    return out


def _complete(result: Converted[T], dims: Dims, side: Layout) -> dict[str, T]:
    """The tensors of a conversion that left nothing over; raises `InputError` otherwise."""
    table = table_of(dims.family)
    layout = f"the {TITLES[side]} layout of {dims.family}"
    lines = []
    if result.unexpected:
        lines.append(f"not in {layout} ({len(result.unexpected):,}):")
        for name, reason in itertools.islice(result.unexpected.items(), 5):
            near = nearest_names(name, table, side) if reason == UNKNOWN else []
            lines.append(f"  '{printable(name)}': {f'nearest: {listed(near)}' if near else reason}")
    if result.missing:
        more = " or more" if len(result.missing) == MAX_MISSING else ""
        lines.append(
            f"missing in {layout} ({len(result.missing):,}{more}): {listed(result.missing)}"
        )
        heads = {entry.names(side)[0] for entry in table.entries if entry.rule.tied_to}
        if not heads.isdisjoint(result.missing):
            lines.append("Nothing ties the head to the embedding, and a head is never invented.")
    if not lines:
        return result.tensors
    title = relative_of(result.unexpected, None)
    if title is not None:
        lines.append(f"These are names of {title}, which no class of the other layout has.")
    elif is_wrapped(result.unexpected):
        lines.append("This is a LoRA-wrapped training checkpoint: merge its pairs first.")
    else:
        lines.append("Is the checkpoint complete, and is this its config?")
    raise InputError("\n".join(lines))
