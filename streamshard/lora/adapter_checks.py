"""Whether an adapter's config, its tensors and the base fit each other: all, or nothing is done."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from itertools import accumulate

from streamshard.errors import AdapterError, listed, printable
from streamshard.lora.adapter import GATHER, Adapter, AdapterPlan, pattern_key
from streamshard.lora.experts import Fused
from streamshard.tensor_names import is_of_tokens
from streamshard.tensors.dtypes import FLOATS
from streamshard.tensors.lazy import Lazy

__all__ = ["check_biases", "check_factors", "check_flags", "not_asked", "unasked"]


def check_biases(plan: AdapterPlan, base: Mapping[str, Lazy]) -> None:
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


def check_flags(
    plan: AdapterPlan,
    base: Iterable[str],
    spelled: Callable[[str], str],
    fused: Fused | None,
) -> list[str]:
    """Raise `AdapterError` where config and tensors say different things; returns warnings.

    `base` are the names of the base's tensors, which an adapter may have `spelled` otherwise, `fused`
    the parameters that it has, if any are targets.
    """
    settings, keys = plan.adapter.settings, plan.keys
    plain = {
        name: module
        for name, module in keys.modules.items()
        if module.A and name not in plan.parameters
    }
    tokens = [name for name, module in keys.modules.items() if module.tokens]
    saved = {
        entry: [name for name in keys.whole if _is_within(name, entry)]
        for entry in settings.modules_to_save
    }
    # PEFT leaves out what it does not find: what the base has not either was not trained.
    absent = [entry for entry, names in saved.items() if not names]
    there = [spelling for name in base for spelling in (name, spelled(name))] if absent else []
    lost = [entry for entry in absent if any(_is_within(name, entry) for name in there)]
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
    warnings = []
    if absent and not lost:
        warnings.append(
            f"{plan.adapter.where}: modules_to_save has {listed(absent)}, which neither the file nor "
            "the base has: PEFT ignored that, and so does this merge"
        )
    impossible = ("use_dora", "lora_bias", "fan_in_fan_out")
    for flag in impossible if plan.parameters else ():
        if getattr(settings, flag):
            raise AdapterError(
                f"{plan.adapter.where}: {flag} is true, which PEFT does not have for fused parameters, "
                "but the file has pairs for them. Config and tensors are not of one adapter."
            )
    _check_nesting(plan)
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
            for name in plain
            for target in settings.target_parameters
        )
    ):
        there = [t for t in settings.target_parameters if fused is None or fused.has_any(t)]
        if there or not plain:
            raise _disagreement(
                plan, f"target_parameters has {listed(there)}", "pairs for them", [], lacks=True
            )
        warnings.append(
            f"{plan.adapter.where}: target_parameters has {listed(settings.target_parameters)}, which "
            "the base has not: PEFT ignored that, and so does this merge"
        )
    return warnings


def unasked(plan: AdapterPlan, whole: Mapping[str, str]) -> list[str]:
    """The keys, of those of `whole` tensors, that the config does not ask for.

    Trainers that save all that they have save weights of the base, too; other values than the base's
    were trained, and the config would say so.
    """
    settings = plan.adapter.settings
    return [
        key
        for name, key in whole.items()
        if not is_of_tokens(name)
        and not any(_is_within(name, entry) for entry in settings.modules_to_save)
        and (settings.bias == "none" or not name.endswith(".bias"))
    ]


def not_asked(plan: AdapterPlan, keys: Sequence[str]) -> AdapterError:
    """The error for whole tensors that the config does not ask for, and that are not the base's."""
    return _disagreement(
        plan,
        "neither modules_to_save nor bias of the config asks for them, and they are not what the base "
        "has",
        "whole tensors",
        keys,
        lacks=False,
    )


def _check_nesting(plan: AdapterPlan) -> None:
    """Refuse saved modules inside saved modules, of which PEFT saves only one copy of two."""
    entries = plan.adapter.settings.modules_to_save
    for name, key in plan.keys.whole.items():
        saved = [module for module in _modules_around(name) if module.endswith(entries)]
        if len(saved) > 1:
            raise AdapterError(
                f"{plan.adapter.where}: '{printable(key)}' is in two modules that modules_to_save of the "
                f"config means, {listed(saved)}, one inside the other (PEFT compares the ends of names). "
                "PEFT trains two copies then and saves one: which was used cannot be told. Train with "
                "names that do not overlap."
            )


def _disagreement(
    plan: AdapterPlan, config: str, what: str, names: Sequence[str], *, lacks: bool
) -> AdapterError:
    shown = f" ({listed(names, 3)})" if names else ""
    return AdapterError(
        f"{plan.adapter.where}: {config}, but the file {'lacks' if lacks else 'has'} {what}{shown}. "
        "Config and tensors are not of one adapter, or the file is incomplete: save the adapter "
        "again, or correct adapter_config.json if you know what was trained."
    )


def _is_within(tensor: str, entry: str) -> bool:
    """Whether a tensor is of a module that ends with `entry` (PEFT compares without a dot)."""
    return any(module.endswith(entry) for module in _modules_around(tensor))


def _modules_around(tensor: str) -> Iterator[str]:
    """The modules that a tensor is in, the outermost first."""
    return accumulate(tensor.split(".")[:-1], "{}.{}".format)


def check_factors(plan: AdapterPlan) -> None:
    """Raise `AdapterError` for factors of a wrong dtype, shape or rank."""
    adapter, tensors = plan.adapter, plan.adapter.tensors
    used = [
        k for m in plan.keys.modules.values() for k in (m.A, m.B, m.magnitude, m.bias, m.tokens)
    ]
    whole = set(plan.keys.whole.values())
    for key in filter(None, [*used, *whole]):
        # Whole modules may have counters, too, which are compared with the base's later.
        if tensors[key].dtype not in FLOATS and not (key in whole and is_count(tensors[key])):
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
        _check_rank(plan, name, A, B)


def _check_rank(plan: AdapterPlan, name: str, A: Lazy, B: Lazy) -> None:
    where, key = plan.adapter.where, printable(plan.keys.modules[name].A)
    rank, found, other = plan.adapter.settings.rank(pattern_key(plan, name)), A.shape[0], B.shape[1]
    if found != other:
        convolves = len(A.shape) > 2 and found % max(other, 1) == 0 and found == rank
        raise AdapterError(
            f"{where}: '{key}' has rank {found} and its lora_B {other}. "
            + (
                "It is for a grouped convolution, which PEFT cannot merge either: train without "
                "that layer."
                if convolves
                else f"They are slices of a sharded (FSDP, ZeRO-3) model, or of two files. {GATHER}"
            )
        )
    fits = found % rank == 0 if name in plan.parameters else found == rank
    if not fits or math.prod(B.shape[2:]) != 1:
        raise AdapterError(
            f"{where}: '{key}' has rank {found} and its lora_B {other}, but adapter_config.json says "
            f"{rank}. Config and tensors are not of one adapter: take both from one folder."
        )


def is_count(tensor: Lazy) -> bool:
    """Whether a tensor has integers or truth values, like the counters of BatchNorm."""
    return tensor.dtype == "BOOL" or tensor.dtype[0] in "IU"


def _partitioned(adapter: Adapter, key: str) -> AdapterError:
    return AdapterError(
        f"{adapter.where}: '{printable(key)}' has shape {list(adapter.tensors[key].shape)}; a "
        "matrix was expected. The adapter may have been saved from a partitioned (ZeRO-3, FSDP) "
        f"model. {GATHER}"
    )
