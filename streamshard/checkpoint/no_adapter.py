"""What a path is that was given as an adapter, or in place of one, and is none: for messages."""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path

from streamshard.checkpoint.file_names import ADAPTER_CONFIG_NAME
from streamshard.checkpoint.folder import open_checkpoint
from streamshard.disk.existence import is_file, is_folder
from streamshard.disk.paths import PathLike, input_path
from streamshard.errors import (
    InputError,
    ReadError,
    StreamshardError,
    UsageError,
    argument,
    printable,
)
from streamshard.tensor_names import is_wrapped

__all__ = ["checkpoint_instead", "is_adapter_folder", "is_training_checkpoint"]


def is_training_checkpoint(path: PathLike) -> bool:
    """Whether it is a checkpoint with LoRA pairs inside, as far as it can be read."""
    try:
        return _is_wrapped(open_checkpoint(path).tensors)
    except (InputError, ReadError, UsageError):
        return False


def is_adapter_folder(path: PathLike) -> bool:
    """Whether it is a folder with the config of an adapter, as far as it can be looked at."""
    try:
        return is_file(input_path(path, "an adapter") / ADAPTER_CONFIG_NAME)
    except (StreamshardError, OSError):
        return False


def checkpoint_instead(path: Path) -> str | None:
    """What to do with a checkpoint that was given as an adapter; None if it is none."""
    try:
        found = open_checkpoint(path)
    except (InputError, ReadError, UsageError):
        return None
    if _is_wrapped(found.tensors):
        return (
            "It is a LoRA-wrapped training checkpoint, which has its base and its pairs inside: "
            f"`merge-lora {argument(path)}`."
        )
    if found.config is None or not is_folder(path):
        return None
    return (
        f"{printable(path.name)} is a whole model and no adapter: a full fine-tune has nothing to fold "
        "in and is complete as it is. Give the folder that PEFT's save_pretrained wrote."
    )


def _is_wrapped(names: Collection[str]) -> bool:
    """Whether there are pairs among the names, and what they are of: an adapter's file has pairs only."""
    return is_wrapped(names) and any(".base_layer." in name for name in names)
