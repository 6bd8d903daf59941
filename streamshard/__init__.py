"""Merge LoRA adapters into InternVL checkpoints and convert them, tensor by tensor.

Importing this package imports neither numpy nor torch; the functions do when they are called.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

__all__ = [
    "StreamshardError",
    "__version__",
    "compute_l2_distance",
    "convert_keys_back",
    "convert_keys_to_hf",
    "custom_to_hf",
    "diff",
    "extract_lora",
    "hf_to_custom",
    "inspect",
    "merge_lora",
    "verify",
    "wrap_backbone_lora",
    "wrap_llm_lora",
    "wrap_lora",
]

if TYPE_CHECKING:
    from streamshard.commands import custom_to_hf, hf_to_custom
    from streamshard.errors import StreamshardError
    from streamshard.extraction import extract_lora
    from streamshard.inspection import diff, inspect
    from streamshard.live import wrap_backbone_lora, wrap_llm_lora
    from streamshard.merging import merge_lora
    from streamshard.state_dicts import (
        compute_l2_distance,
        convert_keys_back,
        convert_keys_to_hf,
    )
    from streamshard.verification import verify
    from streamshard.wrapping import wrap_lora

_HOMES = {
    "StreamshardError": "errors",
    "compute_l2_distance": "state_dicts",
    "convert_keys_back": "state_dicts",
    "convert_keys_to_hf": "state_dicts",
    "custom_to_hf": "commands",
    "diff": "inspection",
    "extract_lora": "extraction",
    "hf_to_custom": "commands",
    "inspect": "inspection",
    "merge_lora": "merging",
    "verify": "verification",
    "wrap_backbone_lora": "live",
    "wrap_llm_lora": "live",
    "wrap_lora": "wrapping",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'streamshard' has no attribute {name!r}")
    from importlib import import_module

    if _HOMES[name] != "errors":
        from streamshard import limits

        limits.import_numpy()
    return getattr(import_module(f"streamshard.{_HOMES[name]}"), name)


def __dir__() -> list[str]:
    return sorted(__all__)
