"""Checkpoints on disk: names to lazy tensors, the config, and the files beside the weights.

Opening reads headers and JSON only. Nothing found in these files is executed.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

from streamshard.checkpoint.file_names import (
    ADAPTER_CONFIG_NAME,
    INDEX_NAME,
    MODEL_CONFIG_NAME,
    NOT_CARRIED,
    NOT_ENTERED,
    SINGLE_NAME,
    SUFFIX,
    TEMPLATE,
    TEMPLATES,
    TOKENIZER,
)
from streamshard.checkpoint.header import Header, read_header
from streamshard.checkpoint.json_files import MAX_JSON_BYTES, parse_index, read_json_object
from streamshard.disk.existence import is_file, is_folder, is_link, is_there, names_in, walked
from streamshard.disk.files import read_bytes
from streamshard.disk.paths import PathLike, input_path
from streamshard.disk.system import reading, system
from streamshard.errors import InputError, listed, printable
from streamshard.tensors.lazy import Stored

__all__ = [
    "Checkpoint",
    "has",
    "no_such",
    "open_checkpoint",
    "open_weights",
    "outside",
    "tokenizer_files",
]


MAX_NAME_NBYTES = 255  # what file systems take


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """A checkpoint as found on disk.

    `tensors` are in file order, shard after shard; `metadata` is each file's, by the file's name.
    `config` is None where there is no `config.json`; `side_files` are what lies beside the weights
    and is carried along, by name relative to the folder.
    """

    path: Path
    tensors: dict[str, Stored]
    metadata: dict[str, dict[str, str]]
    config: dict[str, Any] | None
    side_files: dict[str, Path] = field(repr=False)

    def shard_of(self, name: str) -> str:
        """The name of the file that a tensor is in."""
        return Path(self.tensors[name].path).name


def open_checkpoint(path: PathLike, *, needs_weights: bool = True) -> Checkpoint:
    """Open a folder with an index, a folder with one `.safetensors` file, or such a file itself.

    A bare file has neither config nor side files. A folder without weights is accepted only if
    they are not needed. Raises `InputError` for what is missing, malformed or ambiguous,
    `ReadError` for what cannot be read.
    """
    path = input_path(path, "a checkpoint")
    with reading(path):
        if not is_there(path):
            raise no_such(path, "file or folder")
        if is_file(path) and path.suffix != SUFFIX:
            raise InputError.at(path, f"is no {SUFFIX} file. Give the checkpoint's folder.")
        if is_file(path):
            header = read_header(path)
            return _checkpoint(path, {path.name: header}, None, {})
        if not is_folder(path):
            raise InputError.at(path, "is neither a file nor a folder.")
        config = _read_config(path)
        if not needs_weights and not _weight_files(path):
            return Checkpoint(path, {}, {}, config, _side_files(path))
        return _checkpoint(path, open_weights(path), config, _side_files(path))


def open_weights(folder: Path) -> dict[str, Header]:
    """The headers of a folder's weight files, by name: those that its index lists, if it has one."""
    weights = _find_weights(folder)
    if weights.name == INDEX_NAME:
        return _open_index(weights)
    return {weights.name: read_header(weights)}


def no_such(path: Path, what: str) -> InputError:
    """The error for a path at which nothing is."""
    hint = "Check the path."
    if re.fullmatch(r"[\w.-]+/[\w.-]+(@\S+)?", str(path)):
        hint = "Hub ids are not supported yet: download it (hf download) and give the folder."
    return InputError.at(path, f"no such {what}. {hint}")


def _find_weights(folder: Path) -> Path:
    index, single = folder / INDEX_NAME, folder / SINGLE_NAME
    if has(index) and has(single) and not _lists_only(index, SINGLE_NAME):
        raise InputError.at(
            folder,
            f"has both {INDEX_NAME} and {SINGLE_NAME}, and loaders "
            "disagree on which counts. Remove the stale one.",
        )
    for found in (index, single):
        if has(found):
            return found
    others = [p for p in _weight_files(folder) if not p.name.startswith("adapter_") and is_file(p)]
    if len(others) == 1:
        return others[0]
    if others:
        raise InputError.at(
            folder,
            f"has {len(others)} .safetensors files but no {INDEX_NAME}, "
            "so what belongs together is not known. Add the index, or give one file.",
        )
    if is_file(folder / ADAPTER_CONFIG_NAME):
        raise InputError.at(
            folder,
            "is a PEFT adapter, not a checkpoint. "
            "Pass it as --adapter and the model it was trained on as --base.",
        )
    pickles = [name for name in names_in(folder) if fnmatchcase(name, "pytorch_model*.bin")]
    hint = (
        f"It has {listed(pickles, 2)}: convert these to safetensors first."
        if pickles
        else f"Give a folder with {SINGLE_NAME} or an index."
    )
    raise InputError.at(folder, f"has no .safetensors weights. {hint}")


