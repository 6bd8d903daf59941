"""By which names of other spellings and of the other layout an adapter may mean weights of a base."""

from __future__ import annotations

import re
from collections.abc import Iterable
from functools import cache

from streamshard.commands.identify import Model, architecture_of, is_of_internlm2
from streamshard.errors import InputError
from streamshard.internvl.detection import layout_of
from streamshard.internvl.layouts import pieces
from streamshard.internvl.model_config import OTHER, Dims, dims_from_config
from streamshard.internvl.spelling import flat_parts
from streamshard.internvl.tables import table_of
from streamshard.lora.name_matching import OtherNames, Place

__all__ = ["other_names"]


def other_names(base: Model) -> OtherNames:
    """How an adapter may call the weights of a base; of no other layout if it is no InternVL."""
    if base.layout is None or base.config is None:
        return OtherNames(_flat, never_ties=_never_ties)
    config, own, other = base.config, base.layout, OTHER[base.layout]

    @cache
    def dims_by(architecture: str | None) -> Dims:
        return dims_from_config(config, architecture=architecture)

    def places(name: str, rows: int) -> list[Place]:
        try:
            dims = dims_by(architecture_of(config, name))
            found = pieces(name, rows, dims, own)
        except InputError:
            return []
        made = []
        for piece in found:
            target = base.given(own).get(piece.target)
            if target is None:
                return []
            back = pieces(piece.target, base.tensors[target].rows, dims, other)
            whole = len(back) == 1 and sum(p.target == piece.target for p in found) == 1
            made.append(Place(target, piece.target_start, piece.source_start, piece.rows, whole))
        return made

    def parts() -> list[str]:
        """How names there begin, up to the number of a layer: of models that are a part of it."""
        try:
            family = dims_by(architecture_of(config)).family
        except InputError:
            return []
        table = table_of(family)
        found: dict[str, None] = {}
        for entry in table.entries:
            for name in entry.names(other):
                words = name.partition("{")[0].split(".")[:-1]
                starts = [".".join(words[: n + 1]) + "." for n in range(len(words))]
                found |= dict.fromkeys(s for s in starts if not re.search(r"\.\d+\.", s))
        return list(found)

    return OtherNames(_flat, places, parts, _never_ties)


def _never_ties(names: Iterable[str], base_class: str | None) -> bool:
    """Whether an adapter was trained on InternVLChatModel, by its names or by what its config says."""
    every = list(names)
    return (
        base_class == "InternVLChatModel"
        or layout_of(every) == "custom"
        or any(map(is_of_internlm2, every))
    )


def _flat(name: str) -> str:
    """A name in the flat spelling of transformers' InternVL classes."""
    return flat_parts(name)[0]
