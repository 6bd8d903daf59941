"""Where the weights of an adapter of the other layout are in a base."""

from __future__ import annotations

import re
from collections.abc import Mapping
from functools import cache
from typing import Any

from streamshard.checkpoint import Checkpoint
from streamshard.errors import InputError
from streamshard.families import OTHER, Dims, dims_from_config
from streamshard.layouts import pieces
from streamshard.matching import Carry, Place
from streamshard.spelling import flat_names

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
            dims = dims_of(_adapter_architecture(config, name))
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


def _adapter_architecture(config: Mapping[str, Any], name: str) -> str | None:
    """The custom class that an adapter's name is of, where the base is HF and of type llama."""
    inner = config.get("text_config")
    if isinstance(inner, dict) and inner.get("model_type") == "llama":
        # Such a base does not say which custom class it came from; the adapter's names do.
        internlm2 = re.search(
            r"\.(?:attention\.w|feed_forward\.w|tok_embeddings\.)|language_model\.output\.", name
        )
        return "InternLM2ForCausalLM" if internlm2 else "LlamaForCausalLM"
    return None
