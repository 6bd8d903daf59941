"""Folding adapters into weights: what each tensor of an adapter changes, and the mapping that results.

`changes_of` goes from a base mapping and adapters to what they change, `merge` from there to a
mapping. Adapters' values are read (to refuse what is not finite) but no weight of the base.
Formulas: `W + s * B @ A` (arXiv:2106.09685), `s` from `settings`; DoRA
`m * V / |V|` (arXiv:2402.09353); whole tensors and token rows replace what the base has.
"""

from __future__ import annotations

import itertools
from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from streamshard.errors import AdapterError, printable
from streamshard.lora.adapter import Adapter, AdapterPlan, facts_of
from streamshard.lora.adapter_plan import plan_adapter
from streamshard.lora.depth_check import check_depth
from streamshard.lora.given_twice import check_given_twice
from streamshard.lora.keys import Module
from streamshard.lora.name_matching import OtherNames
from streamshard.lora.replacements import Replacement, replaced_tensors, replacements_of
from streamshard.lora.tied_rows import Ends, rows_of_both
from streamshard.lora.updates import Update, Updates, check_company, updated, updates_of
from streamshard.tensors.comparing import equal_bytes
from streamshard.tensors.lazy import READ_NBYTES, Lazy, read_float32
from streamshard.tensors.workspace import Workspace
from streamshard.values import frozen

__all__ = ["Changes", "Merged", "alone", "changes_of", "merge"]


@frozen
class Changes:
    """What adapters do to a base: values that are replaced, and updates, by adapter and target.

    `tensors` has the replaced values, and no update yet. `tie` are the names of embedding and head
    where these are one tensor; `follows` says that an update of the one is meant for both.
    """

    base: Mapping[str, Lazy]
    adapters: Sequence[Adapter]
    tensors: Mapping[str, Lazy]
    replacements: Sequence[Replacement]
    updates: Sequence[Sequence[tuple[str, Update]]]
    tie: tuple[str, str] | None
    follows: bool
    facts: Sequence[Mapping[str, Any]]
    """What the report says of each adapter."""
    warnings: Sequence[str]


@frozen
class Merged:
    """The new mapping, and what became of what.

    `updated` are the names of tensors that get an update, `replaced` of those that get other values
    in whole or in some rows. `untied` says that embedding and head were one and no longer are.
    """

    tensors: dict[str, Lazy]
    updated: Sequence[str]
    replaced: Sequence[str]
    untied: bool


def changes_of(
    base: Mapping[str, Lazy],
    adapters: Sequence[Adapter],
    work: Workspace,
    others: OtherNames,
    tie: tuple[str, str] | None = None,
    apart: tuple[str, str] | None = None,
) -> Changes:
    """Match every tensor of every adapter with the weight it was trained on.

    Each tensor of an adapter is used exactly once. `others` knows the names of other spellings and
    of another layout, for adapters that were trained there. `tie` are the names of embedding and
    head where these are one tensor, which the base may have once or twice; `apart` are they in a
    layout that never ties them. Raises `AdapterError` for what has no home, does not fit, is not
    finite, or changes nothing.
    """
    ends = Ends(*tie, tied=True) if tie else Ends(*apart, tied=False) if apart else None
    whole = dict(base)
    if tie is not None:
        whole.setdefault(tie[1], base[tie[0]])
    plans = [plan_adapter(adapter, whole, work, others) for adapter in adapters]
    check_given_twice(plans, work)
    followed = [tie is not None and _follows(plan, tie, work) for plan in plans]
    own = [replacements_of(plan, whole, work) for plan in plans]
    replacements = [one for found in own for one in found.found]
    if ends is not None:
        for plan, replaced in zip(plans, own, strict=True):
            never = others.never_ties(plan.homes, plan.adapter.settings.base_class)
            replacements += rows_of_both(plan, replaced.found, whole, ends, work, never_ties=never)
    whole |= replaced_tensors(whole, replacements)
    warnings = [warning for found in own for warning in found.warnings]
    updates, facts = [], []
    for plan, follows, replaced in zip(plans, followed, own, strict=True):
        made = updates_of(plan, whole, work)
        if not made.found and not replaced.found:
            raise _changes_nothing(plan.adapter, made)
        if not made.found and made.pairs:
            warnings.append(
                f"{plan.adapter.where}: none of its {made.pairs:,} LoRA pairs has an effect, since "
                f"{made.causes}; only values that it replaces are merged. Was it trained, and is "
                "this its config?"
            )
        dropped = tie[1] if follows and tie is not None else None
        updates.append([(target, one) for target, one in made.found if target != dropped])
        warnings += [*plan.warnings, *made.warnings, *check_depth(plan, base)]
        facts.append(facts_of(plan, replaced.idle, made.scalings, made.ranks))
    return Changes(
        base, adapters, whole, replacements, updates, tie, any(followed), facts, warnings
    )


