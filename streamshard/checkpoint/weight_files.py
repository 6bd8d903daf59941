"""The weight files of a folder: which of them count, and their headers.

A checkpoint or adapter is one file of a known name, or several that an index of a known name lists; of
safetensors, or else of torch. Opening reads headers, pickles and JSON only.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Protocol, TypeVar, cast

from streamshard.checkpoint.file_names import (
    ADAPTER_CONFIG_NAME,
    CHECKPOINT_NAMES,
    PICKLED,
    SUFFIX,
    TRAINING_STATE,
    Names,
)
from streamshard.checkpoint.header import Header, read_header
from streamshard.checkpoint.json_files import MAX_JSON_BYTES, parse_index
from streamshard.checkpoint.lfs_pointers import check_pointer
from streamshard.checkpoint.other_folders import folders_of_models, inner_instead, what_instead
from streamshard.disk.existence import is_file, is_folder, is_link, is_there, names_in
from streamshard.disk.files import read_bytes
from streamshard.errors import InputError, argument, listed, printable
from streamshard.tensors.lazy import Lazy, Stored

__all__ = [
    "find_weights",
    "has",
    "has_weights",
    "instead_of_adapter",
    "is_of_adapter",
    "is_weight_file",
    "open_listed",
    "open_weights",
    "read_weights",
]


_SHARD = re.compile(rf"(.+)-(\d{{5}})-of-(\d{{5}}){re.escape(SUFFIX)}")
MAX_NAME_NBYTES = 255  # what file systems take


class _Opened(Protocol):
    """What a file was found to hold."""

    @property
    def tensors(self) -> Mapping[str, Lazy]:
        """Its tensors."""


_F = TypeVar("_F", bound=_Opened)


def is_weight_file(name: str) -> bool:
    """Whether files of such a name are read here, by its ending."""
    return name.endswith((SUFFIX, *PICKLED))


def is_of_adapter(file: Path) -> bool:
    """Whether a weight file is that of the adapter whose config lies beside it."""
    return file.name.startswith("adapter_model") and is_file(file.parent / ADAPTER_CONFIG_NAME)


def instead_of_adapter(path: Path) -> InputError:
    """The error for an adapter, folder or file, that was given as a checkpoint."""
    return InputError.at(
        path,
        "is a PEFT adapter, not a checkpoint. It goes with the model it was trained on: "
        f"`merge-lora --adapter {argument(path)} --base MODEL`.",
    )


def read_weights(file: Path) -> Header:
    """The header of a weight file, or what stands for one; raises `InputError`."""
    if file.name.endswith(SUFFIX):
        return read_header(file)
    from streamshard.checkpoint.pickled import read_pickled

    # Without copies all of them are in the file.
    return Header(cast("dict[str, Stored]", read_pickled(file, copies=False)), {})


def open_weights(folder: Path) -> dict[str, Header]:
    """The headers of a checkpoint's weight files, by name: those that its index lists, if it has one.

    Without one, the files of which each says that it is the I-th of N, if all N are there.
    """
    found = find_weights(folder, CHECKPOINT_NAMES)
    shards = [] if found else _all_of_them(folder)
    if shards:
        return _without_index(folder, shards)
    return open_listed(found or _only_other(folder), read_weights)


def has_weights(folder: Path) -> bool:
    """Whether a folder has a checkpoint's weights, be they complete or not."""
    names = names_in(folder)
    known = {name for both in CHECKPOINT_NAMES for name in both}
    return any(name in known or name.endswith(SUFFIX) for name in names)


def find_weights(folder: Path, kinds: Sequence[Names]) -> Path | None:
    """The index, or the one file, of the first kind that a folder has.

    Newer DeepSpeeds make a folder with the name of the file, and put index and shards there.
    """
    for index, single in kinds:
        if is_folder(folder / single) and not is_file(folder / index):
            inside = find_weights(folder / single, kinds)
            if inside is not None:
                return inside
        both = [name for name in (index, single) if has(folder / name)]
        if len(both) > 1 and set(_weight_map(folder / index).values()) != {single}:
            raise InputError.at(
                folder,
                f"has both {index} and {single}, and loaders "
                "disagree on which counts. Remove the stale one.",
            )
        if both:
            return folder / both[0]
    return None


def _all_of_them(folder: Path) -> list[str]:
    """The shards of a checkpoint by their names, if these say that none is missing and none too many."""
    names = [name for name in names_in(folder) if name.endswith(SUFFIX) and is_file(folder / name)]
    places = [found for name in names if (found := _SHARD.fullmatch(name))]
    stems, counts = {found[1] for found in places}, {int(found[3]) for found in places}
    if not (len(places) == len(names) > 1 and len(stems) == len(counts) == 1):
        return []
    numbers = {int(found[2]) for found in places}
    return names if numbers == {*range(1, max(counts) + 1)} else []


