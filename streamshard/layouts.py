"""The layouts of InternVL checkpoints, told apart by the names of their tensors."""

from __future__ import annotations

from collections.abc import Iterable

__all__ = ["layout_of"]


def layout_of(names: Iterable[str]) -> str | None:
    """Answer "custom", "hf", or None where the names do not tell.

    Names of the language model prove nothing: most families have the same in both layouts.
    """
    for name in names:
        parts = name.split(".")
        if "vision_model" in parts[:3] or parts[0] == "mlp1":
            return "custom"
        if "vision_tower" in parts[:2] or "multi_modal_projector" in parts[:2]:
            return "hf"
    return None
