"""Where the weights of an adapter of the other layout are in a base."""

from __future__ import annotations

from functools import cache

from streamshard.checkpoint.folder import Checkpoint
from streamshard.commands.identify import adapter_architecture
from streamshard.errors import InputError
from streamshard.internvl.layouts import pieces
from streamshard.internvl.model_config import OTHER, Dims, dims_from_config
from streamshard.internvl.spelling import flat_names
from streamshard.lora.name_matching import Carry, Place

__all__ = ["carry_of"]


def carry_of(source: Checkpoint, own: str | None) -> Carry | None:
    """Finds where updates of the other layout's weights go; None if the base is no InternVL."""
    if own is None or source.config is None:
        return None
    config, other = source.config, OTHER[own]

    @cache
    def spelled() -> dict[str, str]:
        return flat_names(source.tensors, own)

    @cache
    def dims_of(architecture: str | None) -> Dims:
        return dims_from_config(config, architecture=architecture)

    def places(name: str, rows: int) -> list[Place]:
        try:
            dims = dims_of(adapter_architecture(config, name))
            found = pieces(name, rows, dims, own)
        except InputError:
            return []
        made = []
        for piece in found:
            target = spelled().get(piece.target)
            if target is None:
                return []
            back = pieces(piece.target, source.tensors[target].rows, dims, other)
            whole = len(back) == 1 and sum(p.target == piece.target for p in found) == 1
            made.append(Place(target, piece.target_start, piece.source_start, piece.rows, whole))
        return made

    return places
