"""What lies beside merged weights: config, remote code, which tensor goes into which file."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from streamshard.checkpoint.adapter_folder import AdapterFolder
from streamshard.checkpoint.folder import Checkpoint, open_checkpoint, tokenizer_files
from streamshard.checkpoint.shards import numbered_anew, shard_names
from streamshard.checkpoint.tokenizer import Content, Tokenizer
from streamshard.commands.carry_over import Target
from streamshard.commands.identify import Model
from streamshard.commands.whose_tokenizer import (
    after_merge,
    context_token,
    for_checkpoint,
)
from streamshard.disk.files import Files
from streamshard.disk.paths import PathLike
from streamshard.errors import AdapterError, listed, printable
from streamshard.internvl.config_edits import untied, with_vocabulary
from streamshard.internvl.layouts import convert
from streamshard.internvl.lora_targets import FLAGS
from streamshard.internvl.model_config import config_layout
from streamshard.internvl.tied_embeddings import is_stated_tied
from streamshard.lora.merge import Merged
from streamshard.notes import note
from streamshard.tensors.comparing import equal_bytes
from streamshard.tensors.lazy import Stored
from streamshard.tensors.workspace import Workspace
from streamshard.values import frozen

__all__ = ["Beside", "beside_merged", "converted_shards", "replaced_from", "shard_of", "with_code"]


@frozen
class Beside:
    """The config and the files that go beside merged weights."""

    config: Mapping[str, Any] | None
    side_files: Mapping[str, Content]
    rows: int | None = None
    """How many rows of tokens the weights have."""

    def tokenizer(self, where: str) -> Tokenizer:
        """The tokenizer among the files."""
        return Tokenizer.of(where, self.side_files)


def with_code(base: Model, beside: Beside, reference: PathLike | None) -> Beside:
    """With what a trainer did not save beside its checkpoint: code, `auto_map`, parts of a tokenizer."""
    config, side_files = beside.config, beside.side_files
    if reference is not None:
        donor = Model(open_checkpoint(reference, needs_weights=False))
        code = (donor.config or {}).get("auto_map")
        if config is not None and code is not None:
            config = {**config, "auto_map": config.get("auto_map", code)}
        own = beside.tokenizer(base.where)
        merges = donor.checkpoint.side_files.get("merges.txt")
        if merges is not None and own.lacks_merges and own.print == donor.tokenizer.print:
            side_files = {**side_files, "merges.txt": merges}
            own = Tokenizer.of(base.where, side_files)
        others = {n: c for n, c in side_files.items() if n not in own.files}
        theirs = {**donor.checkpoint.side_files, **others}
        return Beside(config, for_checkpoint(theirs, donor.tokenizer, own), beside.rows)
    coded = any(n.endswith(".py") for n in side_files) or (config or {}).get("auto_map")
    if not coded and config_layout(config or {}) != "hf":
        note(
            "the checkpoint's folder has no remote code (*.py), so the output cannot be loaded with "
            "trust_remote_code; --reference ORIGINAL takes what is missing from the original model"
        )
    return beside


def beside_merged(base: Model, result: Merged, folders: Sequence[AdapterFolder]) -> Beside:
    """Config and side files of a merged base: tie flags, vocabulary, and whose tokenizer it is."""
    config = base.config
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
    rows = max(sizes, default=None)
    if config is None:
        return Beside(config, base.checkpoint.side_files, rows)
    if any(config.get(flag) for flag in FLAGS):
        note(
            "the base's config has LoRA flags (use_llm_lora, use_backbone_lora), but no pairs: they are "
            "0 in the output's, which could not be loaded otherwise"
        )
        config = {**config, **dict.fromkeys(FLAGS, 0)}
    resized = old is not None and sizes != {old.shape[0]}
    if resized and rows is not None and old is not None:
        config = with_vocabulary(config, rows)
        note(f"the vocabulary has {rows:,} rows now, {old.shape[0]:,} before")
    elif rows is not None and config_layout(config) is not None:
        stated, config = config, with_vocabulary(config, rows)
        if config != stated:  # which no class could load
            note(
                f"the base's config states another vocab_size than the {rows:,} rows of its embedding: "
                "the output's has the number of rows"
            )
    tokenizers = [
        Tokenizer.of(printable(str(folder.path)), tokenizer_files(folder.path))
        for folder in folders
    ]
    with contextlib.closing(Files()) as opened:
        trained = _trained(base, result, names, Workspace(opened))
        found = after_merge(
            base.checkpoint.side_files, base.tokenizer, [t for t in tokenizers if t.files], trained
        )
    written = Tokenizer.of(base.where, found)
    if resized and old is not None and found == base.checkpoint.side_files:
        note(
            "no adapter folder has a tokenizer with tokens for the new rows: the base's is written"
        )
    if found != base.checkpoint.side_files and config_layout(config) == "hf":
        number = written.id_of(context_token(written))
        config = config if number is None else {**config, "image_token_id": number}
    return Beside(config, found, rows)


def _trained(
    base: Model, result: Merged, names: Iterable[str | None], work: Workspace
) -> Callable[[int], bool]:
    """Says of the id of a token whether its row in embedding or head is not that of the base."""
    changed = []
    for name in filter(None, names):
        before = base.tensors.get(name) or base.tensors.get(base.embedding_and_head[0] or "")
        if before is not None and result.tensors[name] is not before:
            changed.append((before, result.tensors[name]))

    def is_trained(number: int) -> bool:
        return any(
            number < after.rows
            and (
                number >= before.rows
                or not equal_bytes(
                    before.take(number, number + 1), after.take(number, number + 1), work
                )
            )
            for before, after in changed
        )

    return is_trained


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


def converted_shards(
    base: Model, result: Merged, tie: tuple[str, str] | None, carried: Target
) -> dict[str, str]:
    """The base's files for a result in another layout: also for values that are an adapter's."""
    if not result.replaced:
        return shard_names(carried.tensors, base.checkpoint)
    twins = {} if tie is None else {tie[1]: tie[0]}
    homes = {n: base.tensors.get(n, base.tensors.get(twins.get(n, n))) for n in result.tensors}
    before = {name: tensor for name, tensor in homes.items() if tensor is not None}
    places = convert(before, carried.dims, carried.layout).tensors
    return shard_names({n: places.get(n, t) for n, t in carried.tensors.items()}, base.checkpoint)


def shard_of(
    source: Checkpoint, tensors: Iterable[str], tie: tuple[str, str] | None
) -> dict[str, str]:
    """The base's files; a head that was none before goes where the embedding is."""
    twins = {} if tie is None else {tie[1]: tie[0]}
    files = {n: source.shard_of(n if n in source.tensors else twins[n]) for n in tensors}
    return numbered_anew(files, len(source.metadata))
