"""Weights that lie beside an adapter's own: trainers save there what LoRA did not freeze.

Every weight file of a folder is accounted for: it is the adapter's, or a trainer's state, or another
model's, or it is opened here, and whoever merges the adapter must find a place for each tensor of it.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from pathlib import Path

from streamshard.checkpoint.file_names import (
    ADAPTER_CONFIG_NAME,
    ADAPTER_NAMES,
    MODEL_CONFIG_NAME,
    NOT_ENTERED,
    OTHER_ARRAYS,
    SUFFIX,
    TENSORS,
    TRAINING_STATE,
)
from streamshard.checkpoint.header import read_header
from streamshard.disk.existence import is_link, walked
from streamshard.errors import AdapterError, InputError, listed, printable
from streamshard.tensors.lazy import Lazy
from streamshard.values import frozen

__all__ = ["TrainedFile", "tensors_in", "trained_beside"]


@frozen
class TrainedFile:
    """A file with weights that lies beside an adapter's own, and its tensors by name."""

    file: Path
    tensors: Mapping[str, Lazy]


def trained_beside(
    folder: Path, own: Collection[str]
) -> tuple[tuple[TrainedFile, ...], tuple[str, ...]]:
    """The files with weights in a folder that are not its `own`, and warnings of what is not read in it.

    States of trainers are left out, by their names and by what is in them. Raises `AdapterError` for
    a file that cannot be read, and may hold weights.
    """
    known = {*own, *(name for both in ADAPTER_NAMES for name in both)}
    found, others, unread = [], [], []
    for parent, folders, names in walked(folder, strict=False):
        if parent != folder and {ADAPTER_CONFIG_NAME, MODEL_CONFIG_NAME} & set(names):
            folders.clear()
            others.append(parent.relative_to(folder).as_posix())
            continue
        folders[:] = sorted(
            n for n in folders if not NOT_ENTERED.fullmatch(n) and not is_link(parent / n)
        )
        for name in sorted(names):
            if TRAINING_STATE.fullmatch(name) or (parent == folder and name in known):
                continue
            if OTHER_ARRAYS.fullmatch(name):
                unread.append((parent / name).relative_to(folder).as_posix())
            if not TENSORS.fullmatch(name):
                continue
            tensors = tensors_in(parent / name)
            if tensors:
                found.append(TrainedFile(parent / name, tensors))
    where, warnings = printable(str(folder)), []
    if others:
        warnings.append(
            f"{where}: there are models or adapters of their own in {listed(others)}, which were not "
            "merged: give such an adapter as one more --adapter"
        )
    if unread:
        warnings.append(
            f"{where}: {listed(unread)} may hold weights, in a format that is not read here: what was "
            "trained with the adapter and is only there was not merged"
        )
    return tuple(found), tuple(warnings)


def tensors_in(file: Path) -> Mapping[str, Lazy]:
    """The tensors of a file that may have some; raises `AdapterError` if it cannot be read."""
    try:
        if file.name.lower().endswith(SUFFIX):
            return read_header(file).tensors
        from streamshard.checkpoint.pickled import look_into

        return look_into(file)
    except InputError as error:
        raise AdapterError(
            f"{error} The file lies beside other weights, so it may hold what was trained with them; if "
            "it does not, move it elsewhere."
        ) from error
