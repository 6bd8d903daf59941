"""Which files of a repository are a model, or would be loaded together with another one.

One that stays beside a new output is loaded with it: because of an `adapter_config.json`, transformers
takes the base of that adapter instead, and a `tokenizer.json` goes before other files of a tokenizer.
"""

from __future__ import annotations

from streamshard.checkpoint.file_names import (
    CONFIGS,
    MODEL_CONFIG_NAME,
    TEMPLATE,
    TENSORS,
    TRAINING_STATE,
)

__all__ = ["is_model", "is_read"]


def is_model(name: str) -> bool:
    """Whether a file makes a repository that of a model: its config or weights, at the top."""
    return "/" not in name and (name == MODEL_CONFIG_NAME or _is_weight(name))


def is_read(name: str) -> bool:
    """Whether loaders choose a file by its name: weights, configs, and what a tokenizer consists of.

    Code they run only where a config names it.
    """
    if "/" in name or TRAINING_STATE.fullmatch(name) or name.endswith((".yaml", ".yml")):
        return bool(TEMPLATE.fullmatch(name))
    return _is_weight(name) or bool(CONFIGS.fullmatch(name.casefold()))


def _is_weight(name: str) -> bool:
    return not TRAINING_STATE.fullmatch(name) and (
        bool(TENSORS.fullmatch(name)) or name.endswith(".index.json")
    )
