"""Whether two of the given adapters are one: its update would be added twice.

Told by the tensors, whatever file they are in: PEFT saves the same ones as `.safetensors` and as `.bin`,
with and without its adapter's name in their keys. Rows of other tokens are other adapters.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import fields
from itertools import combinations

from streamshard.errors import UsageError, listed
from streamshard.lora.adapter import AdapterPlan
from streamshard.lora.keys import Module
from streamshard.tensors.comparing import equal_bytes
from streamshard.tensors.lazy import Lazy
from streamshard.tensors.workspace import Workspace

__all__ = ["check_given_twice"]


def check_given_twice(plans: Sequence[AdapterPlan], work: Workspace) -> None:
    """Refuse one adapter under two paths, or given twice; raises `UsageError`."""
    twice: dict[int, str] = {}
    for (i, one), (j, other) in combinations(enumerate(plans), 2):
        if j not in twice and _are_one(one, other, work):
            twice |= {i: one.adapter.where, j: other.adapter.where}
    if twice:
        files = dict.fromkeys(twice.values())
        raise UsageError(
            f"{listed(files)} {'is' if len(files) == 1 else 'are'} one adapter that was given "
            f"{len(twice)} times, and its update would be added more than once. Give it once; --weight "
            "scales it."
        )


def _are_one(one: AdapterPlan, other: AdapterPlan, work: Workspace) -> bool:
    if one.adapter.settings.token_indices != other.adapter.settings.token_indices:
        return False
    mine, theirs = _tensors(one), _tensors(other)
    if mine.keys() != theirs.keys():
        return False
    return all(equal_bytes(tensor, theirs[part], work) for part, tensor in mine.items())


def _tensors(plan: AdapterPlan) -> dict[tuple[str, str], Lazy]:
    """The tensors of an adapter by module and part, whatever their keys are."""
    keys = {("whole", name): key for name, key in plan.keys.whole.items()}
    for name, module in plan.keys.modules.items():
        parts = {part.name: getattr(module, part.name) for part in fields(Module)}
        keys |= {(part, name): key for part, key in parts.items() if isinstance(key, str) and key}
    return {part: plan.adapter.tensors[key] for part, key in keys.items()}
