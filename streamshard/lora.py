"""Folding adapters into weights: what each tensor of an adapter changes, and the mapping that results.

`merge` is a function from a base mapping and adapters to a mapping. It reads the adapters'
values (to refuse what is not finite) but no weight of the base. Formulas: `W + s * B @ A`
(arXiv:2106.09685), `s` from `peft_config`; DoRA `m * V / |V|` (arXiv:2402.09353); whole tensors and
token rows replace what the base has.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

import numpy as np

from streamshard.adapter_keys import BASE_LAYER, Keys, Module, read_keys
from streamshard.arithmetic import FLOATS
from streamshard.errors import AdapterError, InputError, listed, printable
from streamshard.experts import Stack, expert_updates, parameter_names, stacked_as
from streamshard.matching import Carry, Place, Wanted, find_homes
from streamshard.peft_config import LoraSettings
from streamshard.tensors import Array, Lazy, Workspace, concat, equal_bytes, read_float32
from streamshard.updates import LowRank, Transposed, add_low_rank, cast, with_magnitude

__all__ = ["EMBEDDINGS", "HEADS", "Adapter", "Merged", "check_base", "merge"]

# Modules whose rows are tokens; PEFT may save them whole, and training may add rows.
EMBEDDINGS = ("embed_tokens", "tok_embeddings", "wte", "word_embeddings")
HEADS = ("lm_head", "output")


@dataclass(frozen=True, slots=True)
class Adapter:
    """One adapter: what messages call it, its settings, its tensors, and a factor on its scale.

    `name` chooses among several adapters in one file; `expert_order` is one of
    `experts.EXPERT_ORDERS`.
    """

    where: str
    settings: LoraSettings
    tensors: Mapping[str, Lazy]
    weight: float = 1.0
    name: str | None = None
    expert_order: str = "peft"


@dataclass(slots=True)
class Merged:
    """The new mapping, and what became of what.

    `updated` are the names of tensors that get an update, `replaced` of those that get other values
    in whole or in some rows. `untied` says that embedding and head were one and no longer are;
    `facts` are one dict an adapter for the report.
    """

    tensors: dict[str, Lazy]
    updated: list[str] = field(default_factory=list)
    replaced: list[str] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)
    untied: bool = False
    facts: list[dict[str, Any]] = field(default_factory=list)


_QUANTIZED = re.compile(
    r".*\.(?:qweight|qzeros|scales|g_idx|SCB|absmax|quant_state\..+|weight_scale(?:_inv)?|"
    r"weight_packed|weight_format|(?:.+_)?(?:blocks|scales))"
)


def check_base(base: Mapping[str, Lazy], config: Mapping[str, Any] | None) -> None:
    """Raise `InputError` if a checkpoint is quantized or already wrapped by LoRA."""
    if config is not None and config.get("quantization_config"):
        raise InputError(
            "config.json of the base has a quantization_config. An update cannot be added to "
            "quantized weights without a further loss: use the unquantized checkpoint."
        )
    quantized = [name for name in base if _QUANTIZED.fullmatch(name)]
    if quantized:
        raise InputError(
            f"the base is quantized: it has {listed(quantized, 3)}. An update cannot be added to "
            "quantized weights without a further loss: use the unquantized checkpoint."
        )
    wrapped = [name for name in base if ".lora_A." in name or ".lora_B." in name]
    if wrapped:
        raise InputError(
            f"the base is a LoRA-wrapped training checkpoint: it has {listed(wrapped, 3)}. Use the "
            "checkpoint that the training started from, or merge its own pairs: "
            "merge-lora CHECKPOINT --output O."
        )


@dataclass(frozen=True, slots=True)
class _Replacement:
    """Rows that take the place of rows of a target."""

    adapter: Adapter
    target: str
    start: int
    rows: Lazy
    whole: bool = False
    is_tokens: bool = False


@dataclass(frozen=True, slots=True)
class _Update:
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


@dataclass(slots=True)
class _Plan:
    """One adapter, its keys sorted, and the places of the tensors that they change."""

    adapter: Adapter
    keys: Keys
    parameters: dict[str, str]
    """Module to the fused parameter that it adapts."""
    homes: dict[str, list[Place]]

    def weight(self, module: str) -> str:
        """The tensor that a module's pair updates, as the adapter names it."""
        plain = re.sub(r"(?:\.base_layer)+$", "", module)
        return f"{plain}.{self.parameters.get(module, 'weight')}"


