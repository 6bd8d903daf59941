"""An adapter, its keys sorted, and where the tensors are that it changes."""

from __future__ import annotations

import math
import sys
from collections.abc import Mapping, Sequence
from dataclasses import field
from typing import Any

import numpy as np

from streamshard.errors import AdapterError, InputError, listed, printable
from streamshard.lora.keys import BASE_LAYER, Keys
from streamshard.lora.name_matching import Place, Wanted
from streamshard.lora.settings import LoraSettings
from streamshard.tensors.dtypes import FLOATS
from streamshard.tensors.lazy import READ_NBYTES, Lazy
from streamshard.tensors.rounding import widen
from streamshard.tensors.workspace import Workspace
from streamshard.values import frozen

__all__ = [
    "GATHER",
    "Adapter",
    "AdapterPlan",
    "check_target",
    "factors_of",
    "facts_of",
    "largest",
    "misfit",
    "no_sum",
    "pattern_key",
    "wanted_tensors",
]


GATHER = (
    "Gather the weights and save the adapter again (FSDP: with FULL_STATE_DICT; ZeRO-3: with "
    "stage3_gather_16bit_weights_on_model_save)."
)


@frozen
class Adapter:
    """One adapter: what messages call it, its settings, its tensors, and a factor on its scale.

    `name` chooses among several adapters in one file; `expert_order` is one of
    `experts.EXPERT_ORDERS`. `beside` are the tensors of files that lie beside the adapter's own, by what
    messages call each file.
    """

    where: str
    settings: LoraSettings
    tensors: Mapping[str, Lazy]
    weight: float = 1.0
    name: str | None = None
    expert_order: str = "peft"
    beside: Mapping[str, Mapping[str, Lazy]] = field(default_factory=dict)


@frozen
class AdapterPlan:
    """One adapter, its keys sorted, and the places of the tensors that they change."""

    adapter: Adapter
    keys: Keys
    parameters: Mapping[str, str]
    """Module to the fused parameter that it adapts."""
    homes: Mapping[str, Sequence[Place]]
    warnings: tuple[str, ...] = ()
    unasked: Sequence[str] = ()
    """Keys of whole tensors that the config does not ask for: they may only repeat the base."""

    def weight(self, module: str) -> str:
        """The tensor that a module's pair updates, as the adapter names it."""
        plain = module
        while plain.endswith(BASE_LAYER):
            plain = plain.removesuffix(BASE_LAYER)
        # Interned: most are names of the base, which are in memory once.
        return sys.intern(f"{plain}.{self.parameters.get(module, 'weight')}")


