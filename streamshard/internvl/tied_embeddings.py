"""Embedding and head: which names they have, and whether a checkpoint means one tensor by both."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from typing import Any

from streamshard.errors import InputError
from streamshard.internvl.detection import Detected
from streamshard.internvl.model_config import INNER, config_layout, is_tied
from streamshard.internvl.spelling import SPELLINGS
from streamshard.tensor_names import EMBEDDINGS, HEADS

__all__ = ["embedding_and_head", "is_stated_tied", "tied_names"]


def embedding_and_head(tensors: Collection[str]) -> tuple[str | None, str | None]:
    """The names of the token embedding and of the language model's head, if it has them."""
    found: list[str | None] = []
    for modules in (EMBEDDINGS, HEADS):
        ends = tuple(f".{module}.weight" for module in modules)
        names = [n for n in tensors if n.endswith(ends) or n in {e.lstrip(".") for e in ends}]
        # A projection deep in a layer may be called output too.
        found.append(min(names, key=lambda name: name.count("."), default=None))
    return found[0], found[1]


def is_stated_tied(config: Mapping[str, Any] | None) -> bool:
    """Whether some loader may read a config as tying embedding and head.

    `InternVLChatModel` never ties them, whatever its config says.
    """
    if config is None or config_layout(config) == "custom":
        return False
    if config_layout(config) == "hf":
        inner = config.get(INNER["hf"])
        return is_tied(config, inner if isinstance(inner, dict) else {})
    return bool(config.get("tie_word_embeddings"))


def tied_names(
    embedding: str | None,
    head: str | None,
    config: Mapping[str, Any] | None,
    detected: Callable[[], Detected],
) -> tuple[str, str] | None:
    """The names of embedding and head if the config ties them, or if the head is not stored.

    Both may be stored all the same, with equal or with different bytes. `detected` says what the
    checkpoint is, or raises `InputError`.
    """
    if embedding is None or config is None or config_layout(config) == "custom":
        return None
    if head is not None:
        return (embedding, head) if is_stated_tied(config) else None
    if not is_stated_tied(config) and config.get("tie_word_embeddings") is False:
        return None
    try:
        spelling = detected().spelling
    except InputError:  # a language model by itself
        return embedding, "lm_head.weight"
    start = SPELLINGS[spelling if spelling in SPELLINGS else "flat"][0]
    return embedding, f"{start}weight"