def _changes_nothing(adapter: Adapter, made: Updates) -> AdapterError:
    where, causes = adapter.where, set(made.idle.values())
    if not adapter.weight:
        return AdapterError(
            f"{where}: its --weight is 0, so it changes nothing. Leave the adapter out."
        )
    if causes == {"lora_alpha is 0"}:
        return AdapterError(
            f"{where}: lora_alpha is 0 in adapter_config.json, so every update is exactly zero. "
            "Correct it to the value of the training; nothing else is wrong with the file."
        )
    if not made.pairs:
        return AdapterError(
            f"{where}: all that it has are values that the base has already. Is this the base before "
            "or after the merge? Give the one that the adapter was trained on."
        )
    return AdapterError(
        f"{where}: every update is exactly zero, since {made.causes}: the adapter "
        "was not trained, or was saved by a trainer that lost its values. Give a checkpoint "
        "from later in the training, or save the adapter again."
    )


def merge(changes: Changes, work: Workspace) -> Merged:
    """The base with all changes made; refuses what several adapters cannot do together."""
    tensors = dict(changes.tensors)
    updates = _by_target(itertools.chain.from_iterable(changes.updates))
    for name, own in updates.items():
        check_company(name, own, changes.replacements)
        tensors[name] = updated(tensors[name], own)
    new = {replacement.target for replacement in changes.replacements}
    tie, untied = changes.tie, False
    if tie is not None:
        untied = not _is_still_tied(changes, tie, updates.keys(), work)
        if not untied and tie[1] not in changes.base:
            del tensors[tie[1]]
        elif not untied and (tie[0] in new or not updates.keys().isdisjoint(tie)):
            tensors[tie[1]] = tensors[tie[0]]
    return Merged(
        tensors=tensors,
        updated=[name for name in tensors if name in updates],
        replaced=[name for name in tensors if name in new],
        untied=untied,
    )


def alone(changes: Changes, number: int) -> list[Lazy]:
    """The tensors that one of the adapters updates, as it would with weight 1 and by itself."""
    updates = _by_target((name, own.unweighted) for name, own in changes.updates[number])
    return [updated(t, updates[name]) for name, t in changes.tensors.items() if name in updates]


def _by_target(updates: Iterable[tuple[str, Update]]) -> dict[str, list[Update]]:
    found: dict[str, list[Update]] = {}
    for target, update in updates:
        found.setdefault(target, []).append(update)
    return found


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


def _is_still_tied(
    changes: Changes, tie: tuple[str, str], updates: Collection[str], work: Workspace
) -> bool:
    """Whether embedding and head are one tensor after the changes, as they were before."""
    touched = [name in updates for name in tie]
    if changes.follows and not touched[1]:
        return True
    embedding, head = ([r for r in changes.replacements if r.target == name] for name in tie)
    return (
        not any(touched)
        and [(r.start, r.rows.shape) for r in embedding] == [(r.start, r.rows.shape) for r in head]
        and all(equal_bytes(r.rows, s.rows, work) for r, s in zip(embedding, head, strict=True))
    )