def wanted_tensors(plan: AdapterPlan, *, turned: bool) -> dict[str, Wanted]:
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
            rows *= max(A.rows // plan.adapter.settings.rank(pattern_key(plan, name)), 1)
        wanted[weight] = Wanted(rows, module.A)
    for name, key in plan.keys.whole.items():
        # Of a table and rows of it the table says how many there are.
        if name not in wanted or wanted[name].rows == 1:
            wanted[name] = Wanted(tensors[key].rows, key)
    return wanted


def pattern_key(plan: AdapterPlan, module: str) -> str:
    """What rank_pattern and alpha_pattern are matched against."""
    return plan.weight(module) if module in plan.parameters else module


def factors_of(plan: AdapterPlan, name: str) -> tuple[Lazy, Lazy]:
    """A as (r, in) and B as (out, r), kernels of convolutions flattened."""
    module, tensors = plan.keys.modules[name], plan.adapter.tensors
    return tuple(t.reshape((t.rows, t.columns)) for t in (tensors[module.A], tensors[module.B]))  # type: ignore[return-value]


def facts_of(
    plan: AdapterPlan, idle: Sequence[str], scalings: Mapping[str, int], ranks: Mapping[int, int]
) -> dict[str, Any]:
    """What the report says of an adapter; `idle` are further keys that change nothing.

    `scalings` and `ranks` are how many pairs have which, as it is to be shown.
    """
    settings, adapter = plan.adapter.settings, plan.adapter
    pairs = [module for module in plan.keys.modules.values() if module.A]
    kinds = {
        "lora": bool(pairs),
        "rslora": settings.use_rslora,
        "dora": settings.use_dora,
        "embedding": any(module.is_embedding for module in pairs),
        "convolution": any(len(adapter.tensors[module.A].shape) > 2 for module in pairs),
        "experts": bool(plan.parameters),
        "lora_bias": settings.lora_bias,
        "bias": any(name.endswith(".bias") for name in plan.keys.whole),
        "modules_to_save": bool(settings.modules_to_save),
        "tokens": bool(settings.token_indices),
    }
    return {
        "file": adapter.where,
        "weight": adapter.weight,
        "r": settings.r,
        "lora_alpha": settings.lora_alpha,
        "use_rslora": settings.use_rslora,
        "kinds": [kind for kind, has in kinds.items() if has],
        "scalings": dict(scalings),
        "ranks": {str(rank): count for rank, count in sorted(ranks.items())},
        "inert": [*plan.keys.inert, *idle],
    }


def largest(adapter: Adapter, key: str, work: Workspace) -> float:
    """The largest magnitude in a factor; raises `AdapterError` for NaN and infinities."""
    tensor = adapter.tensors[key]
    kind, largest = np.dtype(FLOATS[tensor.dtype]), 0.0
    total, step = math.prod(tensor.shape), READ_NBYTES // kind.itemsize
    for start in range(0, total, step):
        count = min(step, total - start)
        with tensor.seen(start, start + count, work, "narrow") as raw:
            values = raw.view(kind)
            if tensor.dtype != "F32":
                block = work.float32("factor", 1, count)
                widen(values.reshape(1, count), tensor.dtype, block)
                values = block[0]
            peak = max(float(values.max()), -float(values.min()))  # both are NaN if one is
            first = 0 if math.isfinite(peak) else int(np.argmin(np.isfinite(values)))
        if not math.isfinite(peak):
            row = (start + first) // tensor.columns
            raise AdapterError(
                f"{adapter.where}: '{printable(key)}' has a NaN or infinite value in row {row:,}. "
                "The training diverged or the file is damaged: use an earlier checkpoint."
            )
        largest = max(largest, peak)
    return largest


def misfit(
    plan: AdapterPlan, key: str, shape: list[int], target: str, tensor: Lazy
) -> AdapterError:
    """The error for an update that has not the shape of its target."""
    other = [int(n) for n in tensor.shape]
    alike = [n == m for n, m in zip(shape, other, strict=False)]
    sliced = len(shape) == len(other) and sum(alike) == len(alike) - 1
    sliced = sliced and all(m % max(n, 1) == 0 and n for n, m in zip(shape, other, strict=True))
    return AdapterError(
        f"{plan.adapter.where}: '{printable(key)}' and its lora_B make an update of shape {shape}, but "
        f"base tensor '{printable(target)}' is {other}. "
        + (
            f"The file may hold one slice of a sharded model's factors. {GATHER}"
            if sliced
            else "The adapter belongs to another model."
        )
    )


def no_sum(adapter: Adapter, keys: Sequence[str]) -> AdapterError:
    """The error for a weight on what is no update."""
    return AdapterError(
        f"{adapter.where}: {listed(keys, 3)} scale or replace what the base has, and are no update "
        "that --weight could scale. Merge this adapter with weight 1."
    )


def check_target(name: str, tensor: Lazy) -> None:
    """Raise `InputError` if nothing can be added to a tensor of this dtype."""
    if tensor.dtype not in FLOATS:
        raise InputError(
            f"base tensor '{printable(name)}' is {tensor.dtype}; an update can only be added "
            f"to {', '.join(FLOATS)}. Use the unquantized checkpoint."
        )
