"""Checkpoints on disk: names to lazy tensors, the config, and the files beside the weights.

Opening reads headers and JSON only. Nothing found in these files is executed.
"""

from __future__ import annotations

import os
import re
from collections.abc import Collection, Mapping
from dataclasses import field
from pathlib import Path
from typing import Any

from streamshard.checkpoint.file_names import (
    CHECKPOINT_NAMES,
    MODEL_CONFIG_NAME,
    NOT_CARRIED,
    NOT_ENTERED,
    SUFFIX,
    TEMPLATE,
    TEMPLATES,
    TOKENIZER,
    TRAINING_STATE,
    written_name,
)
from streamshard.checkpoint.header import Header
from streamshard.checkpoint.json_files import read_json_object
from streamshard.checkpoint.lfs_pointers import MAX_POINTER_NBYTES, check_pointer
from streamshard.checkpoint.nothing_there import instead
from streamshard.checkpoint.weight_files import (
    has,
    has_weights,
    instead_of_adapter,
    is_of_adapter,
    is_weight_file,
    open_weights,
    read_weights,
)
from streamshard.disk.existence import (
    found,
    is_file,
    is_folder,
    is_link,
    is_there,
    names_in,
    walked,
)
from streamshard.disk.far import far_at
from streamshard.disk.files import open_source
from streamshard.disk.inputs import Inputs
from streamshard.disk.paths import PathLike, input_path
from streamshard.disk.system import reading, system
from streamshard.errors import InputError, listed, printable
from streamshard.tensors.lazy import Stored
from streamshard.values import frozen

__all__ = ["Checkpoint", "no_such", "open_checkpoint", "outside", "tokenizer_files"]


# Names of files that DeepSpeed makes folders of.
_FILES = [names.single for names in CHECKPOINT_NAMES]


@frozen
class Checkpoint:
    """A checkpoint as found on disk.

    `tensors` are in file order, shard after shard; `metadata` is each file's, by the file's name.
    `config` is None where there is no `config.json`; `side_files` are what lies beside the weights
    and is carried along, by name relative to the folder. `unlisted` are names of weight files beside
    those of the checkpoint, in the same folder, which are no part of it.
    """

    path: Path
    tensors: dict[str, Stored]
    metadata: dict[str, dict[str, str]]
    config: dict[str, Any] | None
    side_files: dict[str, Path] = field(repr=False)
    unlisted: tuple[str, ...] = ()

    @property
    def warnings(self) -> list[str]:
        """What is to be said of weights in the folder that are not used."""
        if not self.unlisted:
            return []
        return [
            f"{printable(str(self.path))}: {listed(self.unlisted)} beside the weights of the checkpoint "
            "were not used: neither its index nor the names that loaders know tell that they belong to it"
        ]

    def shard_of(self, name: str) -> str:
        """The name of the file that a tensor is in, as a file of safetensors."""
        return written_name(os.path.basename(self.tensors[name].path))  # noqa: PTH119 - of each tensor


def open_checkpoint(path: PathLike, *, needs_weights: bool = True) -> Checkpoint:
    """Open a folder with an index, a folder with one weight file, or such a file itself.

    Weights are safetensors, or what torch saved (`.bin`). What lies beside a file that is given itself
    goes with it, if a `config.json` is there. A folder without weights is accepted only if they are not
    needed. Raises `InputError` for what is missing, malformed or ambiguous, `ReadError` for what cannot
    be read.
    """
    path = input_path(path, "a checkpoint")
    with reading(path):
        if not is_there(path):
            raise no_such(path, "file or folder")
        if is_file(path):
            return _open_file(path)
        if not is_folder(path):
            raise InputError.at(path, "is neither a file nor a folder.")
        config = _read_config(path)
        if config is None and path.name in _FILES and is_file(path.parent / MODEL_CONFIG_NAME):
            # As of a file of this name, what lies beside goes with it.
            config, beside = _read_config(path.parent), _beside(path.parent)[0]
            return _checkpoint(path, open_weights(path), config, beside, [])
        if not needs_weights and not has_weights(path):
            return Checkpoint(path, {}, {}, config, _beside(path)[0])
        return _checkpoint(path, open_weights(path), config, *_beside(path))


def _open_file(path: Path) -> Checkpoint:
    if not is_weight_file(path.name):
        raise InputError.at(path, f"is no {SUFFIX} or .bin file. Give the checkpoint's folder.")
    if is_of_adapter(path):
        raise instead_of_adapter(path)
    headers = {path.name: read_weights(path)}
    indexes = [path.parent / names.index_name for names in CHECKPOINT_NAMES]
    # One of several files is not what the config beside it describes.
    config = None if any(is_file(index) for index in indexes) else _read_config(path.parent)
    side_files = {} if config is None else _beside(path.parent)[0]
    return _checkpoint(path, headers, config, side_files, [])