def _lists_only(index: Path, name: str) -> bool:
    """Whether an index says that all tensors are in the one file of this name."""
    weight_map = parse_index(read_bytes(index, MAX_JSON_BYTES), index).get("weight_map")
    return isinstance(weight_map, dict) and set(map(str, weight_map.values())) == {name}


def _weight_files(folder: Path) -> list[Path]:
    # Not by `glob`, which takes a folder that may not be read for an empty one.
    return [folder / name for name in names_in(folder) if name.endswith(SUFFIX)]


def _open_index(index: Path) -> dict[str, Header]:
    weight_map = parse_index(read_bytes(index, MAX_JSON_BYTES), index).get("weight_map")
    if not isinstance(weight_map, dict) or not all(isinstance(v, str) for v in weight_map.values()):
        raise InputError.at(index, "has no weight_map from tensor names to file names.")
    if not weight_map:
        raise InputError.at(index, "lists no tensors.")
    headers = {}
    for name in sorted(set(weight_map.values())):
        _check_file_name(index, name)
        file = index.parent / name
        if not has(file):
            raise InputError.at(
                index,
                f"names '{printable(name)}', which is not in the folder. "
                "The checkpoint is incomplete: fetch or copy that file.",
            )
        headers[name] = read_header(file)
        # The index shrinks as the headers come: what is left is missing, and never are all names
        # in memory twice.
        stray = [t for t in headers[name].tensors if weight_map.pop(t, None) != name]
        if stray:
            raise InputError.at(
                index,
                f"'{printable(name)}' holds {listed(stray)}, which the index does not "
                "list there. Files and index are not of one checkpoint.",
            )
    if weight_map:
        raise InputError.at(
            index,
            f"lists {listed(weight_map)}, which the files do not hold. "
            "Files and index are not of one checkpoint.",
        )
    return headers


def _check_file_name(index: Path, name: str) -> None:
    # Plain names only: no folder, drive or parent can be expressed, on any platform.
    plain = re.fullmatch(r"[^/\\:\x00-\x1f]+\.safetensors", name)
    if plain is None or len(name.encode(errors="replace")) > MAX_NAME_NBYTES:
        raise InputError.at(
            index,
            f"names the file '{printable(name)}'; only .safetensors files of the same "
            "folder are allowed. The index is damaged or hostile.",
        )


def _checkpoint(
    path: Path,
    headers: Mapping[str, Header],
    config: dict[str, Any] | None,
    side_files: dict[str, Path],
) -> Checkpoint:
    tensors: dict[str, Stored] = {}
    for header in headers.values():
        tensors |= header.tensors
    if not tensors:
        raise InputError.at(path, "holds no tensors.")
    metadata = {file: header.metadata for file, header in headers.items()}
    return Checkpoint(path, tensors, metadata, config, side_files)


def _side_files(folder: Path) -> dict[str, Path]:
    """Everything that is to be carried along, by its name relative to the folder."""
    found = {}
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
                continue
            if has(file):
                _check_link(folder, file)
                found[file.relative_to(folder).as_posix()] = file
    return found


def tokenizer_files(folder: Path) -> dict[str, Path]:
    """The files of a folder that may be a tokenizer's, by name: also code, which its settings name."""
    with reading(folder):
        names = names_in(folder)
        if TEMPLATES in names and is_folder(folder / TEMPLATES):
            names = [*names, *(f"{TEMPLATES}/{name}" for name in names_in(folder / TEMPLATES))]
        found = {}
        for name in sorted(names):
            path = folder / name
            tokenizers = TOKENIZER.fullmatch(name) or TEMPLATE.fullmatch(name)
            if tokenizers and has(path):
                _check_link(folder, path)
                found[name] = path
            elif name.endswith(".py") and is_file(path) and not is_link(path):
                found[name] = path
        return found


def has(file: Path) -> bool:
    """Whether there is a file of this name, also through a link.

    Raises `InputError` if the name is taken by something that cannot be read like a file: a folder,
    a pipe or device, which would hang, or a link that leads nowhere.
    """
    if is_file(file):
        return True
    if is_link(file) and not is_there(file):
        raise InputError.at(file, "is a link to nothing. Fetch the file or remove the link.")
    if is_there(file):
        kind = "a folder" if is_folder(file) else "a pipe, socket or device"
        raise InputError.at(file, f"is {kind}; a file was expected. Remove it.")
    return False


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
