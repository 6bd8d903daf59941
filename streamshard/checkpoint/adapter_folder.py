"""Adapters on disk: a folder with a config, and tensors in one file or in several with an index."""

from __future__ import annotations

import contextlib
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path
from typing import Any

from streamshard.checkpoint.file_names import (
    ADAPTER_CONFIG_NAME,
    ADAPTER_NAME,
    ADAPTER_NAMES,
    MODEL_CONFIG_NAME,
    PICKLED_ADAPTER_NAME,
    SUFFIX,
)
from streamshard.checkpoint.folder import no_such
from streamshard.checkpoint.header import read_header
from streamshard.checkpoint.json_files import read_json_object
from streamshard.checkpoint.no_adapter import checkpoint_instead
from streamshard.checkpoint.other_folders import inner_instead, what_instead
from streamshard.checkpoint.trained_beside import TrainedFile, trained_beside
from streamshard.checkpoint.weight_files import find_weights, has, open_listed
from streamshard.disk.existence import is_file, is_folder, names_in
from streamshard.disk.paths import PathLike, input_path
from streamshard.disk.system import reading
from streamshard.errors import AdapterError, InputError
from streamshard.tensors.lazy import Lazy
from streamshard.values import frozen

__all__ = ["AdapterFolder", "is_adapter", "open_adapter"]


@frozen
class AdapterFolder:
    """A PEFT adapter as found on disk: its config, its tensors, and the file or index that has them.

    `files` are the weight files by name, each with its tensors; `beside` what else in the folder has
    trained weights, and `warnings` what is to be said of that.
    """

    path: Path
    file: Path
    config: dict[str, Any]
    files: Mapping[str, Mapping[str, Lazy]]
    beside: tuple[TrainedFile, ...] = ()
    warnings: tuple[str, ...] = ()

    @property
    def tensors(self) -> Mapping[str, Lazy]:
        """All tensors of the adapter's own files."""
        if len(self.files) == 1:
            return next(iter(self.files.values()))
        return {name: tensor for file in self.files.values() for name, tensor in file.items()}


def is_adapter(folder: Path, names: Collection[str]) -> bool:
    """Whether a folder with files of these names is an adapter's, and no checkpoint's.

    A config of a model tells; else weights of an adapter do, or its config where no others are.
    """
    if MODEL_CONFIG_NAME in names:
        return False
    return any(is_file(folder / name) for both in ADAPTER_NAMES for name in both) or (
        ADAPTER_CONFIG_NAME in names and not any(name.endswith(SUFFIX) for name in names)
    )


def open_adapter(path: PathLike) -> AdapterFolder:
    """Open a folder with `adapter_config.json` and `adapter_model.safetensors` (or `.bin`).

    Several weight files need an index of that name. Raises `InputError` or `AdapterError`.
    """
    path = input_path(path, "an adapter")
    with reading(path):
        return _open_adapter(path)


def _open_adapter(path: Path) -> AdapterFolder:
    if is_file(path) and path.name.startswith("adapter_model"):
        path = path.parent
    if is_file(path):
        hint = checkpoint_instead(path) or "Give the folder that it is in."
        raise InputError.at(path, f"is a file; an adapter is a folder. {hint}")
    if not is_folder(path):
        raise no_such(path, "adapter folder")
    if not has(path / ADAPTER_CONFIG_NAME):
        inner = list(_folders_of_adapters(path))
        hint = (
            inner_instead("An adapter", inner)
            if inner
            else what_instead(path)
            or checkpoint_instead(path)
            or "Give the folder that PEFT's save_pretrained wrote."
        )
        raise InputError.at(path, f"has no {ADAPTER_CONFIG_NAME}. {hint}")
    config = read_json_object(path / ADAPTER_CONFIG_NAME)
    file = find_weights(path, ADAPTER_NAMES)
    if file is None:
        raise InputError.at(
            path,
            f"has neither {ADAPTER_NAME} nor {PICKLED_ADAPTER_NAME}. "
            + (what_instead(path) or "The folder is incomplete: copy or save the adapter again."),
        )
    files = {name: opened.tensors for name, opened in open_listed(file, _opened).items()}
    if not any(files.values()):
        raise AdapterError.at(file, "has no tensors; there is nothing to merge.")
    beside, warnings = trained_beside(path, files)
    return AdapterFolder(path, file, config, files, beside, warnings)


@frozen
class _File:
    tensors: Mapping[str, Lazy]


def _opened(file: Path) -> _File:
    if file.name.endswith(SUFFIX):
        return _File(read_header(file).tensors)
    from streamshard.checkpoint.pickled import read_pickled

    return _File(read_pickled(file))


_WEIGHTS = {names.single for names in ADAPTER_NAMES} | {names.index_name for names in ADAPTER_NAMES}


def _folders_of_adapters(path: Path) -> Iterator[str]:
    """Folders in a folder that hold adapters, as far as they can be looked at."""
    with contextlib.suppress(PermissionError):
        for name in names_in(path):
            with contextlib.suppress(PermissionError):
                inside = names_in(path / name) if is_folder(path / name) else []
                if ADAPTER_CONFIG_NAME in inside and {*inside} & _WEIGHTS:
                    yield name
