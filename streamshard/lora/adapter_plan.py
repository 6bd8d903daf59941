"""An adapter's plan: its keys sorted and matched with the tensors of a base, all checks passed."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping
from dataclasses import replace
from functools import partial

from streamshard.errors import AdapterError, listed, printable
from streamshard.lora.adapter import Adapter, AdapterPlan, factors_of, no_sum, wanted_tensors
from streamshard.lora.adapter_checks import (
    check_biases,
    check_factors,
    check_flags,
    not_asked,
    unasked,
)
from streamshard.lora.beside import homes_beside, with_beside
from streamshard.lora.experts import Fused, parameter_names
from streamshard.lora.keys import BASE_LAYER, Keys, are_own_names, read_keys
from streamshard.lora.name_matching import Homes, OtherNames, Place, find_homes
from streamshard.lora.pattern_eras import ERAS
from streamshard.lora.selected import not_selected
from streamshard.lora.which_release import settled
from streamshard.tensor_names import is_of_tokens
from streamshard.tensors.comparing import equal_bytes
from streamshard.tensors.lazy import Lazy
from streamshard.tensors.workspace import Workspace

__all__ = ["plan_adapter"]


def plan_adapter(
    adapter: Adapter, base: Mapping[str, Lazy], work: Workspace, others: OtherNames
) -> AdapterPlan:
    """Read an adapter's keys and find their places; raises `AdapterError` for what does not fit."""
    bare = not are_own_names(adapter.tensors, base)
    keys = read_keys(adapter.tensors, adapter.where, adapter.name, bare=bare)
    own = keys.whole
    adapter, keys = with_beside(adapter, keys, work)
    settings, where = adapter.settings, adapter.where
    adapted = [name for name, module in keys.modules.items() if module.A]
    fused = Fused(base) if settings.target_parameters else None
    parameters = parameter_names(adapted, settings.target_parameters, where, fused)
    nested = [name for name in keys.modules if name.endswith(BASE_LAYER) and name not in parameters]
    if nested:
        raise AdapterError(
            f"{where}: '{printable(nested[0])}' is within another adapted layer, as fused parameters "
            "have it, but the config names no target_parameters there. Config and tensors are not "
            "of one adapter."
        )
    for one, other in keys.twins:
        if not equal_bytes(adapter.tensors[one], adapter.tensors[other], work):
            raise AdapterError(
                f"{where}: '{printable(one)}' and '{printable(other)}' are for the same tensor and "
                "differ. Save the adapter again, with bias='none' or without that module in "
                "modules_to_save."
            )
    plan = AdapterPlan(_of_its_release(adapter, keys, parameters), keys, parameters, homes={})
    asked = replace(plan, keys=replace(keys, whole=own))
    warnings = check_flags(asked, base, others.spelled, fused)
    plan = replace(plan, unasked=unasked(plan, own), warnings=tuple(warnings))
    magnitudes = [module.magnitude for module in keys.modules.values() if module.magnitude]
    if magnitudes and adapter.weight != 1:
        raise no_sum(adapter, magnitudes)
    check_factors(plan)
    homes = _homes(plan, base, others)
    found = replace(plan, homes=homes, warnings=(*plan.warnings, *not_selected(plan)))
    check_biases(found, base)
    biases = {
        f"{name}.bias": _bias_homes(found, name, base)
        for name, module in keys.modules.items()
        if module.bias
    }
    return replace(found, homes={**biases, **found.homes}) if biases else found


def _homes(plan: AdapterPlan, base: Mapping[str, Lazy], others: OtherNames) -> Homes:
    """The places of all tensors: by one way to read the names, or else file by file."""
    # The factors of fused experts may have in and out the other way round.
    ways = [wanted_tensors(plan, turned=turned) for turned in {False, bool(plan.parameters)}]
    problem = None
    for find in (find_homes, partial(homes_beside, plan)) if plan.adapter.beside else (find_homes,):
        for wanted in ways:
            try:
                return find(
                    base, wanted, plan.adapter.where, others, partial(_could_fit, plan, base)
                )
            except AdapterError as error:
                problem = error
    if plan.unasked and not plan.adapter.beside:
        raise not_asked(plan, plan.unasked) from problem
    raise problem or AdapterError(f"{plan.adapter.where}: has no tensors.")


def _could_fit(plan: AdapterPlan, base: Mapping[str, Lazy], homes: Homes) -> bool:
    """Whether the shapes of whole tensors allow these homes, where names allow others, too."""
    tensors = plan.adapter.tensors
    sizes = {name: math.prod(tensors[key].shape) for name, key in plan.keys.whole.items()}
    for name, module in plan.keys.modules.items():
        if module.A and name not in plan.parameters:
            A, B = factors_of(plan, name)
            sizes.setdefault(plan.weight(name), B.rows * A.columns)
    return all(
        len(places) != 1
        or not places[0].whole
        or name not in sizes
        or is_of_tokens(name)
        or math.prod(base[places[0].target].shape) == sizes[name]
        for name, places in homes.items()
    )


def _of_its_release(adapter: Adapter, keys: Keys, parameters: Collection[str]) -> Adapter:
    """The adapter, its patterns read as the release did that trained these ranks."""
    settings = adapter.settings
    if parameters and settings.version is None:  # nobody had these before
        settings = replace(settings, version=ERAS[0])
    if not (settings.rank_pattern or settings.alpha_pattern):
        return replace(adapter, settings=settings)
    ranks = {
        name: adapter.tensors[module.A].shape[0]
        for name, module in keys.modules.items()
        if module.A and name not in parameters and adapter.tensors[module.A].shape
    }
    return replace(adapter, settings=settled(settings, ranks, adapter.where))


def _bias_homes(plan: AdapterPlan, module: str, base: Mapping[str, Lazy]) -> list[Place]:
    """Where the bias of a module's lora_B goes: beside the weight that its pair updates."""
    homes = [
        replace(place, target=f"{place.target.removesuffix('.weight')}.bias")
        for place in plan.homes[plan.weight(module)]
    ]
    lacking = [place.target for place in homes if place.target not in base]
    if lacking:
        raise AdapterError(
            f"{plan.adapter.where}: lora_bias is true, but the base has no {listed(lacking)} to which "
            f"'{printable(plan.keys.modules[module].bias)}' could be added, and its model has no place "
            "for one. PEFT cannot merge this either: train without lora_bias, or only layers that have "
            "a bias."
        )
    return homes
