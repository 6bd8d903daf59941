"""What is written of a merge: in the layout and beside the files of the base, or in another layout."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from streamshard.checkpoint.file_names import MODEL_CONFIG_NAME
from streamshard.checkpoint.folder import open_checkpoint
from streamshard.checkpoint.tokenizer import Content
from streamshard.commands.carry_over import Differences, carry_over
from streamshard.commands.identify import Model
from streamshard.commands.merge_inputs import Asked, Inputs
from streamshard.commands.merged_folder import (
    Beside,
    converted_shards,
    replaced_from,
    shard_of,
    with_code,
)
from streamshard.commands.whose_tokenizer import note_beyond
from streamshard.commands.written_config import config_bytes
from streamshard.disk.paths import PathLike, input_path
from streamshard.internvl.detection import layout_of
from streamshard.internvl.families import Layout
from streamshard.lora.merge import Merged
from streamshard.notes import note
from streamshard.tensors.dtypes import DTYPES, TORCH_DTYPES
from streamshard.tensors.lazy import Lazy, Stored
from streamshard.values import frozen

__all__ = ["Folded", "Written", "converted", "kept"]

_NARROW = {TORCH_DTYPES[name]: option for option, name in DTYPES.items() if name != "F32"}
"""How `--dtype` calls what is narrower than fp32, by its name in a config."""


@frozen
class Folded:
    """A base with adapters folded in; embedding and head if these were one; the adapters' facts."""

    merged: Merged
    tie: tuple[str, str] | None
    facts: Sequence[Mapping[str, Any]]


@frozen
class Written:
    """What is written of a merge, in the base's layout or in another one."""

    tensors: Mapping[str, Lazy]
    layout: str | None
    shard_of: Mapping[str, str]
    metadata: Mapping[str, Mapping[str, str]]
    files: Mapping[str, Content]
    reference: Mapping[str, Stored]
    """What the base had where values were replaced."""
    donors: Sequence[Path] = ()
    """Other folders that files are from."""
    missing: Sequence[str] = ()
    unexpected: Sequence[str] = ()


def converted(
    asked: Asked,
    inputs: Inputs,
    folded: Folded,
    beside: Beside,
    goal: tuple[Layout, PathLike],
    dtype: str,
) -> Written:
    """The result in the other layout, beside the files of the reference."""
    base, reference = inputs.base, Model(open_checkpoint(goal[1], needs_weights=False))
    allowed = Differences(
        tokenizer_from=asked.tokenizer_from,
        allow_missing=asked.allow_missing,
        allow_unexpected=asked.allow_unexpected,
    )
    tokenizer = beside.tokenizer(base.where)
    carried = carry_over(folded.merged.tensors, base, reference, goal[0], allowed, tokenizer)
    return Written(
        tensors=carried.tensors,
        layout=layout_of(carried.tensors),
        shard_of=converted_shards(base, folded.merged, folded.tie, carried),
        metadata={},
        files=carried.files(dtype),
        reference=replaced_from(base, folded.merged, folded.tie, carried),
        donors=[reference.path],
        missing=carried.missing,
        unexpected=carried.unexpected,
    )


def kept(asked: Asked, inputs: Inputs, folded: Folded, beside: Beside, dtype: str) -> Written:
    """The result in the layout and the files of the base."""
    base = inputs.base
    if asked.checkpoint is not None:
        beside = with_code(base, beside, asked.reference)
    note_beyond(beside.side_files, beside.rows, base.tokenizer)
    files = dict(beside.side_files)
    if beside.config is None:
        gives = "--reference ORIGINAL gives it" if asked.checkpoint else "copy that of the original"
        note(
            f"{base.where}: has no config.json; the output has none either, and cannot be loaded so: "
            f"{gives}"
        )
    elif asked.checkpoint or beside.config != base.config or dtype != "keep":
        files[MODEL_CONFIG_NAME] = config_bytes(beside.config, dtype)
    tensors = folded.merged.tensors
    if asked.checkpoint is not None and dtype == "keep":
        _note_width(base, tensors)
    return Written(
        tensors=tensors,
        layout=base.layout,
        shard_of=shard_of(base.checkpoint, tensors, folded.tie),
        metadata=base.checkpoint.metadata,
        files=files,
        reference=replaced_from(base, folded.merged, folded.tie),
        donors=[] if asked.reference is None else [input_path(asked.reference, "the reference")],
        missing=inputs.missing,
    )


def _note_width(base: Model, tensors: Mapping[str, Lazy]) -> None:
    """Note that weights are wider than the model was."""
    config = base.config or {}
    stated = str(config.get("torch_dtype") or config.get("dtype"))
    if stated in _NARROW and all(tensor.dtype == "F32" for tensor in tensors.values()):
        note(
            "the checkpoint is fp32, as DeepSpeed's zero_to_fp32 writes it, and so is the output, though "
            f"its config.json says {stated}: --dtype {_NARROW[stated]} writes half of the bytes"
        )
