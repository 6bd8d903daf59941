"""What lies beside merged weights: config, remote code, which tensor goes into which file."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from streamshard.checkpoint.adapter_folder import AdapterFolder
from streamshard.checkpoint.file_names import TOKENIZER
from streamshard.checkpoint.folder import Checkpoint, open_checkpoint, tokenizer_files
from streamshard.checkpoint.shards import numbered_anew
from streamshard.commands.identify import model_dims
from streamshard.disk.paths import PathLike
from streamshard.errors import AdapterError, listed
from streamshard.internvl.config_edits import untied, with_vocabulary
from streamshard.internvl.layouts import convert
from streamshard.internvl.model_config import config_layout
from streamshard.internvl.tied_embeddings import embedding_and_head, is_stated_tied
from streamshard.lora.adapter import Merged
from streamshard.tensors.lazy import Stored

__all__ = ["merged_config", "replaced_from", "shard_of", "with_code"]


def with_code(
    config: dict[str, Any] | None,
    side_files: dict[str, Path],
    reference: PathLike | None,
    warnings: list[str],
) -> tuple[dict[str, Any] | None, dict[str, Path]]:
    """What a trainer did not save beside its checkpoint, remote code and `auto_map`, by a reference."""
    if reference is not None:
        donor = open_checkpoint(reference, needs_weights=False)
        side_files = {**donor.side_files, **side_files}
        code = (donor.config or {}).get("auto_map")
        if config is not None and code is not None:
            config = {**config, "auto_map": config.get("auto_map", code)}
    elif not any(n.endswith(".py") for n in side_files) and config_layout(config or {}) != "hf":
        warnings.append(
            "the checkpoint's folder has no remote code (*.py), so the output cannot be loaded with "
            "trust_remote_code; --reference ORIGINAL takes what is missing from the original model"
        )
    return config, side_files


def merged_config(
    source: Checkpoint, result: Merged, folders: Sequence[AdapterFolder]
) -> tuple[dict[str, Any] | None, dict[str, Path]]:
    """Config and side files of a merged base: tie flags, and what goes with a resized vocabulary."""
    config, side_files = source.config, dict(source.side_files)
    names = embedding_and_head(result.tensors)
    sizes = {result.tensors[name].shape[0] for name in names if name is not None}
    if len(sizes) > 1:
        both = listed([name for name in names if name])
        raise AdapterError(
            f"{both} would have {' and '.join(map(str, sizes))} rows, "
            "but no model can load that: the adapter has resized only one of them. Save it again "
            "with both (save_embedding_layers=True), or add lm_head to modules_to_save."
        )
    touched = {*result.updated, *result.replaced}
    if config is not None and (
        result.untied
        or (is_stated_tied(config) and names[1] in source.tensors and touched & set(names))
    ):
        config = untied(config)
    old = None if names[0] is None else source.tensors.get(names[0])
    if old is None or sizes == {old.shape[0]} or config is None:
        return config, side_files
    rows = sizes.pop()
    config = with_vocabulary(config, rows)
    tokenizers = [tokenizer_files(folder.path) for folder in folders]
    own = next((found for found in reversed(tokenizers) if found), None)
    note = f"the vocabulary has {rows:,} rows now, {old.shape[0]:,} before"
    if own is None:
        note += "; no adapter folder has a tokenizer, so the base's is kept, without the new tokens"
    else:
        side_files = {n: f for n, f in side_files.items() if not TOKENIZER.fullmatch(n)} | own
        note += "; the tokenizer is that of the adapter folder"
    result.warnings.append(note)
    return config, side_files


def replaced_from(
    source: Checkpoint,
    result: Merged,
    tie: tuple[str, str] | None,
    folder: Checkpoint | None = None,
    layout: str = "keep",
) -> dict[str, Stored]:
    """What the base had where values were replaced, by the names of the output.

    `folder` is the reference of a conversion to `layout`. Parts of fused tensors are left out.
    """
    before = {name: source.tensors[name] for name in result.replaced if name in source.tensors}
    if result.untied and tie is not None:
        before[tie[1]] = source.tensors.get(tie[1], source.tensors[tie[0]])
    if folder is None or not before:
        return before
    carried = convert(before, model_dims(source, folder, layout), layout).tensors
    return {name: tensor for name, tensor in carried.items() if isinstance(tensor, Stored)}


def shard_of(
    source: Checkpoint, tensors: Iterable[str], tie: tuple[str, str] | None
) -> dict[str, str]:
    """The base's files; a head that was none before goes where the embedding is."""
    twins = {} if tie is None else {tie[1]: tie[0]}
    files = {n: source.shard_of(n if n in source.tensors else twins[n]) for n in tensors}
    return numbered_anew(files, len(source.metadata))
