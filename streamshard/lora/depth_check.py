"""Whether an adapter is for a model of as many layers as the base has."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping

from streamshard.errors import AdapterError, listed, printable
from streamshard.lora.adapter import AdapterPlan
from streamshard.lora.selection import with_number
from streamshard.tensors.lazy import Lazy

__all__ = ["check_depth"]


def check_depth(plan: AdapterPlan, base: Mapping[str, Lazy]) -> list[str]:
    """Refuse an adapter for a model of fewer layers: it fits, and was trained on another base.

    PEFT adapts what the config selects: layers that are selected and have no updates were not there.
    Returns warnings.
    """
    # A pair is of a matrix: norms that are numbered like those (mlp1.0) have none anywhere.
    there = _layers(name for name, tensor in base.items() if len(tensor.shape) > 1)
    here: dict[str, dict[int, str]] = {}
    """Names of the base with their layer's number taken out: number to the adapter's module."""
    for module, keys in plan.keys.modules.items():
        for place in plan.homes[plan.weight(module)] if keys.A else ():
            for name, numbers in _layers([place.target]).items():
                here.setdefault(name, {}).update(dict.fromkeys(numbers, module))
    absent = {
        name: missing
        for name, modules in here.items()
        if (missing := sorted(there.get(name, set()) - modules.keys()))
    }
    lacking = {n: m for n, m in absent.items() if _is_selected(plan, here[n], m[0])}
    for name, missing in lacking.items():
        stack = name.partition(".{}.")[0]
        used = {n for other, modules in here.items() if other.startswith(stack) for n in modules}
        if not used.intersection(missing) and min(missing) > max(used):
            raise AdapterError(
                f"{plan.adapter.where}: has updates for the {len(used)} layers 0 to {max(used)} of "
                f"'{printable(stack)}', but the base has {len(used) + len(missing)} layers, and the "
                "config does not choose layers: the adapter was trained on another base. Give that "
                "one as --base."
            )
    if not lacking:
        return _first_layers(plan, here, absent, base)
    names = [name.replace("{}", str(missing[0])) for name, missing in lacking.items()]
    return [
        f"{plan.adapter.where}: other layers have updates for the like of {listed(names, 3)}, "
        "which have none"
    ]


def _first_layers(
    plan: AdapterPlan,
    here: dict[str, dict[int, str]],
    absent: dict[str, list[int]],
    base: Mapping[str, Lazy],
) -> list[str]:
    """Warnings of an adapter whose config lists all matrices of just the first layers, each in full.

    PEFT writes "all-linear" so for a model of few modules: nobody chose these layers.
    """
    targets = plan.adapter.settings.selection.targets
    stacks: dict[str, tuple[int, int]] = {}
    for name, missing in absent.items():
        used = here[name]
        listed_all = not isinstance(targets, str) and {*used.values()} <= (targets or set())
        if listed_all and {*used} == {*range(missing[0])}:
            stacks[name.partition(".{}.")[0]] = len(used), len(used) + len(missing)
    if not stacks:
        return []
    matrices = _layers(n for n, t in base.items() if len(t.shape) == 2 and n.endswith(".weight"))
    chosen = {name.partition(".{}.")[0] for name in matrices.keys() - absent.keys()}
    return [
        f"{plan.adapter.where}: has updates for the first {few} of the {all_} layers of "
        f"'{printable(stack)}', whose modules target_modules lists one by one: if these are not chosen, "
        "it was trained on another base"
        for stack, (few, all_) in stacks.items()
        if stack not in chosen
    ]


def _is_selected(plan: AdapterPlan, modules: dict[int, str], missing: int) -> bool:
    """Whether the config selects in the layer `missing` what it selected in others."""
    number, module = next(iter(modules.items()))
    selection = plan.adapter.settings.selection
    if module in plan.parameters:
        return selection.takes_parameter(with_number(plan.weight(module), number, missing))
    twin = with_number(module, number, missing)
    # A module without a number (linear_1) is no layer, though the base numbers it (mlp1.1).
    return twin != module and selection.takes(twin)


def _layers(names: Iterable[str]) -> dict[str, set[int]]:
    """Names with their first number between dots taken out, to the numbers that occur."""
    found: dict[str, set[int]] = {}
    for name in names:
        index = re.search(r"(?:^|\.)(\d{1,6})\.", name)
        if index is not None:
            key = f"{name[: index.start(1)]}{{}}{name[index.end(1) :]}"
            found.setdefault(key, set()).add(int(index[1]))
    return found
