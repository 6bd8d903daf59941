"""Trained token rows of a model whose head is its embedding, in bases that have both.

PEFT trains one set of rows for both and saves it once. The custom layout never ties the two, so its
config does not say whether a model that an adapter was trained on did.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from streamshard.errors import AdapterError, printable
from streamshard.lora.adapter import AdapterPlan
from streamshard.lora.replacements import Replacement
from streamshard.tensor_names import EMBEDDINGS, HEADS
from streamshard.tensors.comparing import equal_bytes
from streamshard.tensors.lazy import Lazy
from streamshard.tensors.workspace import Workspace

__all__ = ["Ends", "rows_of_both"]


@dataclass(frozen=True, slots=True)
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
    """The rows that an adapter has for the embedding, for the head, if it means both.

    `never_ties` says that the class that was trained has two tensors. Raises `AdapterError` where it is
    not known whether it had.
    """
    rows = [r for r in own if r.is_tokens and r.target == ends.embedding]
    if never_ties or not rows or any(r.is_tokens and r.target == ends.head for r in own):
        return []
    if not ends.tied:
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
    one, other = base[ends.embedding], base[ends.head]
    return one.shape == other.shape and equal_bytes(one, other, work)


def _says_tied(plan: AdapterPlan) -> bool:
    """Whether the config has rows of a head that the file does not have: it has them once for both."""
    named = {name.rpartition(".")[2] for name in plan.adapter.settings.token_indices}
    return not named.isdisjoint(HEADS) and not named.isdisjoint(EMBEDDINGS)
