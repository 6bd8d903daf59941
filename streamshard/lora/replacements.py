"""What takes the place of values of the base: modules saved whole, trained biases, token rows."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import pairwise

from streamshard.errors import AdapterError, InputError, listed, printable
from streamshard.lora.adapter import Adapter, AdapterPlan, largest, no_sum
from streamshard.lora.adapter_checks import not_asked
from streamshard.lora.beside import check_beside, told_of
from streamshard.lora.keys import BASE_LAYER
from streamshard.lora.name_matching import Place
from streamshard.tensor_names import is_of_tokens
from streamshard.tensors.comparing import equal_bytes
from streamshard.tensors.constructors import cast
from streamshard.tensors.dtypes import FLOATS
from streamshard.tensors.joined import concat
from streamshard.tensors.lazy import Lazy
from streamshard.tensors.workspace import Workspace
from streamshard.values import frozen

__all__ = ["Replacement", "Replacements", "replaced_tensors", "replacements_of"]


@frozen
class Replacement:
    """Rows that take the place of rows of a target.

    `is_base` says that they are the weight beneath a pair or token rows, and not a copy of its own.
    """

    adapter: Adapter
    target: str
    start: int
    rows: Lazy
    whole: bool = False
    is_tokens: bool = False
    is_base: bool = False


@frozen
class Replacements:
    """What an adapter replaces, its keys that only repeat what the base has, and warnings."""

    found: Sequence[Replacement]
    idle: Sequence[str]
    warnings: Sequence[str]


def replacements_of(plan: AdapterPlan, base: Mapping[str, Lazy], work: Workspace) -> Replacements:
    """Whole tensors and token rows, in the dtype of what they replace.

    PEFT saves the weight of an embedding or head beside its pair, trained or not: a tensor with the
    values of the base is inert.
    """
    adapter, tensors = plan.adapter, plan.adapter.tensors
    found: list[Replacement] = []
    rounded, replacing, idle = [], [], []
    for name, key in plan.keys.whole.items():
        tensor = tensors[key]
        if tensor.dtype in FLOATS:
            largest(adapter, key, work)
        count = len(found)
        for place in plan.homes[name]:
            rows = tensor
            if tensor.shape:
                rows = tensor.take(place.source_start, place.source_start + place.rows)
            target = base[place.target]
            _check_replacement(adapter, key, rows, target, place)
            if _is_there(rows, target, place, work):
                continue
            if key in plan.unasked:
                raise not_asked(plan, [key])
            check_beside(plan, key, place.target)
            if tensor.dtype != target.dtype:
                rounded.append(place.target)
            rows = cast(rows, target.dtype)
            is_base = BASE_LAYER in key
            found.append(
                Replacement(
                    adapter, place.target, place.start, rows, whole=place.whole, is_base=is_base
                )
            )
        if len(found) == count:
            idle.append(key)
        else:
            replacing.append(key)
    for name, module in plan.keys.modules.items():
        if module.tokens:
            largest(adapter, module.tokens, work)
            replacing.append(module.tokens)
            (place,) = plan.homes[plan.weight(name)]
            table = base[place.target]
            for earlier in found:
                if earlier.whole and earlier.target == place.target:
                    table = earlier.rows  # resized, and saved beside its rows
            found += _token_rows(plan, name, tensors[module.tokens], place.target, table)
            if tensors[module.tokens].dtype != base[place.target].dtype:
                rounded.append(place.target)
    if replacing and adapter.weight != 1:
        raise no_sum(adapter, replacing)
    warnings = [
        f"{adapter.where}: values for {listed(rounded, 3)} are saved in another dtype than the "
        "base's and are rounded to it (--dtype keeps more)"
    ]
    told = told_of(adapter, replacing)
    return Replacements(found, idle, [*told, *(warnings if rounded else [])])


def _is_there(rows: Lazy, target: Lazy, place: Place, work: Workspace) -> bool:
    """Whether a target has the values of `rows` already."""
    if place.whole and rows.shape != target.shape:
        return False
    if not rows.shape:
        return equal_bytes(rows, target, work)
    before = target.take(place.start, place.start + rows.shape[0])
    if rows.dtype != before.dtype:
        rows, before = cast(rows, "F32"), cast(before, "F32")
    return equal_bytes(rows, before, work)


def _check_replacement(adapter: Adapter, key: str, rows: Lazy, target: Lazy, place: Place) -> None:
    grows = place.whole and is_of_tokens(place.target)
    fits = rows.shape == target.shape if place.whole else rows.shape[1:] == target.shape[1:]
    if not fits and not (grows and rows.shape[1:] == target.shape[1:]):
        raise AdapterError(
            f"{adapter.where}: '{printable(key)}' is {list(rows.shape)}, but base tensor "
            f"'{printable(place.target)}' is {list(target.shape)}. The adapter belongs to another "
            "model."
        )
    if rows.dtype == target.dtype:
        return
    if rows.dtype not in FLOATS:
        raise AdapterError(
            f"{adapter.where}: '{printable(key)}' is {rows.dtype}, but base tensor "
            f"'{printable(place.target)}' is {target.dtype}. The adapter belongs to another model."
        )
    if target.dtype not in FLOATS:
        raise InputError(
            f"base tensor '{printable(place.target)}' is {target.dtype}; one of "
            f"{', '.join(FLOATS)} was expected. Use the unquantized checkpoint."
        )


def _token_rows(
    plan: AdapterPlan, module: str, rows: Lazy, target: str, W: Lazy
) -> list[Replacement]:
    """Trained rows, neighbours together (PEFT `TrainableTokensLayer`)."""
    adapter, stated = plan.adapter, plan.adapter.settings.token_indices
    named = [i for n, i in stated.items() if n and (module == n or module.endswith(f".{n}"))]
    indices = named[0] if named else stated.get("")
    if indices is None or len(indices) != rows.rows or len(named) > 1:
        raise AdapterError(
            f"{adapter.where}: '{printable(module)}' has {rows.rows} trained token rows, but the config "
            f"names {'none' if indices is None else len(indices)} for it. Config and tensors are "
            "not of one adapter."
        )
    if rows.shape[1:] != W.shape[1:] or max(indices) >= W.rows:
        raise AdapterError(
            f"{adapter.where}: trained rows of {rows.columns} columns for tokens up to {max(indices):,} "
            f"do not fit base tensor '{printable(target)}' of {list(W.shape)}. Was the vocabulary "
            "resized before the training? Give the resized base."
        )
    found: list[Replacement] = []
    first = 0
    for at in range(1, len(indices) + 1):
        if at == len(indices) or indices[at] != indices[at - 1] + 1:
            part = cast(rows.take(first, at), W.dtype)
            found.append(Replacement(adapter, target, indices[first], part, is_tokens=True))
            first = at
    return found


def replaced_tensors(
    base: Mapping[str, Lazy], replacements: Sequence[Replacement]
) -> dict[str, Lazy]:
    """The tensors that replacements are of, with these; each row may have one."""
    found: dict[str, Lazy] = {}
    by_target: dict[str, list[Replacement]] = {}
    for replacement in replacements:
        by_target.setdefault(replacement.target, []).append(replacement)
    for target, own in by_target.items():
        own.sort(key=lambda r: (not r.whole, r.start))
        _check_alone(target, own)
        table = own.pop(0) if own[0].whole else None
        tensor = base[target] if table is None else table.rows
        if own:
            parts, at = [], 0
            for replacement in own:
                parts += [tensor.take(at, replacement.start), replacement.rows]
                at = replacement.start + replacement.rows.rows
            parts.append(tensor.take(at, tensor.shape[0]))
            tensor = concat([part for part in parts if part.shape[0]])
        found[target] = tensor
    return found


def _check_alone(target: str, own: Sequence[Replacement]) -> None:
    """Refuse two values for a row; rows of tokens may lie over a table of the same adapter."""
    for one, other in pairwise(own):
        over = one.whole and not other.whole and other.is_tokens
        if over and all(one.adapter is r.adapter for r in own):
            continue
        if one.start + one.rows.rows > other.start or one.whole or other.whole:
            files = dict.fromkeys([one.adapter.where, other.adapter.where])
            whose = "both bring" if len(files) > 1 else "two of its tensors bring"
            raise AdapterError(
                f"{' and '.join(files)}: {whose} values of their own for "
                f"'{printable(target)}' (modules_to_save, biases or token rows). Only one of them "
                "can hold: merge one adapter, or remove these tensors from the other."
            )
