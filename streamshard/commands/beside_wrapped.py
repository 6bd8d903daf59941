"""Weights in the folder of a training checkpoint that are no part of it."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Mapping

from streamshard.checkpoint.folder import Checkpoint
from streamshard.checkpoint.trained_beside import tensors_in
from streamshard.disk.files import Files
from streamshard.errors import AdapterError, listed
from streamshard.tensor_names import plain_name
from streamshard.tensors.comparing import equal_bytes
from streamshard.tensors.constructors import cast
from streamshard.tensors.dtypes import FLOATS
from streamshard.tensors.lazy import Lazy
from streamshard.tensors.workspace import Workspace

__all__ = ["check_beside_wrapped"]


def check_beside_wrapped(found: Checkpoint, base: Mapping[str, str]) -> Checkpoint:
    """The checkpoint without those of its unlisted files that only repeat what it has.

    `base` are its tensors by their plain names. Raises `AdapterError` for a file with other values
    for the same names: which of both are those that were trained last, nothing says.
    """
    left = []
    for name in found.unlisted:
        tensors = tensors_in(found.path / name)
        named = {plain_name(key): tensor for key, tensor in tensors.items()}
        known = {key: tensor for key, tensor in named.items() if key in base}
        other = [key for key, tensor in known.items() if not _same(found, base[key], tensor)]
        if other:
            raise AdapterError.at(
                found.path / name,
                f"lies beside the checkpoint and has {len(tensors):,} tensors, of which {len(other):,} "
                f"differ from those of the same names in the checkpoint ({listed(other, 3)}): which were "
                "trained last is not known. Remove the file if it is stale; else put its values into "
                f"the checkpoint. The files that count are {listed(found.metadata, 3)}.",
            )
        if len(known) < len(named):
            left.append(name)
    return dataclasses.replace(found, unlisted=tuple(left))


def _same(found: Checkpoint, given: str, tensor: Lazy) -> bool:
    mine: Lazy = found.tensors[given]
    if mine.dtype != tensor.dtype and {mine.dtype, tensor.dtype} <= FLOATS.keys():
        mine, tensor = cast(mine, "F32"), cast(tensor, "F32")
    with contextlib.closing(Files()) as files:
        return equal_bytes(mine, tensor, Workspace(files))