def _without_index(folder: Path, shards: Sequence[str]) -> dict[str, Header]:
    """The headers of shards, whose names must be different."""
    opened = {name: read_weights(folder / name) for name in shards}
    seen: dict[str, str] = {}
    for name, header in opened.items():
        twice = next((tensor for tensor in header.tensors if tensor in seen), None)
        if twice is not None:
            raise InputError.at(
                folder,
                f"has no {CHECKPOINT_NAMES[0].index_name}, and '{printable(twice)}' is in both "
                f"{printable(seen[twice])} and {printable(name)}: which counts is not known.",
            )
        seen |= dict.fromkeys(header.tensors, name)
    return opened


def _only_other(folder: Path) -> Path:
    """The one file of safetensors of a folder that has none of a known name, or an `InputError`."""
    others = [
        folder / name
        for name in names_in(folder)
        if name.endswith(SUFFIX)
        and not name.startswith("adapter_")
        and not TRAINING_STATE.fullmatch(name)
        and is_file(folder / name)
    ]
    if len(others) == 1:
        return others[0]
    names = CHECKPOINT_NAMES[0]
    if others:
        raise InputError.at(
            folder,
            f"has {len(others)} .safetensors files but no {names.index_name}, "
            "so what belongs together is not known. Fetch or save the index again, or give one file.",
        )
    instead = what_instead(folder)
    if instead is None and is_file(folder / ADAPTER_CONFIG_NAME):
        raise instead_of_adapter(folder)
    pickled = [name for name in names_in(folder) if _is_pickled(folder, name)]
    if len(pickled) == 1:
        instead = f"If they are in {printable(pickled[0])}, give that file itself."
    elif pickled and instead is None:
        instead = f"It has {listed(pickled, 3)}, but no {CHECKPOINT_NAMES[1].index_name}: add that."
    inner = folders_of_models(folder) if instead is None else []
    if inner:
        instead = inner_instead("A model", inner)
    hint = instead or f"Give a folder with {names.single} or an index."
    raise InputError.at(folder, f"has no weights of a model. {hint}")


def _is_pickled(folder: Path, name: str) -> bool:
    """Whether a file of torch may have a model's weights, by its name."""
    return name.endswith(PICKLED) and not TRAINING_STATE.fullmatch(name) and is_file(folder / name)


def open_listed(found: Path, read: Callable[[Path], _F]) -> dict[str, _F]:
    """The files that an index lists, or the one file itself, by name, each as `read` opens it.

    Raises `InputError` unless the index lists just what the files hold.
    """
    if not found.name.endswith(".json"):
        return {found.name: read(found)}
    weight_map = _weight_map(found)
    opened = {}
    for name in sorted(set(weight_map.values())):
        _check_file_name(found, name)
        file = found.parent / name
        if not has(file):
            raise InputError.at(
                found,
                f"names '{printable(name)}', which is not in the folder. "
                "The checkpoint is incomplete: fetch or copy that file.",
            )
        opened[name] = read(file)
        # The index shrinks as the headers come: what is left is missing, and never are all names
        # in memory twice.
        stray = [t for t in opened[name].tensors if weight_map.pop(t, None) != name]
        if stray:
            raise InputError.at(
                found,
                f"'{printable(name)}' holds {listed(stray)}, which the index does not "
                "list there. Files and index are not of one checkpoint.",
            )
    if weight_map:
        raise InputError.at(
            found,
            f"lists {listed(weight_map)}, which the files do not hold. "
            "Files and index are not of one checkpoint.",
        )
    return opened


def _weight_map(index: Path) -> dict[str, str]:
    text = read_bytes(index, MAX_JSON_BYTES)
    check_pointer(index, text)
    weight_map = parse_index(text, index).get("weight_map")
    if not isinstance(weight_map, dict) or not all(isinstance(v, str) for v in weight_map.values()):
        raise InputError.at(index, "has no weight_map from tensor names to file names.")
    if not weight_map:
        raise InputError.at(index, "lists no tensors.")
    return weight_map


def _check_file_name(index: Path, name: str) -> None:
    # Plain names only: no folder, drive or parent can be expressed, on any platform.
    suffix = SUFFIX if SUFFIX in index.name else PICKLED[0]
    plain = re.fullmatch(rf"[^/\\:\x00-\x1f]+{re.escape(suffix)}", name)
    if plain is None or len(name.encode(errors="replace")) > MAX_NAME_NBYTES:
        raise InputError.at(
            index,
            f"names the file '{printable(name)}'; only {suffix} files of the same "
            "folder are allowed. The index is damaged or hostile.",
        )


def has(file: Path) -> bool:
    """Whether there is a file of this name, also through a link.

    Raises `InputError` if the name is taken by something that cannot be read like a file: a folder,
    a pipe or device, which would hang, or a link that leads nowhere.
    """
    if is_file(file):
        return True
    if is_link(file) and not is_there(file):
        raise InputError.at(file, "is a link to nothing. Fetch the file or remove the link.")
    inside = (
        [n for n in names_in(file) if n.endswith((SUFFIX, *PICKLED))] if is_folder(file) else []
    )
    if inside:
        raise InputError.at(
            file,
            f"is a folder with {listed(inside, 3)}, but without their index. Save or fetch the index "
            "again, or give one file.",
        )
    if is_there(file):
        kind = "a folder" if is_folder(file) else "a pipe, socket or device"
        raise InputError.at(file, f"is {kind}; a file was expected. Move it elsewhere.")
    return False
