"""What is added to values of the base: pairs on layers, embeddings, convolutions and fused experts."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import replace
from itertools import pairwise

import numpy as np

from streamshard.errors import AdapterError, listed, printable
from streamshard.lora.adapter import (
    Adapter,
    AdapterPlan,
    check_target,
    factors_of,
    largest,
    misfit,
    pattern_key,
)
from streamshard.lora.conv1d import Linear, stored_in_out
from streamshard.lora.experts import Stack, expert_updates, stacked_as
from streamshard.lora.keys import Module
from streamshard.lora.replacements import Replacement
from streamshard.tensors.constructors import add_low_rank, with_magnitude
from streamshard.tensors.joined import concat
from streamshard.tensors.lazy import Array, Lazy
from streamshard.tensors.low_rank import LowRank, Transposed
from streamshard.tensors.workspace import Workspace
from streamshard.values import frozen

__all__ = ["Update", "Updates", "check_company", "updated", "updates_of"]


@frozen
class Update:
    """A low-rank update of rows of a target, seen as a matrix of `height` rows.

    With `magnitude`, one number for each row of the update or (`by_row` False) for each column of
    the target, it is DoRA's.
    """

    start: int
    term: LowRank
    height: int
    adapter: Adapter
    magnitude: Lazy | None = None
    by_row: bool = True

    @property
    def stop(self) -> int:
        return self.start + self.term.stop - self.term.start

    @property
    def unweighted(self) -> Update:
        """The like as the adapter has it: with weight 1."""
        return replace(self, term=replace(self.term, weight=1.0))


@frozen
class Updates:
    """What the pairs of an adapter add, by target; `idle` are modules without effect, and why."""

    found: Sequence[tuple[str, Update]]
    idle: Mapping[str, str]
    pairs: int
    warnings: Sequence[str]
    scalings: Mapping[str, int]
    """How many pairs have which scale, as it is shown."""
    ranks: Mapping[int, int]
    """How many have which rank."""

    @property
    def causes(self) -> str:
        """Why the idle ones have no effect."""
        counts = Counter(self.idle.values())
        return " and ".join(f"{cause} ({n:,} of {self.pairs:,})" for cause, n in counts.items())


def updates_of(plan: AdapterPlan, tensors: Mapping[str, Lazy], work: Workspace) -> Updates:
    """What the pairs of an adapter add to which target; exact zeros are left out."""
    adapter = plan.adapter
    turned, scalings, ranks = _turned(plan, tensors), Counter[str](), Counter[int]()
    found: list[tuple[str, Update]] = []
    idle, scaled = {}, []
    weight = adapter.weight
    for name, module in plan.keys.modules.items():
        if not module.A:
            continue
        scale = adapter.settings.scaling(pattern_key(plan, name))
        scalings[f"{scale:g}"] += 1
        ranks[adapter.settings.rank(pattern_key(plan, name))] += 1
        # All factors are read in any case: a zero must not hide a NaN.
        peaks = {key: largest(adapter, key, work) for key in filter(None, _of_pair(module))}
        if name in plan.parameters:
            new = _of_experts(plan, name, scale, tensors, turned=turned[name])
        else:
            new = _of_module(plan, name, module, scale, tensors, turned=turned[name])
        cause = _no_effect(adapter, scale, *(peaks[key] for key in (module.A, module.B)))
        if cause and module.magnitude:
            scaled.append(name)
        elif cause:
            new = []
        if module.bias and scale and weight and peaks[module.bias]:
            new += _of_bias(plan, name, module, scale, tensors)
        if cause and not new:
            idle[name] = cause
        # The product of weight and scale is exact: they stay apart.
        if weight != 1:
            new = [(n, replace(u, term=replace(u.term, weight=weight))) for n, u in new]
        found += new
    warnings = []
    if scaled:
        warnings.append(
            f"{adapter.where}: of {listed(scaled, 3)} only the DoRA magnitudes have an effect: the "
            "update itself is exactly zero"
        )
    pairs = scalings.total()
    made = Updates(found, idle, pairs, warnings, scalings, ranks)
    if idle and found:
        warnings.append(
            f"{adapter.where}: {len(idle)} of {pairs} updates are exactly zero and leave "
            f"their weights as they are, since {made.causes}: {listed(idle, 3)}"
        )
    return made


def _of_pair(module: Module) -> tuple[str, ...]:
    return module.A, module.B, module.magnitude, module.bias


def _no_effect(adapter: Adapter, scale: float, a: float, b: float) -> str:
    """Why a pair changes nothing, "" if it does something; `a` and `b` are its largest values."""
    if not adapter.weight:
        return "its --weight is 0"
    if not scale:
        return "lora_alpha is 0"
    return "" if a and b else "lora_A is zero" if b else "lora_B is zero"


def _turned(plan: AdapterPlan, tensors: Mapping[str, Lazy]) -> dict[str, bool]:
    """Whether the update of each module is the transpose of `B @ A`."""
    stacks = {
        name: (_stack(plan, name, tensors), *factors_of(plan, name)) for name in plan.parameters
    }
    found = stacked_as(stacks, plan.adapter.where)
    linear = {}
    for name, module in plan.keys.modules.items():
        if module.A and name not in found:
            A, B = factors_of(plan, name)
            first, *others = plan.homes[plan.weight(name)]
            alone = first.whole and not others and not module.is_embedding
            found[name] = module.is_embedding or first.turned
            if alone and len(tensors[first.target].shape) == 2:
                linear[name] = Linear(tensors[first.target].shape, B.rows, A.columns)
    says = plan.adapter.settings.fan_in_fan_out
    return found | stored_in_out(linear, tensors, plan.adapter.where, says=says)


def _of_module(
    plan: AdapterPlan,
    name: str,
    module: Module,
    scale: float,
    tensors: Mapping[str, Lazy],
    *,
    turned: bool,
) -> list[tuple[str, Update]]:
    """The update of a linear layer, a convolution or an embedding."""
    A, B = factors_of(plan, name)
    if turned:
        A, B = Transposed(B), Transposed(A)
    magnitude = plan.adapter.tensors[module.magnitude] if module.magnitude else None
    if magnitude is not None:
        magnitude = magnitude.reshape((math.prod(magnitude.shape),))
        if magnitude.rows != (A.columns if turned else B.rows):
            raise AdapterError(
                f"{plan.adapter.where}: '{printable(module.magnitude)}' has {magnitude.rows} "
                f"numbers; {A.columns if turned else B.rows} were expected, one for each output."
            )
    whole = LowRank(A, B, scale, 0, B.rows)
    places = plan.homes[plan.weight(name)]
    found = []
    for place in places:
        target = tensors[place.target]
        stack = len(target.shape) == 3 and not place.whole
        height = target.shape[0] * target.shape[1] if stack else target.rows
        alone = place.whole and len(places) == 1
        rows = B.rows if alone else place.rows
        end = place.start + rows
        fits = end == height if place.whole else end <= height
        convolves = len(plan.adapter.tensors[module.A].shape) == len(target.shape)
        flat = len(target.shape) == 2 or (place.whole and convolves) or stack
        if A.columns * height != math.prod(target.shape) or not fits or not flat:
            raise misfit(plan, module.A, [B.rows, A.columns], place.target, target)
        check_target(place.target, target)
        term = whole.take(place.source_start, place.source_start + rows)
        own = magnitude
        if own is not None and not turned:
            own = own.take(place.source_start, place.source_start + rows)
        update = Update(place.start, term, height, plan.adapter, own, by_row=not turned)
        found.append((place.target, update))
    return found


def _of_bias(
    plan: AdapterPlan, name: str, module: Module, scale: float, tensors: Mapping[str, Lazy]
) -> list[tuple[str, Update]]:
    """The bias of lora_B, which goes to the bias of the layer: `b + s * b_B`."""
    bias = plan.adapter.tensors[module.bias]
    one = Array(np.ones(1, np.float32).view(np.uint8), (1, 1), "F32")
    found = []
    for place in plan.homes[f"{name}.bias"]:
        target = tensors[place.target]
        if len(target.shape) != 1 or place.start + place.rows > target.rows:
            raise misfit(plan, module.bias, list(bias.shape), place.target, target)
        check_target(place.target, target)
        term = LowRank(one, bias.reshape((bias.rows, 1)), scale, 0, bias.rows)
        term = term.take(place.source_start, place.source_start + place.rows)
        found.append((place.target, Update(place.start, term, target.rows, plan.adapter)))
    return found


def _of_experts(
    plan: AdapterPlan,
    name: str,
    scale: float,
    tensors: Mapping[str, Lazy],
    *,
    turned: bool,
) -> list[tuple[str, Update]]:
    """The updates of the experts of a fused parameter, fused or one by one in the base."""
    A, B = factors_of(plan, name)
    stack = _stack(plan, name, tensors)
    order = plan.adapter.expert_order
    terms = expert_updates(stack, A, B, scale, turned=turned, order=order)
    found = []
    for place in plan.homes[plan.weight(name)]:
        target = tensors[place.target]
        check_target(place.target, target)
        if len(target.shape) == 3 or stack.experts == 1:
            height = stack.experts * stack.rows
            found += [
                (place.target, Update(number * stack.rows, term, height, plan.adapter))
                for number, term in enumerate(terms)
            ]
            continue
        number, first = divmod(place.source_start, stack.rows)
        term = terms[number].take(first, first + place.rows)
        found.append((place.target, Update(place.start, term, target.rows, plan.adapter)))
    return found


def _stack(plan: AdapterPlan, name: str, tensors: Mapping[str, Lazy]) -> Stack:
    """The shape of a fused parameter, as the base has it or would have it."""
    A, _ = factors_of(plan, name)
    places = plan.homes[plan.weight(name)]
    first = tensors[places[0].target]
    rank = plan.adapter.settings.rank(pattern_key(plan, name))
    if len(places) == 1 and len(first.shape) in (2, 3):
        stack = Stack(first.shape[0] if len(first.shape) == 3 else 1, *first.shape[-2:])
        if A.rows != stack.experts * rank:
            raise AdapterError(
                f"{plan.adapter.where}: '{printable(plan.keys.modules[name].A)}' has {A.rows} rows, but "
                f"{stack.experts} experts of rank {rank}, as adapter_config.json says, have "
                f"{stack.experts * rank}. Config and tensors are not of one adapter."
            )
        return stack
    experts = A.rows // rank
    rows = sum(place.rows for place in places)
    same = all(len(tensors[p.target].shape) == 2 for p in places) and rows % experts == 0
    if not same or any(tensors[p.target].columns != first.columns for p in places):
        raise misfit(plan, plan.keys.modules[name].A, list(A.shape), places[0].target, first)
    return Stack(experts, rows // experts, first.columns)


def check_company(
    name: str, updates: Sequence[Update], replacements: Sequence[Replacement]
) -> None:
    """Refuse what several adapters do to one tensor where their sum means nothing."""
    for one in updates:
        others = {
            other.adapter.where
            for other in updates
            if other.adapter is not one.adapter
            and other.start < one.stop
            and one.start < other.stop
        }
        if one.magnitude is not None and others:
            raise AdapterError(
                f"{one.adapter.where}: is DoRA, and {listed(sorted(others))} also changes "
                f"'{printable(name)}'. DoRA rescales what the other one adds: merge one after the "
                "other was trained on top of it, or only one of them."
            )
        foreign = [r for r in replacements if r.target == name and r.adapter is not one.adapter]
        if foreign:
            raise AdapterError(
                f"{one.adapter.where}: adds an update to '{printable(name)}', for which "
                f"{foreign[0].adapter.where} has values of its own. What both together mean is not "
                "defined: merge only one of them."
            )


def updated(tensor: Lazy, updates: Sequence[Update]) -> Lazy:
    """Apply updates of some rows each; rows without one keep their bytes."""
    height = updates[0].height
    matrix = tensor.reshape((height, math.prod(tensor.shape) // max(height, 1)))
    ends = {at for update in updates for at in (update.start, update.stop)}
    parts = []
    for low, high in pairwise(sorted({0, height, *ends})):
        own = [u for u in updates if u.start <= low and high <= u.stop]
        part = matrix.take(low, high)
        if own and own[0].magnitude is not None:
            term = own[0].term.take(low - own[0].start, high - own[0].start)
            magnitude = own[0].magnitude
            if own[0].by_row:
                magnitude = magnitude.take(low - own[0].start, high - own[0].start)
            part = with_magnitude(part, term, magnitude, by_row=own[0].by_row)
        elif own:
            part = add_low_rank(part, [u.term.take(low - u.start, high - u.start) for u in own])
        parts.append(part)
    return concat(parts).reshape(tensor.shape)