def no_such(path: Path, what: str) -> InputError:
    """The error for a path at which nothing is."""
    return InputError.missing(path, f"no such {what}. {instead(path)}")


def _checkpoint(
    path: Path,
    headers: Mapping[str, Header],
    config: dict[str, Any] | None,
    side_files: dict[str, Path],
    others: Collection[str],
) -> Checkpoint:
    tensors: dict[str, Stored] = {}
    for header in headers.values():
        tensors |= header.tensors
    if not tensors:
        raise InputError.at(path, "holds no tensors.")
    metadata = {file: header.metadata for file, header in headers.items()}
    unlisted = tuple(name for name in others if name not in headers)
    return Checkpoint(path, tensors, metadata, config, side_files, unlisted)


def _beside(folder: Path) -> tuple[dict[str, Path], list[str]]:
    """Everything that is to be carried along, and weights, by their names relative to the folder."""
    carried: dict[str, Path] = {}
    weights: list[str] = []
    for parent, folders, names in walked(folder):
        folders[:] = sorted(name for name in folders if not NOT_ENTERED.fullmatch(name))
        linked = [name for name in folders if is_link(parent / name)]
        if linked:
            raise InputError.at(
                parent,
                f"{listed(linked)}: a link to a folder is not followed, and "
                "leaving it out would make the output incomplete. Put the folder in its place, or "
                "remove the link.",
            )
        for name in sorted(names):
            file = parent / name
            if NOT_CARRIED.fullmatch(name):
                if parent == folder and _is_stranger(name):
                    weights.append(name)
            elif has(file):
                _check_link(folder, file)
                _check_fetched(file)
                carried[file.relative_to(folder).as_posix()] = file
    return carried, weights


def _is_stranger(name: str) -> bool:
    """Whether weights of this name are to be told of, where they are no part of a checkpoint.

    What a trainer needs to go on is not, nor is what other loaders take for the same model.
    """
    same = re.match(r"pytorch_model[-.]|consolidated[-.]", name)
    return is_weight_file(name) and not (same or TRAINING_STATE.fullmatch(name))


def _check_fetched(file: Path) -> None:
    """Refuse to carry what only stands for a file: the output would be without that."""
    elsewhere = far_at(file)
    if elsewhere is not None and elsewhere.local() is None:
        return  # nobody has looked at it, nor will
    there = found(file)
    if there is not None and 0 < there.st_size <= MAX_POINTER_NBYTES:
        # No input by that: it may never be carried.
        ended = Inputs()
        ended.close()
        with open_source(file, ended) as opened:
            check_pointer(file, opened.read(0, MAX_POINTER_NBYTES))


def tokenizer_files(folder: Path) -> dict[str, Path]:
    """The files of a folder that may be a tokenizer's, by name: also code, which its settings name."""
    with reading(folder):
        names = names_in(folder)
        if TEMPLATES in names and is_folder(folder / TEMPLATES):
            names = [*names, *(f"{TEMPLATES}/{name}" for name in names_in(folder / TEMPLATES))]
        files = {}
        for name in sorted(names):
            path = folder / name
            tokenizers = TOKENIZER.fullmatch(name) or TEMPLATE.fullmatch(name)
            if tokenizers and has(path):
                _check_link(folder, path)
                _check_fetched(path)
                files[name] = path
            elif name.endswith(".py") and is_file(path) and not is_link(path):
                files[name] = path
        return files


def _check_link(folder: Path, file: Path) -> None:
    """Refuse to carry what lies elsewhere: a hostile folder may link to anyone's secrets."""
    target = outside(folder, file) if is_link(file) else None
    if target is None:
        return
    raise InputError.at(
        file,
        f"is a link to {printable(str(target))}, outside of the folder and "
        "of the hub's cache, and would be copied into the output. If that is meant, put the file "
        "itself there (cp -L).",
    )


def outside(folder: Path, file: Path) -> Path | None:
    """Where a file is, if links lead out of the folder and not into the hub's cache; else None."""
    with reading(file):
        target = Path(system.realpath(file))
        blobs = target.parent  # where that cache keeps what the links in its snapshots lead to
        cached = blobs.name == "blobs" and is_folder(blobs.parent / "snapshots")
        inside = target.is_relative_to(system.realpath(folder))
    return None if cached or inside else target


def _read_config(folder: Path) -> dict[str, Any] | None:
    file = folder / MODEL_CONFIG_NAME
    return read_json_object(file) if has(file) else None
