"""What lies beside merged weights: config, remote code, which tensor goes into which file."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from streamshard.checkpoint.adapter_folder import AdapterFolder
from streamshard.checkpoint.file_names import TOKENIZER
from streamshard.checkpoint.folder import Checkpoint, open_checkpoint, tokenizer_files
from streamshard.checkpoint.shards import numbered_anew
from streamshard.commands.carry_over import Target
from streamshard.commands.identify import Model
from streamshard.disk.paths import PathLike
from streamshard.errors import AdapterError, listed
from streamshard.internvl.config_edits import untied, with_vocabulary
from streamshard.internvl.layouts import convert
from streamshard.internvl.model_config import config_layout
from streamshard.internvl.tied_embeddings import is_stated_tied
from streamshard.lora.merge import Merged
from streamshard.tensors.lazy import Stored

__all__ = ["Beside", "beside_merged", "replaced_from", "shard_of", "with_code"]


@dataclass(frozen=True, slots=True)
class Beside:
    """The config and the files that go beside merged weights, and warnings."""

    config: Mapping[str, Any] | None
    side_files: Mapping[str, Path]
    warnings: tuple[str, ...] = ()


def with_code(beside: Beside, reference: PathLike | None) -> Beside:
    """With what a trainer did not save beside its checkpoint, remote code and `auto_map`."""
    config, side_files = beside.config, beside.side_files
    if reference is not None:
        donor = open_checkpoint(reference, needs_weights=False)
        code = (donor.config or {}).get("auto_map")
        if config is not None and code is not None:
            config = {**config, "auto_map": config.get("auto_map", code)}
        return Beside(config, {**donor.side_files, **side_files})
    if any(n.endswith(".py") for n in side_files) or config_layout(config or {}) == "hf":
        return Beside(config, side_files)
    warning = (
        "the checkpoint's folder has no remote code (*.py), so the output cannot be loaded with "
        "trust_remote_code; --reference ORIGINAL takes what is missing from the original model"
    )
    return Beside(config, side_files, (warning,))


def beside_merged(base: Model, result: Merged, folders: Sequence[AdapterFolder]) -> Beside:
    """Config and side files of a merged base: tie flags, and what goes with a resized vocabulary."""
    config, side_files = base.config, base.checkpoint.side_files
    names = _embedding_and_head(base, result)
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
        or (is_stated_tied(config) and names[1] in base.tensors and touched & set(names))
    ):
        config = untied(config)
    old = None if names[0] is None else base.tensors.get(names[0])
    if old is None or sizes == {old.shape[0]} or config is None:
        return Beside(config, side_files)
    rows = sizes.pop()
    tokenizers = [tokenizer_files(folder.path) for folder in folders]
    own = next((found for found in reversed(tokenizers) if found), None)
    note = f"the vocabulary has {rows:,} rows now, {old.shape[0]:,} before"
    if own is None:
        note += "; no adapter folder has a tokenizer, so the base's is kept, without the new tokens"
    else:
        side_files = {n: f for n, f in side_files.items() if not TOKENIZER.fullmatch(n)} | own
        note += "; the tokenizer is that of the adapter folder"
    return Beside(with_vocabulary(config, rows), side_files, (note,))


def _embedding_and_head(base: Model, result: Merged) -> tuple[str | None, str | None]:
    """The names of both in a merged base: a head that was none before is one more."""
    embedding, head = base.embedding_and_head
    if head is None and base.tie is not None and base.tie[1] in result.tensors:
        head = base.tie[1]
    return embedding, head


def replaced_from(
    base: Model, result: Merged, tie: tuple[str, str] | None, carried: Target | None = None
) -> dict[str, Stored]:
    """What the base had where values were replaced, by the names of the output.

    `carried` is what the result became in another layout. Parts of fused tensors are left out.
    """
    before = {name: base.tensors[name] for name in result.replaced if name in base.tensors}
    if result.untied and tie is not None:
        before[tie[1]] = base.tensors.get(tie[1], base.tensors[tie[0]])
    if carried is None or not before:
        return before
    found = convert(before, carried.dims, carried.layout).tensors
    return {name: tensor for name, tensor in found.items() if isinstance(tensor, Stored)}


def shard_of(
    source: Checkpoint, tensors: Iterable[str], tie: tuple[str, str] | None
) -> dict[str, str]:
    """The base's files; a head that was none before goes where the embedding is."""
    twins = {} if tie is None else {tie[1]: tie[0]}
    files = {n: source.shard_of(n if n in source.tensors else twins[n]) for n in tensors}
    return numbered_anew(files, len(source.metadata))
