"""Whether an adapter is for a model of as many layers as the base has."""

from __future__ import annotations

import re
from collections.abc import Iterable

from streamshard.errors import AdapterError, listed, printable
from streamshard.lora.adapter import AdapterPlan
from streamshard.lora.selection import with_number

__all__ = ["check_depth"]


def check_depth(plan: AdapterPlan, base: Iterable[str]) -> list[str]:
    """Refuse an adapter for a model of fewer layers: it fits, and was trained on another base.

    PEFT adapts what the config selects: layers that are selected and have no updates were not there.
    Returns warnings.
    """
    there = _layers(base)
    here: dict[str, dict[int, str]] = {}
    """Names of the base with their layer's number taken out: number to the adapter's module."""
    for module, keys in plan.keys.modules.items():
        for place in plan.homes[plan.weight(module)] if keys.A else ():
            for name, numbers in _layers([place.target]).items():
                here.setdefault(name, {}).update(dict.fromkeys(numbers, module))
    lacking = {
        name: missing
        for name, modules in here.items()
        if (missing := sorted(there.get(name, set()) - modules.keys()))
        and _is_selected(plan, modules, missing[0])
    }
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
        return []
    names = [name.replace("{}", str(missing[0])) for name, missing in lacking.items()]
    return [
        f"{plan.adapter.where}: other layers have updates for the like of {listed(names, 3)}, "
        "which have none"
    ]


def _is_selected(plan: AdapterPlan, modules: dict[int, str], missing: int) -> bool:
    """Whether the config selects in the layer `missing` what it selected in others."""
    number, module = next(iter(modules.items()))
    selection = plan.adapter.settings.selection
    if module in plan.parameters:
        return selection.takes_parameter(with_number(plan.weight(module), number, missing))
    return selection.takes(with_number(module, number, missing))


def _layers(names: Iterable[str]) -> dict[str, set[int]]:
    """Names with their first number between dots taken out, to the numbers that occur."""
    found: dict[str, set[int]] = {}
    for name in names:
        index = re.search(r"(?:^|\.)(\d{1,6})\.", name)
        if index is not None:
            key = f"{name[: index.start(1)]}{{}}{name[index.end(1) :]}"
            found.setdefault(key, set()).add(int(index[1]))
    return found