def merge(
    base: Mapping[str, Lazy],
    adapters: Sequence[Adapter],
    work: Workspace,
    carry: Carry | None = None,
    tie: tuple[str, str] | None = None,
) -> Merged:
    """Apply every tensor of every adapter to the weight it was trained on.

    Each tensor of an adapter is used exactly once. `carry` knows the names of another layout, for
    adapters that were trained there. `tie` are the names of embedding and head where these are one
    tensor, which the base may have once or twice. Raises `AdapterError` for what has no home, does
    not fit, is not finite, or changes nothing.
    """
    whole = dict(base)
    if tie is not None:
        whole.setdefault(tie[1], base[tie[0]])
    result = Merged(whole)
    plans = [_plan(adapter, whole, work, carry) for adapter in adapters]
    followed = [plan for plan in plans if tie is not None and _follows(plan, tie, work)]
    replacements = [r for plan in plans for r in _replacements(plan, whole, result, work)]
    _replace(result, replacements)
    updates: dict[str, list[_Update]] = {}
    for plan in plans:
        found = _updates(plan, result, work)
        if not found and not any(r.adapter is plan.adapter for r in replacements):
            raise AdapterError(
                f"{plan.adapter.where}: every update is exactly zero (lora_B is zero, or the weight "
                "is 0): the adapter was not trained, or was saved by a trainer that lost its values."
            )
        for target, update in found:
            if plan not in followed or tie is None or target != tie[1]:
                updates.setdefault(target, []).append(update)
        _check_depth(plan, base, result)
        result.facts.append(_facts(plan))
    for name, own in updates.items():
        _check_company(name, own, replacements)
        result.tensors[name] = _updated(result.tensors[name], own)
    result.updated = [name for name in result.tensors if name in updates]
    if tie is not None:
        _settle_tie(result, tie, replacements, work, follows=bool(followed))
        if tie[1] not in base and not result.untied:
            del result.tensors[tie[1]]
    return result


def _plan(
    adapter: Adapter, base: Mapping[str, Lazy], work: Workspace, carry: Carry | None
) -> _Plan:
    keys = read_keys(adapter.tensors, adapter.where, adapter.name)
    settings, where = adapter.settings, adapter.where
    adapted = [name for name, module in keys.modules.items() if module.A]
    parameters = parameter_names(adapted, settings.target_parameters, where)
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
    plan = _Plan(adapter, keys, parameters, {})
    _check_flags(plan)
    _check_weight(plan)
    _check_factors(plan)
    try:
        plan.homes = find_homes(base, _wanted(plan, turned=False), where, carry)
    except AdapterError:
        if not parameters:
            raise
        # The factors of fused experts may have in and out the other way round.
        plan.homes = find_homes(base, _wanted(plan, turned=True), where, carry)
    _check_biases(plan, base)
    return plan


def _check_biases(plan: _Plan, base: Mapping[str, Lazy]) -> None:
    """Refuse trained biases that the file lacks: of adapted layers, or of any if all were trained."""
    bias, whole = plan.adapter.settings.bias, plan.keys.whole
    lacking = []
    if bias == "all" and not any(name.endswith(".bias") for name in whole):
        lacking = [name for name in base if name.endswith(".bias")]
    elif bias == "lora_only":
        adapted = [
            name for name, m in plan.keys.modules.items() if m.A and f"{name}.bias" not in whole
        ]
        targets = {place.target for name in adapted for place in plan.homes[plan.weight(name)]}
        biases = {f"{target.removesuffix('.weight')}.bias" for target in targets}
        lacking = sorted(biases & base.keys())
    if lacking:
        raise _disagreement(plan, f"bias is '{bias}'", "biases", lacking, lacks=True)


