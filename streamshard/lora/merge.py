"""Folding adapters into weights: what each tensor of an adapter changes, and the mapping that results.

`merge` is a function from a base mapping and adapters to a mapping. It reads the adapters'
values (to refuse what is not finite) but no weight of the base. Formulas: `W + s * B @ A`
(arXiv:2106.09685), `s` from `settings`; DoRA `m * V / |V|` (arXiv:2402.09353); whole tensors and
token rows replace what the base has.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

import numpy as np

from streamshard.errors import AdapterError, printable
from streamshard.lora.adapter import Adapter, AdapterPlan, Merged, facts_of
from streamshard.lora.keys import Module
from streamshard.lora.name_matching import OtherNames
from streamshard.lora.planning import check_depth, plan_adapter
from streamshard.lora.replacements import Replacement, replace_rows, replacements_of
from streamshard.lora.updates import Update, check_company, updated, updates_of
from streamshard.tensors.comparing import equal_bytes
from streamshard.tensors.lazy import READ_NBYTES, Lazy, read_float32
from streamshard.tensors.workspace import Workspace

__all__ = ["merge"]


def merge(
    base: Mapping[str, Lazy],
    adapters: Sequence[Adapter],
    work: Workspace,
    others: OtherNames,
    tie: tuple[str, str] | None = None,
) -> Merged:
    """Apply every tensor of every adapter to the weight it was trained on.

    Each tensor of an adapter is used exactly once. `others` knows the names of other spellings and
    of another layout, for adapters that were trained there. `tie` are the names of embedding and
    head where these are one tensor, which the base may have once or twice. Raises `AdapterError`
    for what has no home, does not fit, is not finite, or changes nothing.
    """
    whole = dict(base)
    if tie is not None:
        whole.setdefault(tie[1], base[tie[0]])
    result = Merged(whole)
    plans = [plan_adapter(adapter, whole, work, others) for adapter in adapters]
    followed = [plan for plan in plans if tie is not None and _follows(plan, tie, work)]
    replacements = [r for plan in plans for r in replacements_of(plan, whole, result, work)]
    if tie is not None:
        replacements += _tied_rows(replacements, tie)
    replace_rows(result, replacements)
    updates: dict[str, list[Update]] = {}
    for plan in plans:
        found = updates_of(plan, result, work)
        if not found and not any(r.adapter is plan.adapter for r in replacements):
            raise AdapterError(
                f"{plan.adapter.where}: its --weight is 0, so it changes nothing. Leave the adapter out."
                if not plan.adapter.weight
                else f"{plan.adapter.where}: every update is exactly zero (lora_B is zero): the adapter "
                "was not trained, or was saved by a trainer that lost its values. Give a checkpoint "
                "from later in the training, or save the adapter again."
            )
        for target, update in found:
            if plan not in followed or tie is None or target != tie[1]:
                updates.setdefault(target, []).append(update)
        check_depth(plan, base, result)
        result.facts.append(facts_of(plan))
    for name, own in updates.items():
        check_company(name, own, replacements)
        result.tensors[name] = updated(result.tensors[name], own)
    result.updated = [name for name in result.tensors if name in updates]
    if tie is not None:
        _settle_tie(result, tie, replacements, work, follows=bool(followed))
        if tie[1] not in base and not result.untied:
            del result.tensors[tie[1]]
            result.replaced = [name for name in result.replaced if name != tie[1]]
    return result


def _follows(plan: AdapterPlan, tie: tuple[str, str], work: Workspace) -> bool:
    """Whether an adapter has the same update for a tied embedding and its head.

    PEFT's `ensure_weight_tying` saves both: the head's A and B are the embedding's B and A,
    transposed. DoRA scales rows of the head, but columns of the embedding: never the same.
    """
    settings = plan.adapter.settings
    if settings.use_dora or not settings.ensure_weight_tying:
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
        if not _is_transpose(tensors[one], tensors[other], work):
            raise AdapterError(
                f"{plan.adapter.where}: ensure_weight_tying is true, but '{printable(one)}' and "
                f"'{printable(other)}' are not the same update. Save the adapter again."
            )
    return True


def _is_transpose(one: Lazy, other: Lazy, work: Workspace) -> bool:
    """Whether two matrices have the same values, rows of the one being columns of the other."""
    if (one.rows, one.columns) != (other.columns, other.rows):
        return False
    for start, stop, first, last in one.windows(READ_NBYTES):
        left = read_float32(one, start, stop, work, (first, last))
        right = read_float32(other, first, last, work, (start, stop))
        if not np.array_equal(left, right.T):
            return False
    return True


def _tied_rows(replacements: Sequence[Replacement], tie: tuple[str, str]) -> list[Replacement]:
    """Trained token rows of an embedding for its head, unless the adapter has other ones there.

    PEFT puts the rows of the one into the other, and adds the head's own update to them.
    """
    embedding, head = ([r for r in replacements if r.is_tokens and r.target == n] for n in tie)
    own = {id(r.adapter) for r in head}
    return [replace(r, target=tie[1]) for r in embedding if id(r.adapter) not in own]


def _settle_tie(
    result: Merged,
    tie: tuple[str, str],
    replacements: Sequence[Replacement],
    work: Workspace,
    *,
    follows: bool,
) -> None:
    """Let the head follow the embedding if it is still the same; otherwise they are untied."""
    embedding, head = ([r for r in replacements if r.target == name] for name in tie)
    touched = [name in result.updated for name in tie]
    same = (
        not any(touched)
        and [(r.start, r.rows.shape) for r in embedding] == [(r.start, r.rows.shape) for r in head]
        and all(equal_bytes(r.rows, s.rows, work) for r, s in zip(embedding, head, strict=True))
    )
    result.untied = not ((follows and not touched[1]) or same)
    if not result.untied and (any(touched) or embedding):
        result.tensors[tie[1]] = result.tensors[tie[0]]
