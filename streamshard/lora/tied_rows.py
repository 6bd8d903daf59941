"""Values of one of embedding and head that are meant for both, as the trained model tied the two.

PEFT trains one set of token rows for both and saves it once; and the weight beneath a pair, where it
saves that, is the one which the two have in common: only the update is of one alone. The custom layout
never ties the two, so its config does not say whether a model that an adapter was trained on did.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

from streamshard.errors import AdapterError, printable
from streamshard.lora.adapter import AdapterPlan
from streamshard.lora.replacements import Replacement
from streamshard.tensor_names import EMBEDDINGS, HEADS
from streamshard.tensors.comparing import equal_bytes
from streamshard.tensors.lazy import Lazy
from streamshard.tensors.workspace import Workspace
from streamshard.values import frozen

__all__ = ["Ends", "rows_of_both"]


@frozen
class Ends:
    """The names of embedding and head of a base that has them as one tensor, or never does."""

    embedding: str
    head: str
    tied: bool


def rows_of_both(
    plan: AdapterPlan,
    own: Sequence[Replacement],
    base: Mapping[str, Lazy],
    ends: Ends,
    work: Workspace,
    *,
    never_ties: bool,
) -> list[Replacement]:
    """What an adapter has for the embedding, for the head, if it means both; or the reverse.

    `never_ties` says that the class that was trained has two tensors. Raises `AdapterError` where it is
    not known whether it had.
    """
    if never_ties:
        return []
    tables = _tables_of_both(plan, own, ends) if ends.tied else []
    return tables + _token_rows_of_both(plan, own, base, ends, work)


def _tables_of_both(plan: AdapterPlan, own: Sequence[Replacement], ends: Ends) -> list[Replacement]:
    """The weight beneath the pair of one of the two, for the other one."""
    named = {place.target for name in plan.keys.whole for place in plan.homes[name]}
    both = {ends.embedding: ends.head, ends.head: ends.embedding}
    return [
        replace(r, target=both[r.target])
        for r in own
        if r.is_base and r.whole and r.target in both and both[r.target] not in named
    ]


def _token_rows_of_both(
    plan: AdapterPlan,
    own: Sequence[Replacement],
    base: Mapping[str, Lazy],
    ends: Ends,
    work: Workspace,
) -> list[Replacement]:
    rows = [r for r in own if r.is_tokens and r.target == ends.embedding]
    if not rows or any(r.is_tokens and r.target == ends.head for r in own):
        return []
    if ends.tied:
        _check_same_rows(plan)
    else:
        says, same = _says_tied(plan), _are_equal(base, ends, work)
        if says and not same:
            raise AdapterError(
                f"{plan.adapter.where}: trainable_token_indices names the head, but the file has rows of "
                "the embedding alone, so it was trained on a model that ties the two. In this base "
                f"'{printable(ends.head)}' has values of its own: give the base that it was trained on."
            )
        if not same:
            return []
        if not (says or plan.adapter.settings.ensure_weight_tying):
            raise AdapterError(
                f"{plan.adapter.where}: has trained token rows for "
                f"'{printable(ends.embedding)}'. Whether they are meant for the head, too, is not known: "
                f"this base has the same values in '{printable(ends.head)}', but its layout never ties "
                "the two, and a tied HF model has one tensor. Merge it into the HF base that it was "
                "trained on and convert the result (--layout custom). If it was trained on the custom "
                'model itself, add "auto_mapping": {"base_model_class": "InternVLChatModel"} to '
                "adapter_config.json."
            )
    return [replace(r, target=ends.head) for r in rows]


def _are_equal(base: Mapping[str, Lazy], ends: Ends, work: Workspace) -> bool:
    return equal_bytes(base[ends.embedding], base[ends.head], work)


def _check_same_rows(plan: AdapterPlan) -> None:
    """Refuse a file without rows of the head that are others than those of the embedding."""
    indices = plan.adapter.settings.token_indices
    own = [
        {
            index
            for name, rows in indices.items()
            if name.rpartition(".")[2] in ends
            for index in rows
        }
        for ends in (EMBEDDINGS, HEADS)
    ]
    if all(own) and own[0] != own[1]:
        raise AdapterError(
            f"{plan.adapter.where}: trainable_token_indices has other rows for the head than for the "
            "embedding, but the file has none of the head. It is incomplete: save or copy the adapter "
            "again."
        )


def _says_tied(plan: AdapterPlan) -> bool:
    """Whether the config has rows of a head that the file does not have: it has them once for both."""
    named = {name.rpartition(".")[2] for name in plan.adapter.settings.token_indices}
    return not named.isdisjoint(HEADS) and not named.isdisjoint(EMBEDDINGS)
