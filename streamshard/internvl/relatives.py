"""Relatives of InternVL: models with its modules and more, of which there is one layout only.

They can be merged, wrapped, extracted, compared and verified, but there is nothing to convert them
to. And names that a version of transformers has written for one of them by mistake.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from streamshard.errors import InputError, printable
from streamshard.internvl.config_classes import KINDS

__all__ = ["check_names", "no_conversion", "relative_of"]

FLASH = "InternVL3_5-Flash"
# The modules that it has more than InternVL3_5, and the keys of its config.
_FLASH_MODULES = ("mlp2.", "pooling_before_gating.", "gating.")
_FLASH_KEYS = ("flash_mode", "flash_relative_threshold", "flash_absolute_threshold")

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
