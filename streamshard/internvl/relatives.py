"""Relatives of InternVL: models with its modules and more, of which there is one layout only.

They can be merged, wrapped, extracted, compared and verified, but there is nothing to convert them
to. And names that a version of transformers has written for one of them by mistake.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from streamshard.errors import InputError, printable
from streamshard.internvl.config_classes import KINDS

__all__ = ["check_names", "no_conversion", "other_encoder", "relative_of"]

FLASH = "InternVL3_5-Flash"
# The modules that it has more than InternVL3_5, and the keys of its config.
_FLASH_MODULES = ("mlp2.", "pooling_before_gating.", "gating.")
_FLASH_KEYS = ("flash_mode", "flash_relative_threshold", "flash_absolute_threshold")

# The model_type of InternVL's own vision encoders, in configs of InternVL itself.
_ENCODERS = ("intern_vit_6b", "internvl_vision")

_BROKEN, _MEANT = "language_model.model.encoder.layers.", "language_model.model.layers."


def relative_of(names: Iterable[str], config: Mapping[str, Any] | None) -> str | None:
    """Which relative of InternVL a checkpoint is of, None if of none that is known."""
    if config is not None:
        kind = KINDS.get(str(config.get("model_type")))
        if kind is not None and kind.title:
            return kind.title
        if any(config.get(key) is not None for key in _FLASH_KEYS):
            return FLASH
    return FLASH if any(name.startswith(_FLASH_MODULES) for name in names) else None


def other_encoder(config: Mapping[str, Any] | None) -> str | None:
    """The model_type of a vision encoder that is not InternVL's, in a config of InternVL.

    The tables say nothing of such a model.

    >>> other_encoder({"model_type": "internvl", "vision_config": {"model_type": "siglip_vision_model"}})
    'siglip_vision_model'
    """
    vision = (config or {}).get("vision_config")
    kind = vision.get("model_type") if isinstance(vision, dict) else None
    return str(kind) if kind and kind not in _ENCODERS and relative_of((), config) is None else None


def no_conversion(where: str, title: str) -> InputError:
    """The error for a conversion of a relative."""
    return InputError(
        f"{where}: is of {title}, a relative of InternVL. There is no class of the other layout for "
        "it, so it cannot be converted. merge-lora, extract-lora, diff and verify take it as it is."
    )


def check_names(where: str, names: Iterable[str]) -> None:
    """Raise `InputError` for names that transformers wrote of Qianfan-OCR by mistake.

    Its `save_pretrained` puts the language model's layers where only a vision encoder has them, so
    that other readers take them for missing.
    """
    broken = next((name for name in names if _BROKEN in name), None)
    if broken is not None:
        raise InputError(
            f"{where}: '{printable(broken)}' is a name that transformers' save_pretrained wrote by "
            f"mistake for Qianfan-OCR: it should begin with '{_MEANT}'. Other programs take these "
            "tensors for missing. Save it again with save_original_format=False, or rename "
            f"'{_BROKEN}' to '{_MEANT}'."
        )
