"""Adapters on disk: an adapter folder, or a `.bin` file in it, as config and lazy tensors."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from streamshard.checkpoint.file_names import (
    ADAPTER_CONFIG_NAME,
    ADAPTER_NAME,
    MODEL_CONFIG_NAME,
    PICKLED_ADAPTER_NAME,
    SUFFIX,
)
from streamshard.checkpoint.folder import has, no_such
from streamshard.checkpoint.header import read_header
from streamshard.checkpoint.json_files import read_json_object
from streamshard.disk.paths import PathLike, input_path
from streamshard.disk.system import reading
from streamshard.errors import AdapterError, InputError, listed
from streamshard.tensors.lazy import Lazy

__all__ = ["AdapterFolder", "is_adapter", "open_adapter"]


@dataclass(frozen=True, slots=True)
class AdapterFolder:
    """A PEFT adapter as found on disk: its config, its tensors, and the file they are in."""

    path: Path
    file: Path
    config: dict[str, Any]
    tensors: Mapping[str, Lazy]


def is_adapter(folder: Path, names: Collection[str]) -> bool:
    """Whether a folder with files of these names is an adapter's, and no checkpoint's.

    A config of a model tells; else weights of an adapter do, or its config where no others are.
    """
    if MODEL_CONFIG_NAME in names:
        return False
    return any((folder / name).is_file() for name in (ADAPTER_NAME, PICKLED_ADAPTER_NAME)) or (
        ADAPTER_CONFIG_NAME in names and not any(name.endswith(SUFFIX) for name in names)
    )


def open_adapter(path: PathLike) -> AdapterFolder:
    """Open a folder with `adapter_config.json` and `adapter_model.safetensors` (or `.bin`).

    A `.bin` is read with torch's `weights_only=True`, so it cannot run code. Raises `InputError`
    or `AdapterError`.
    """
    path = input_path(path, "an adapter")
    with reading(path):
        return _open_adapter(path)


def _open_adapter(path: Path) -> AdapterFolder:
    if path.is_file() and path.name.startswith("adapter_model."):
        path = path.parent
    if not path.is_dir():
        raise no_such(path, "adapter folder")
    if not has(path / ADAPTER_CONFIG_NAME):
        inner = sorted(found.parent.name for found in path.glob(f"*/{ADAPTER_CONFIG_NAME}"))
        hint = (
            f"Adapters lie in its sub-folders {listed(inner)}: give one of these."
            if inner
            else "Give the folder that PEFT's save_pretrained wrote."
        )
        raise InputError.at(path, f"has no {ADAPTER_CONFIG_NAME}. {hint}")
    config = read_json_object(path / ADAPTER_CONFIG_NAME)
    file = path / ADAPTER_NAME
    if has(file):
        tensors: Mapping[str, Lazy] = read_header(file).tensors
    elif has(path / PICKLED_ADAPTER_NAME):
        file = path / PICKLED_ADAPTER_NAME
        tensors = _unpickle(file)
    else:
        raise InputError.at(
            path,
            f"has neither {ADAPTER_NAME} nor {PICKLED_ADAPTER_NAME}."
            " The folder is incomplete: copy or save the adapter again.",
        )
    if not tensors:
        raise AdapterError.at(file, "has no tensors; there is nothing to merge.")
    return AdapterFolder(path, file, config, tensors)


def _unpickle(file: Path) -> dict[str, Lazy]:
    from streamshard.checkpoint.pickled import read_pickled  # imports torch

    return read_pickled(file)
