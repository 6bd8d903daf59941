"""How versions of transformers spell HF names.

They begin the same names in different ways; the tables of `families` have one of these, the flat
spelling.
"""

from __future__ import annotations

from collections.abc import Iterable

from streamshard.errors import InputError, UsageError, printable
from streamshard.internvl.families import Layout
from streamshard.tensor_names import without_wrappers

__all__ = [
    "SPELLINGS",
    "WRITTEN_SPELLINGS",
    "flat_name",
    "flat_names",
    "flat_parts",
    "in_model",
    "is_qianfan",
    "spell",
]


# Beginnings of HF names as transformers wrote or writes them: head, language model, and what is
# before vision tower and projector. "flat" is on the hubs and read by every version; "nested" are
# the names of modules in memory; "hybrid" is what 5.4 and 5.5 wrote and others cannot read.
SPELLINGS: dict[str, tuple[str, str, str]] = {
    "flat": ("language_model.lm_head.", "language_model.model.", ""),
    "nested": ("lm_head.", "model.language_model.", "model."),
    "hybrid": ("language_model.lm_head.", "model.language_model.model.", "model."),
    "mid": ("lm_head.", "language_model.model.", ""),
    "short": ("lm_head.", "language_model.", ""),
}
_ENCODER, _QIANFAN = "vision_tower.encoder.layer.", "vision_tower.layers."
WRITTEN_SPELLINGS = ("flat", "nested")


def flat_name(name: str) -> str:
    """An HF name in the flat spelling, training wrappers removed; other names stay as they are.

    >>> flat_name("module.model.language_model.layers.0.mlp.up_proj.weight")
    'language_model.model.layers.0.mlp.up_proj.weight'
    >>> flat_name("model.lm_head.weight")
    'language_model.lm_head.weight'
    """
    return flat_parts(without_wrappers(name))[0]


def flat_parts(name: str) -> tuple[str, str, str]:
    """A name in the flat spelling, which entry of `SPELLINGS` begins it, and this beginning."""
    rest = name.removeprefix("model.")
    if rest in {"lm_head.weight", "language_model.lm_head.weight"}:
        return "language_model.lm_head.weight", "head", name.removesuffix("weight")
    if rest.startswith(("vision_tower.", "multi_modal_projector.")):
        flat = rest.replace(_QIANFAN, _ENCODER, 1) if rest.startswith(_QIANFAN) else rest
        return flat, "vision", name.removesuffix(rest)
    if rest.startswith("language_model."):
        tail = rest.removeprefix("language_model.").removeprefix("model.")
        # Most names are flat already, and one object for both saves megabytes.
        flat = f"language_model.model.{tail}"
        return name if flat == name else flat, "llm", name.removesuffix(tail)
    return name, "", ""


def spell(name: str, spelling: str) -> str:
    """A flat HF name in a spelling that may be written: "flat" or "nested".

    >>> spell("language_model.lm_head.weight", "nested")
    'lm_head.weight'
    """
    if spelling not in WRITTEN_SPELLINGS:
        raise UsageError(
            f"the spelling {spelling!r} cannot be written; {', '.join(WRITTEN_SPELLINGS)} can. "
            "Other spellings cannot be read by all versions of transformers."
        )
    if spelling == "flat":
        return name
    head, llm, vision = SPELLINGS[spelling]
    if name.startswith("language_model.lm_head."):
        return name.replace("language_model.lm_head.", head, 1)
    if name.startswith("language_model.model."):
        return name.replace("language_model.model.", llm, 1)
    return vision + name


def flat_names(names: Iterable[str], layout: Layout) -> dict[str, str]:
    """Each name as the tables have it (flat, no wrappers) to the name as given.

    Raises `InputError` if two of them are the same tensor.
    """
    found: dict[str, str] = {}
    for name in names:
        plain = flat_name(name) if layout == "hf" else without_wrappers(name)
        if plain in found:
            raise InputError(
                f"'{printable(found[plain])}' and '{printable(name)}' are both "
                f"'{printable(plain)}'. The checkpoint mixes spellings of several writers: keep "
                "one of each."
            )
        found[plain] = name
    return found


def is_qianfan(names: Iterable[str]) -> bool:
    """Whether names of the vision encoder are those that `QianfanOCRVisionModel` has in memory."""
    return any(_QIANFAN in name for name in names)


def in_model(name: str, layout: Layout, *, qianfan: bool = False) -> str:
    """The name that a tensor of the custom layout, or of HF's flat spelling, has in the live model."""
    if layout != "hf":
        return name
    return spell(name.replace(_ENCODER, _QIANFAN, 1) if qianfan else name, "nested")
