"""Merge LoRA adapters into InternVL checkpoints and convert them, tensor by tensor.

Importing this package imports neither numpy nor torch; the functions do when they are called.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

__all__ = ["StreamshardError", "__version__", "merge_lora"]

if TYPE_CHECKING:
    from streamshard.commands import merge_lora
    from streamshard.errors import StreamshardError

_HOMES = {"merge_lora": "streamshard.commands", "StreamshardError": "streamshard.errors"}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'streamshard' has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return sorted(__all__)
