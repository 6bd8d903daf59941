"""Weights that a trainer saved beside an adapter: as more of the whole tensors that it has.

Each tensor finds its place by the rules for the adapter's own names, and takes the place of what the
base has. What only repeats the adapter or the base changes nothing.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import fields, replace

from streamshard.errors import AdapterError, printable
from streamshard.lora.adapter import Adapter, AdapterPlan
from streamshard.lora.keys import Keys, Module, read_keys
from streamshard.lora.name_matching import Homes, OtherNames, Wanted, find_homes, refuse_overlap
from streamshard.tensor_names import factors_among, is_of_tokens
from streamshard.tensors.comparing import equal_bytes
from streamshard.tensors.lazy import Lazy
from streamshard.tensors.workspace import Workspace

__all__ = ["check_beside", "homes_beside", "told_of", "with_beside"]


def with_beside(adapter: Adapter, keys: Keys, work: Workspace) -> tuple[Adapter, Keys]:
    """The adapter and its keys, with those of the files that lie beside it.

    Keys of those begin with the name of their file. Raises `AdapterError` for pairs that are not the
    adapter's own, and for values that differ from the adapter's own for the same tensor.
    """
    if not adapter.beside:
        return adapter, keys
    tensors, whole = dict(adapter.tensors), dict(keys.whole)
    for file, content in adapter.beside.items():
        own = {
            key: tensor
            for key, tensor in content.items()
            if key not in adapter.tensors or not equal_bytes(adapter.tensors[key], tensor, work)
        }
        try:
            found = read_keys(own, file, adapter.name if factors_among(own) else None)
        except AdapterError as error:
            raise _unplaced(file, content, str(error)) from error
        for name, module in found.modules.items():
            _check_repeats(adapter, keys.modules.get(name, Module()), module, file, work)
        for name, key in found.whole.items():
            before = whole.get(name)
            if before is None:
                label = f"{file}: {key}"
                whole[name], tensors[label] = label, own[key]
            elif not equal_bytes(tensors[before], own[key], work):
                raise _unplaced(
                    file,
                    content,
                    f"'{printable(key)}' has other values than '{printable(before)}'.",
                )
    return replace(adapter, tensors=tensors), replace(keys, whole=whole)


def _check_repeats(
    adapter: Adapter, module: Module, other: Module, file: str, work: Workspace
) -> None:
    """Refuse parts of a LoRA module that are not those which the adapter has."""
    own = adapter.beside[file]
    for part in fields(Module):
        key, mine = getattr(other, part.name), getattr(module, part.name)
        if not isinstance(key, str) or not key:
            continue
        if not mine or not equal_bytes(adapter.tensors[mine], own[key], work):
            raise _unplaced(
                file,
                own,
                f"'{printable(key)}' is part of a LoRA update that {adapter.where} does not have.",
            )


def homes_beside(
    plan: AdapterPlan,
    base: Mapping[str, Lazy],
    wanted: Mapping[str, Wanted],
    where: str,
    others: OtherNames,
    fits: Callable[[Homes], bool],
) -> Homes:
    """The places of everything, where the names of the files do not fit in one way: file by file."""
    origin = {name: _file_of(plan.adapter, key) for name, key in plan.keys.whole.items()}
    homes = find_homes(
        base,
        {n: w for n, w in wanted.items() if origin.get(n) is None},
        where,
        others,
        fits,
    )
    for file, tensors in plan.adapter.beside.items():
        own = {n: w for n, w in wanted.items() if origin.get(n) == file}
        try:
            homes |= find_homes(base, own, file, others, fits) if own else {}
        except AdapterError as error:
            raise _unplaced(file, tensors, str(error)) from error
    refuse_overlap(homes, where)
    return homes


def check_beside(plan: AdapterPlan, key: str, target: str) -> None:
    """Refuse other values for a weight that the adapter's pairs update, which were trained on it.

    Such a file is of another base, or has the updates in it already. Tables of tokens are saved with
    their pairs.
    """
    file = _file_of(plan.adapter, key)
    if file is None or is_of_tokens(target):
        return
    adapted = {
        place.target
        for name, module in plan.keys.modules.items()
        if module.A
        for place in plan.homes[plan.weight(name)]
    }
    if target in adapted:
        raise _unplaced(
            file,
            plan.adapter.beside[file],
            f"of '{printable(target)}' it has other values than the base, and the adapter an update: it "
            "may be of another base, or have the update in it already.",
        )


def told_of(adapter: Adapter, keys: Iterable[str]) -> list[str]:
    """Warnings that values of such files, by their `keys`, took the place of the base's."""
    counts = Counter(file for key in keys if (file := _file_of(adapter, key)) is not None)
    return [
        f"{file}: lies beside the adapter, and {count:,} of its {len(adapter.beside[file]):,} tensors "
        "took the place of what the base has"
        for file, count in counts.items()
    ]


def _file_of(adapter: Adapter, key: str) -> str | None:
    """The file beside an adapter that a key is of; None if it is the adapter's own."""
    file, mark, _ = key.rpartition(": ")
    return file if mark and file in adapter.beside else None


def _unplaced(file: str, tensors: Mapping[str, Lazy], problem: str) -> AdapterError:
    count = f"{len(tensors):,} {'tensor' if len(tensors) == 1 else 'tensors'}"
    return AdapterError(
        f"{file}: lies beside the adapter and has {count} that may have been trained with it, but not "
        f"all of that can be merged: {problem} Nothing is left out silently: remove the file if it is no "
        "part of the adapter, or merge it with the tool that trained it."
    )