def _wanted(plan: _Plan, *, turned: bool) -> dict[str, Wanted]:
    """The tensors that an adapter changes, by its own names."""
    tensors = plan.adapter.tensors
    wanted: dict[str, Wanted] = {}
    for name, module in plan.keys.modules.items():
        weight = plan.weight(name)
        if module.tokens:
            wanted[weight] = Wanted(1, module.tokens)
            continue
        A, B = tensors[module.A], tensors[module.B]
        rows = A.columns if turned or module.is_embedding else B.rows
        if name in plan.parameters:
            rows *= max(A.rows // plan.adapter.settings.rank(_pattern_key(plan, name)), 1)
        wanted[weight] = Wanted(rows, module.A)
        if module.bias:
            wanted[f"{name}.bias"] = Wanted(tensors[module.bias].rows, module.bias)
    for name, key in plan.keys.whole.items():
        wanted.setdefault(name, Wanted(tensors[key].rows, key))
    return wanted


def _pattern_key(plan: _Plan, module: str) -> str:
    """What rank_pattern and alpha_pattern are matched against."""
    return plan.weight(module) if module in plan.parameters else module


def _check_weight(plan: _Plan) -> None:
    """Refuse a weight on what is no sum."""
    keys = plan.keys
    fixed = [m.magnitude or m.tokens for m in keys.modules.values() if m.magnitude or m.tokens]
    fixed += keys.whole.values()
    if fixed and plan.adapter.weight != 1:
        raise AdapterError(
            f"{plan.adapter.where}: {listed(fixed, 3)} scale or replace what the base has, and are no "
            "update that --weight could scale. Merge this adapter with weight 1."
        )


def _check_flags(plan: _Plan) -> None:
    """Raise `AdapterError` where config and tensors say different things."""
    settings, keys = plan.adapter.settings, plan.keys
    pairs = {name: module for name, module in keys.modules.items() if module.A}
    plain = {name: module for name, module in pairs.items() if name not in plan.parameters}
    tokens = [name for name, module in keys.modules.items() if module.tokens]
    biases = [name for name in keys.whole if name.endswith(".bias")]
    saved = {
        entry: [name for name in keys.whole if _is_within(name, entry)]
        for entry in settings.modules_to_save
    }
    lost = [entry for entry, names in saved.items() if not names]
    for flag, on, what, having in (
        ("use_dora", settings.use_dora, "magnitudes", {n for n in plain if plain[n].magnitude}),
        ("lora_bias", settings.lora_bias, "biases of lora_B", {n for n in plain if plain[n].bias}),
    ):
        wrong = [
            module.A if on else module.magnitude or module.bias
            for name, module in plain.items()
            if (name in having) != on
        ]
        if wrong:
            raise _disagreement(plan, f"{flag} is {str(on).lower()}", what, wrong, lacks=on)
    impossible = ("use_dora", "lora_bias", "fan_in_fan_out")
    for flag in impossible if plan.parameters else ():
        if getattr(settings, flag):
            raise AdapterError(
                f"{plan.adapter.where}: {flag} is true, which PEFT does not have for fused parameters, "
                "but the file has pairs for them. Config and tensors are not of one adapter."
            )
    if lost:
        raise _disagreement(
            plan, f"modules_to_save has {listed(lost)}", "such tensors", [], lacks=True
        )
    if bool(settings.token_indices) != bool(tokens):
        on = bool(settings.token_indices)
        state = "has" if on else "has no"
        raise _disagreement(
            plan,
            f"the config {state} trainable_token_indices",
            "trained token rows",
            tokens,
            lacks=on,
        )
    if (
        settings.target_parameters
        and not plan.parameters
        and not any(
            plan.weight(name).endswith(target)
            for name in pairs
            for target in settings.target_parameters
        )
    ):
        raise _disagreement(
            plan,
            f"target_parameters has {listed(settings.target_parameters)}",
            "pairs for them",
            [],
            lacks=True,
        )
    allowed = {name for names in saved.values() for name in names}
    if settings.bias != "none":
        allowed |= set(biases)
    unasked = [k for n, k in keys.whole.items() if n not in allowed and not _is_of_tokens(n)]
    if unasked:
        raise _disagreement(
            plan,
            "neither modules_to_save nor bias of the config asks for them",
            "whole tensors",
            unasked,
            lacks=False,
        )


def _disagreement(
    plan: _Plan, config: str, what: str, names: Sequence[str], *, lacks: bool
) -> AdapterError:
    shown = f" ({listed(names, 3)})" if names else ""
    return AdapterError(
        f"{plan.adapter.where}: {config}, but the file {'lacks' if lacks else 'has'} {what}{shown}. "
        "Config and tensors are not of one adapter, or the file is incomplete: save the adapter "
        "again, or correct adapter_config.json if you know what was trained."
    )


def _is_within(tensor: str, entry: str) -> bool:
    """Whether a tensor is of a module that ends with `entry` (PEFT compares without a dot)."""
    parts = tensor.split(".")[:-1]
    return any(".".join(parts[: n + 1]).endswith(entry) for n in range(len(parts)))


def _is_of_tokens(tensor: str) -> bool:
    """Whether a tensor is the weight of an embedding or head, which PEFT may save unasked."""
    parts = tensor.split(".")
    return parts[-1] == "weight" and len(parts) > 1 and parts[-2] in (*EMBEDDINGS, *HEADS)


def _check_factors(plan: _Plan) -> None:
    """Raise `AdapterError` for factors of a wrong dtype, shape or rank."""
    adapter, tensors = plan.adapter, plan.adapter.tensors
    used = [
        k for m in plan.keys.modules.values() for k in (m.A, m.B, m.magnitude, m.bias, m.tokens)
    ]
    for key in filter(None, [*used, *plan.keys.whole.values()]):
        if tensors[key].dtype not in FLOATS:
            raise AdapterError(
                f"{adapter.where}: '{printable(key)}' is {tensors[key].dtype}; "
                f"one of {', '.join(FLOATS)} was expected. Save the adapter as float32."
            )
        if not tensors[key].nbytes:
            raise _partitioned(adapter, key)
    for name, module in plan.keys.modules.items():
        if not module.A:
            continue
        A, B = tensors[module.A], tensors[module.B]
        for key, factor in ((module.A, A), (module.B, B)):
            # Convolutions have a kernel in A, and a kernel of 1 in B.
            if len(factor.shape) < 2 or len(A.shape) != len(B.shape):
                raise _partitioned(adapter, key)
        rank, found = adapter.settings.rank(_pattern_key(plan, name)), A.shape[0]
        fits = found == B.shape[1] and math.prod(B.shape[2:]) == 1
        fits = fits and (found % rank == 0 if name in plan.parameters else found == rank)
        if not fits:
            raise AdapterError(
                f"{adapter.where}: '{printable(module.A)}' has rank {found} and its lora_B "
                f"{B.shape[1]}, but adapter_config.json says {rank}. Config and tensors are not of one "
                "adapter, or it is for a grouped convolution, which PEFT cannot merge either."
            )


def _partitioned(adapter: Adapter, key: str) -> AdapterError:
    return AdapterError(
        f"{adapter.where}: '{printable(key)}' has shape {list(adapter.tensors[key].shape)}; a "
        "matrix was expected. The adapter may have been saved from a partitioned (ZeRO-3, FSDP) "
        "model: gather its weights and save it again."
    )


def _replacements(
    plan: _Plan, base: Mapping[str, Lazy], result: Merged, work: Workspace
) -> list[_Replacement]:
    """Whole tensors and token rows, in the dtype of what they replace."""
    adapter, tensors = plan.adapter, plan.adapter.tensors
    found: list[_Replacement] = []
    rounded = []
    for name, key in plan.keys.whole.items():
        tensor = tensors[key]
        _largest(adapter, key, work)
        for place in plan.homes[name]:
            rows = tensor.take(place.source_start, place.source_start + place.rows)
            target = base[place.target]
            _check_replacement(adapter, key, rows, target, place)
            if tensor.dtype != target.dtype:
                rounded.append(place.target)
            rows = cast(rows, target.dtype)
            found.append(_Replacement(adapter, place.target, place.start, rows, whole=place.whole))
    for name, module in plan.keys.modules.items():
        if module.tokens:
            _largest(adapter, module.tokens, work)
            (place,) = plan.homes[plan.weight(name)]
            found += _token_rows(plan, name, tensors[module.tokens], place.target, base)
            if tensors[module.tokens].dtype != base[place.target].dtype:
                rounded.append(place.target)
    if rounded:
        result.warnings.append(
            f"{adapter.where}: values for {listed(rounded, 3)} are saved in another dtype than the "
            "base's and are rounded to it (--dtype keeps more)"
        )
    return found


def _check_replacement(adapter: Adapter, key: str, rows: Lazy, target: Lazy, place: Place) -> None:
    grows = place.whole and _is_of_tokens(place.target)
    fits = rows.shape == target.shape if place.whole else rows.shape[1:] == target.shape[1:]
    if not fits and not (grows and rows.shape[1:] == target.shape[1:]):
        raise AdapterError(
            f"{adapter.where}: '{printable(key)}' is {list(rows.shape)}, but base tensor "
            f"'{printable(place.target)}' is {list(target.shape)}. The adapter belongs to another "
            "model."
        )
    if target.dtype not in FLOATS:
        raise InputError(
            f"base tensor '{printable(place.target)}' is {target.dtype}; one of "
            f"{', '.join(FLOATS)} was expected. Use the unquantized checkpoint."
        )


def _token_rows(
    plan: _Plan, module: str, rows: Lazy, target: str, base: Mapping[str, Lazy]
) -> list[_Replacement]:
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
    W = base[target]
    if rows.shape[1:] != W.shape[1:] or max(indices) >= W.rows:
        raise AdapterError(
            f"{adapter.where}: trained rows of {rows.columns} columns for tokens up to {max(indices):,} "
            f"do not fit base tensor '{printable(target)}' of {list(W.shape)}. Was the vocabulary "
            "resized before the training? Give the resized base."
        )
    found: list[_Replacement] = []
    first = 0
    for at in range(1, len(indices) + 1):
        if at == len(indices) or indices[at] != indices[at - 1] + 1:
            part = cast(rows.take(first, at), W.dtype)
            found.append(_Replacement(adapter, target, indices[first], part, is_tokens=True))
            first = at
    return found


def _replace(result: Merged, replacements: Sequence[_Replacement]) -> None:
    """Put replacements into the mapping; each row may have one."""
    by_target: dict[str, list[_Replacement]] = {}
    for replacement in replacements:
        by_target.setdefault(replacement.target, []).append(replacement)
    for target, own in by_target.items():
        own.sort(key=lambda r: r.start)
        for one, other in pairwise(own):
            if one.start + one.rows.rows > other.start or one.whole or other.whole:
                raise AdapterError(
                    f"{one.adapter.where} and {other.adapter.where}: both bring values of their own for "
                    f"'{printable(target)}' (modules_to_save, biases or token rows). Only one of them "
                    "can hold: merge one adapter, or remove these tensors from the other."
                )
        if own[0].whole:
            result.tensors[target] = own[0].rows
        else:
            tensor, parts, at = result.tensors[target], [], 0
            for replacement in own:
                parts += [tensor.take(at, replacement.start), replacement.rows]
                at = replacement.start + replacement.rows.rows
            parts.append(tensor.take(at, tensor.shape[0]))
            result.tensors[target] = concat([part for part in parts if part.shape[0]])
    result.replaced = [name for name in result.tensors if name in by_target]


def _updates(plan: _Plan, result: Merged, work: Workspace) -> list[tuple[str, _Update]]:
    """What the pairs of an adapter add, by target; what is exactly zero is left out."""
    adapter = plan.adapter
    pairs = {name: module for name, module in plan.keys.modules.items() if module.A}
    turned = _turned(plan, result.tensors)
    found: list[tuple[str, _Update]] = []
    idle = []
    for name, module in pairs.items():
        scale = adapter.settings.scaling(_pattern_key(plan, name)) * adapter.weight
        # All factors are read in any case: a zero must not hide a NaN.
        peaks = [_largest(adapter, key, work) for key in (module.A, module.B)]
        for key in filter(None, (module.magnitude, module.bias)):
            _largest(adapter, key, work)
        if name in plan.parameters:
            new = _of_experts(plan, name, scale, result.tensors, turned=turned[name])
        else:
            new = _of_module(plan, name, module, scale, result.tensors, turned=turned[name])
        if (not scale or not all(peaks)) and not module.magnitude:
            idle.append(name)
            new = []
        if module.bias and scale:
            new += _of_bias(plan, name, module, scale, result.tensors)
        found += new
    if idle and found:
        result.warnings.append(
            f"{adapter.where}: {len(idle)} of {len(pairs)} updates are exactly zero and leave "
            f"their weights as they are: {listed(idle, 3)}"
        )
    return found


def _turned(plan: _Plan, tensors: Mapping[str, Lazy]) -> dict[str, bool]:
    """Whether the update of each module is the transpose of `B @ A`."""
    stacks = {
        name: (_stack(plan, name, tensors), *_factors(plan, name)) for name in plan.parameters
    }
    found = stacked_as(stacks, plan.adapter.where)
    where, settings = plan.adapter.where, plan.adapter.settings
    open_names = []
    for name, module in plan.keys.modules.items():
        if name in found or not module.A:
            continue
        found[name] = module.is_embedding
        if settings.fan_in_fan_out and not module.is_embedding:
            A, B = _factors(plan, name)
            shape = tensors[plan.homes[plan.weight(name)][0].target].shape
            found[name] = shape == (A.columns, B.rows)
            if A.columns == B.rows:
                open_names.append(name)
    told = {
        turned
        for name, turned in found.items()
        if name not in open_names
        and name not in stacks
        and not plan.keys.modules[name].is_embedding
    }
    if open_names and len(told) != 1:
        raise AdapterError(
            f"{where}: fan_in_fan_out is true, {listed(open_names, 3)} are square, and no other module "
            "of the adapter tells whether their weights are stored (in, out). Merge it with PEFT."
        )
    return found | dict.fromkeys(open_names, next(iter(told), False))


def _factors(plan: _Plan, name: str) -> tuple[Lazy, Lazy]:
    """A as (r, in) and B as (out, r), kernels of convolutions flattened."""
    module, tensors = plan.keys.modules[name], plan.adapter.tensors
    return tuple(t.reshape((t.rows, t.columns)) for t in (tensors[module.A], tensors[module.B]))  # type: ignore[return-value]


def _of_module(
    plan: _Plan,
    name: str,
    module: Module,
    scale: float,
    tensors: Mapping[str, Lazy],
    *,
    turned: bool,
) -> list[tuple[str, _Update]]:
    """The update of a linear layer, a convolution or an embedding."""
    A, B = _factors(plan, name)
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
    found = []
    for place in plan.homes[plan.weight(name)]:
        target = tensors[place.target]
        stack = len(target.shape) == 3 and not place.whole
        height = target.shape[0] * target.shape[1] if stack else target.rows
        alone = place.whole and len(plan.homes[plan.weight(name)]) == 1
        rows = B.rows if alone else place.rows
        end = place.start + rows
        fits = end == height if place.whole else end <= height
        convolves = len(plan.adapter.tensors[module.A].shape) == len(target.shape)
        flat = len(target.shape) == 2 or (place.whole and convolves) or stack
        if A.columns * height != math.prod(target.shape) or not fits or not flat:
            raise _misfit(plan, module.A, [B.rows, A.columns], place.target, target)
        _check_target(place.target, target)
        term = whole.take(place.source_start, place.source_start + rows)
        own = magnitude
        if own is not None and not turned:
            own = own.take(place.source_start, place.source_start + rows)
        update = _Update(place.start, term, height, plan.adapter, own, by_row=not turned)
        found.append((place.target, update))
    return found


def _of_bias(
    plan: _Plan, name: str, module: Module, scale: float, tensors: Mapping[str, Lazy]
) -> list[tuple[str, _Update]]:
    """The bias of lora_B, which goes to the bias of the layer: `b + s * b_B`."""
    bias = plan.adapter.tensors[module.bias]
    one = Array(np.ones(1, np.float32).view(np.uint8), (1, 1), "F32")
    found = []
    for place in plan.homes[f"{name}.bias"]:
        target = tensors[place.target]
        if len(target.shape) != 1 or place.start + place.rows > target.rows:
            raise _misfit(plan, module.bias, list(bias.shape), place.target, target)
        _check_target(place.target, target)
        term = LowRank(one, bias.reshape((bias.rows, 1)), scale, 0, bias.rows)
        term = term.take(place.source_start, place.source_start + place.rows)
        found.append((place.target, _Update(place.start, term, target.rows, plan.adapter)))
    return found


def _of_experts(
    plan: _Plan,
    name: str,
    scale: float,
    tensors: Mapping[str, Lazy],
    *,
    turned: bool,
) -> list[tuple[str, _Update]]:
    """The updates of the experts of a fused parameter, fused or one by one in the base."""
    A, B = _factors(plan, name)
    stack = _stack(plan, name, tensors)
    order = plan.adapter.expert_order
    terms = expert_updates(stack, A, B, scale, turned=turned, order=order)
    found = []
    for place in plan.homes[plan.weight(name)]:
        target = tensors[place.target]
        _check_target(place.target, target)
        if len(target.shape) == 3 or stack.experts == 1:
            height = stack.experts * stack.rows
            found += [
                (place.target, _Update(number * stack.rows, term, height, plan.adapter))
                for number, term in enumerate(terms)
            ]
            continue
        number, first = divmod(place.source_start, stack.rows)
        term = terms[number].take(first, first + place.rows)
        found.append((place.target, _Update(place.start, term, target.rows, plan.adapter)))
    return found


def _stack(plan: _Plan, name: str, tensors: Mapping[str, Lazy]) -> Stack:
    """The shape of a fused parameter, as the base has it or would have it."""
    A, _ = _factors(plan, name)
    places = plan.homes[plan.weight(name)]
    first = tensors[places[0].target]
    rank = plan.adapter.settings.rank(_pattern_key(plan, name))
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
        raise _misfit(plan, plan.keys.modules[name].A, list(A.shape), places[0].target, first)
    return Stack(experts, rows // experts, first.columns)


def _misfit(plan: _Plan, key: str, shape: list[int], target: str, tensor: Lazy) -> AdapterError:
    return AdapterError(
        f"{plan.adapter.where}: '{printable(key)}' and its lora_B make an update of shape {shape}, but "
        f"base tensor '{printable(target)}' is {list(tensor.shape)}. The adapter belongs to another "
        "model."
    )


def _check_target(name: str, tensor: Lazy) -> None:
    if tensor.dtype not in FLOATS:
        raise InputError(
            f"base tensor '{printable(name)}' is {tensor.dtype}; an update can only be added "
            f"to {', '.join(FLOATS)}. Use the unquantized checkpoint."
        )


def _check_company(
    name: str, updates: Sequence[_Update], replacements: Sequence[_Replacement]
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
        own = [r for r in replacements if r.target == name]
        foreign = [r for r in own if r.adapter is not one.adapter or r.is_tokens]
        if foreign:
            raise AdapterError(
                f"{one.adapter.where}: adds an update to '{printable(name)}', for which "
                f"{foreign[0].adapter.where} has values of its own. What both together mean is not "
                "defined: merge only one of them."
            )


def _updated(tensor: Lazy, updates: Sequence[_Update]) -> Lazy:
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


def _follows(plan: _Plan, tie: tuple[str, str], work: Workspace) -> bool:
    """Whether an adapter has the same update for a tied embedding and its head.

    PEFT's `ensure_weight_tying` saves both: the head's A and B are the embedding's B and A,
    transposed.
    """
    if not plan.adapter.settings.ensure_weight_tying:
        return False
    own: dict[str, Module] = {}
    for name, module in plan.keys.modules.items():
        if module.A:
            own |= {p.target: module for p in plan.homes[plan.weight(name)] if p.target in tie}
    if len(own) < 2:
        return False
    embedding, head = own[tie[0]], own[tie[1]]
    tensors = plan.adapter.tensors
    for one, other in ((embedding.A, head.B), (embedding.B, head.A)):
        left = read_float32(tensors[one], 0, tensors[one].rows, work)
        right = read_float32(tensors[other], 0, tensors[other].rows, work)
        if left.T.shape != right.shape or not np.array_equal(left.T, right):
            raise AdapterError(
                f"{plan.adapter.where}: ensure_weight_tying is true, but '{printable(one)}' and "
                f"'{printable(other)}' are not the same update. Save the adapter again."
            )
    return True


def _settle_tie(
    result: Merged,
    tie: tuple[str, str],
    replacements: Sequence[_Replacement],
    work: Workspace,
    *,
    follows: bool,
) -> None:
    """Let the head follow the embedding if it is still the same; otherwise they are untied."""
    embedding, head = ([r for r in replacements if r.target == name and r.adapter] for name in tie)
    touched = [name in result.updated for name in tie]
    only_tokens = not head and not any(touched) and all(r.is_tokens for r in embedding)
    same = (
        not any(touched)
        and [(r.start, r.rows.shape) for r in embedding] == [(r.start, r.rows.shape) for r in head]
        and all(equal_bytes(r.rows, s.rows, work) for r, s in zip(embedding, head, strict=True))
    )
    result.untied = not ((follows and not touched[1]) or only_tokens or same)
    if not result.untied and (any(touched) or embedding):
        result.tensors[tie[1]] = result.tensors[tie[0]]
        result.replaced = [name for name in result.replaced if name != tie[1]]


def _check_depth(plan: _Plan, base: Mapping[str, Lazy], result: Merged) -> None:
    """Refuse an adapter for a model of fewer layers: it fits, and was trained on another base.

    PEFT adapts the targets of every layer unless the config chooses layers.
    """
    settings = plan.adapter.settings
    if settings.chooses_layers:
        return
    weights = (plan.weight(name) for name, module in plan.keys.modules.items() if module.A)
    targets = {place.target for weight in weights for place in plan.homes[weight]}
    there, here = _layers(base), _layers(targets)
    lacking = {
        name: sorted(there.get(name, set()) - numbers)
        for name, numbers in here.items()
        if there.get(name, set()) - numbers
    }
    for name, missing in lacking.items():
        stack = name.partition(".{}.")[0]
        used = {n for other, numbers in here.items() if other.startswith(stack) for n in numbers}
        if not used.intersection(missing) and min(missing) > max(used):
            raise AdapterError(
                f"{plan.adapter.where}: has updates for the {len(used)} layers 0 to {max(used)} of "
                f"'{printable(stack)}', but the base has {len(used) + len(missing)} layers, and the "
                "config does not choose layers: the adapter was trained on another base. Give that "
                "one as --base."
            )
    if lacking:
        names = [name.replace("{}", str(missing[0])) for name, missing in lacking.items()]
        result.warnings.append(
            f"{plan.adapter.where}: other layers have updates for the like of {listed(names, 3)}, "
            "which have none"
        )


def _layers(names: Iterable[str]) -> dict[str, set[int]]:
    """Names with their first index taken out, to the indexes that occur."""
    found: dict[str, set[int]] = {}
    for name in names:
        before, number, after = (
            re.split(r"(?<=\.)(\d{1,6})(?=\.)", name, maxsplit=1)
            if re.search(r"\.\d{1,6}\.", name)
            else (name, "", "")
        )
        if number:
            found.setdefault(f"{before}{{}}{after}", set()).add(int(number))
    return found


def _facts(plan: _Plan) -> dict[str, Any]:
    """What the report says of an adapter."""
    settings, adapter = plan.adapter.settings, plan.adapter
    pairs = {name: module for name, module in plan.keys.modules.items() if module.A}
    shapes = {name: len(adapter.tensors[module.A].shape) for name, module in pairs.items()}
    kinds = {
        "lora": bool(pairs),
        "rslora": settings.use_rslora,
        "dora": settings.use_dora,
        "embedding": any(module.is_embedding for module in pairs.values()),
        "convolution": any(rank > 2 for rank in shapes.values()),
        "experts": bool(plan.parameters),
        "lora_bias": settings.lora_bias,
        "bias": any(name.endswith(".bias") for name in plan.keys.whole),
        "modules_to_save": bool(settings.modules_to_save),
        "tokens": bool(settings.token_indices),
    }
    scalings = Counter(f"{settings.scaling(_pattern_key(plan, name)):g}" for name in pairs)
    return {
        "file": adapter.where,
        "weight": adapter.weight,
        "r": settings.r,
        "lora_alpha": settings.lora_alpha,
        "use_rslora": settings.use_rslora,
        "kinds": [kind for kind, has in kinds.items() if has],
        "scalings": dict(scalings),
        "inert": plan.keys.inert,
    }


def _largest(adapter: Adapter, key: str, work: Workspace) -> float:
    """The largest magnitude in a factor; raises `AdapterError` for NaN and infinities."""
    tensor = adapter.tensors[key]
    step = max(1_000_000 // tensor.columns, 1)
    largest = 0.0
    for start in range(0, tensor.rows, step):
        block = np.abs(read_float32(tensor, start, min(start + step, tensor.rows), work))
        peak = float(block.max())
        if not np.isfinite(peak):
            row = start + int(np.argmin(np.isfinite(block).all(axis=1)))
            raise AdapterError(
                f"{adapter.where}: '{printable(key)}' has a NaN or infinite value in row {row:,}. "
                "The training diverged or the file is damaged: use an earlier checkpoint."
            )
        largest = max(largest, peak)
    return largest
