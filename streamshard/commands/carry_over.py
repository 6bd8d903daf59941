"""Carrying a checkpoint to the other layout, beside a reference folder of that layout.

Weights come from the source; config, remote code, tokenizer and processor from the reference.
What the two disagree on is an error, as it would be a wrong model.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from streamshard.checkpoint.file_names import MODEL_CONFIG_NAME, TOKENIZER
from streamshard.checkpoint.json_files import MAX_TOKENIZER_BYTES, read_json_object
from streamshard.commands.identify import Model, model_dims
from streamshard.commands.written_config import config_bytes
from streamshard.errors import InputError, UsageError, listed, printable
from streamshard.internvl.config_edits import config_fixes, with_dtype
from streamshard.internvl.detection import check_side
from streamshard.internvl.families import Layout
from streamshard.internvl.layouts import Converted, convert
from streamshard.internvl.model_config import INNER, OTHER, Dims
from streamshard.internvl.relatives import check_names
from streamshard.internvl.same_model import rope_scaling
from streamshard.internvl.shapes import check_shapes
from streamshard.internvl.spelling import flat_names
from streamshard.internvl.tables import counterparts, table_of
from streamshard.internvl.tied_embeddings import embedding_and_head
from streamshard.tensors.dtypes import TORCH_DTYPES
from streamshard.tensors.lazy import Lazy, Stored

__all__ = ["Differences", "Target", "carry_over"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Differences:
    """What to do where source and reference differ: whose tokenizer counts, what may be absent."""

    tokenizer_from: str | None = None
    allow_missing: bool = False
    allow_unexpected: bool = False


@dataclass(frozen=True, slots=True)
class Target:
    """A checkpoint carried over: its tensors and files, and what was missing or unexpected."""

    tensors: dict[str, Lazy]
    config: dict[str, Any] | None
    """`config.json` if the reference's must be changed; None if it can be copied."""
    base_config: dict[str, Any]
    """The reference's own."""
    side_files: dict[str, Path]
    reference: dict[str, Stored] | None
    missing: list[str]
    unexpected: list[str]
    warnings: list[str]
    layout: Layout
    dims: Dims

    def files(self, dtype: str) -> dict[str, Path | bytes]:
        """What is to lie beside the tensors when they are written as `--dtype` says."""
        config = self.config if dtype == "keep" else self.config or self.base_config
        own = {} if config is None else {MODEL_CONFIG_NAME: config_bytes(config, dtype)}
        return {**self.side_files, **own}


def carry_over(
    tensors: Mapping[str, Lazy],
    source: Model,
    reference: Model,
    layout: Layout,
    allowed: Differences,
) -> Target:
    """Bring `tensors` (those of `source`, perhaps merged) to `layout`, with what lies beside them.

    Raises `InputError` for missing or unexpected tensors that are not allowed, shapes other than the
    reference's, and vocabularies that differ while it is not said whose tokenizer belongs to the
    weights.
    """
    if reference.config is None:
        raise InputError(
            f"{reference.where}: has no config.json. The reference folder gives config "
            "and tokenizer of the layout to write: give the original model of that layout."
        )
    tokenizer_from = allowed.tokenizer_from
    if tokenizer_from not in (None, "source", "reference"):
        raise UsageError(
            f"--tokenizer-from is {tokenizer_from!r}; source or reference was expected."
        )
    dims = model_dims(source, reference, layout)
    given = _given(tensors, source, OTHER[layout])
    check_names(source.where, tensors)
    check_shapes(source.where, tensors, given, dims, OTHER[layout])
    result = convert(tensors, dims, layout, given=given)
    known = _named_alike(reference, dims, layout) if reference.tensors else None
    missing, unexpected = list(result.missing), list(result.unexpected)
    if known is not None:
        # Reported once: what lacks only because a part of it does goes by the part's name.
        table, reported = table_of(dims.family), set(missing)
        missing += [
            name
            for name in sorted(known.keys() - result.tensors.keys())
            if reported.isdisjoint(counterparts(table, layout, name))
        ]
        unexpected += sorted(result.tensors.keys() - known.keys() - set(unexpected))
    _refuse(missing, "missing", "--allow-missing", allowed.allow_missing, result, source)
    may = allowed.allow_unexpected
    _refuse(unexpected, "unexpected", "--allow-unexpected", may, result, source)
    embedding, head_name = embedding_and_head(result.tensors)
    config = config_fixes(reference.config, layout, has_head=head_name is not None)
    if config.get("quantization_config"):
        raise InputError(
            f"{reference.where}: its config.json has a quantization_config, but the "
            "weights to write are not quantized. Give the unquantized original model."
        )
    rows = None if embedding is None else result.tensors[embedding].shape[0]
    head = rows if head_name is None else result.tensors[head_name].shape[0]
    if rows != head:
        raise InputError(
            f"{source.where}: the embedding has {rows} rows, but the head has {head}. "
            "No model can load that: the checkpoint is damaged or was put together wrongly."
        )
    own = _vocabulary(known or {}) or config[INNER[layout]].get("vocab_size")
    if isinstance(own, int) and rows not in (None, own) and tokenizer_from is None:
        raise InputError(
            f"the embedding of {source.where} has {rows:,} rows, that of the reference "
            f"{reference.where} {own:,}: the vocabularies differ. Say whose tokenizer "
            "belongs to the weights: --tokenizer-from source (usual after adding tokens) or reference."
        )
    _check_shapes(result.tensors, known or {}, (embedding, head_name), reference)
    side_files = dict(reference.checkpoint.side_files)
    if tokenizer_from == "source":
        _take_tokenizer(source, side_files, config, layout)
    if rows is not None:
        config[INNER[layout]]["vocab_size"] = rows
    config = _true_dtype(config, result.tensors)
    return Target(
        tensors=result.tensors,
        config=None if config == reference.config else config,
        base_config=dict(reference.config),
        side_files=side_files,
        reference=known,
        missing=missing,
        unexpected=unexpected,
        warnings=_rope_warnings(source, reference, dims.family),
        layout=layout,
        dims=dims,
    )


def _given(tensors: Mapping[str, Lazy], source: Model, side: Layout) -> Mapping[str, str]:
    """The names of tensors by their flat names: those of `source`, perhaps with a head more."""
    if source.layout != side:
        check_side(tensors, side)
    given = source.given(side)
    return given if len(given) == len(tensors) else flat_names(tensors, side)


def _true_dtype(config: dict[str, Any], tensors: Mapping[str, Lazy]) -> dict[str, Any]:
    """The config with the dtype of the tensors, if they are all of one: loaders round to it."""
    found = {tensor.dtype for tensor in tensors.values()}
    names = {TORCH_DTYPES[dtype] for dtype in found if dtype in TORCH_DTYPES}
    return with_dtype(config, names.pop()) if len(found) == len(names) == 1 else config


def _named_alike(reference: Model, dims: Dims, layout: Layout) -> dict[str, Stored]:
    """The reference's tensors under the names that are written here, whatever its spelling."""
    given = _given(reference.tensors, reference, layout)
    own = replace(dims, tied=reference.dims.tied)
    found = convert(reference.tensors, own, layout, side=layout, given=given).tensors
    return {name: tensor for name, tensor in found.items() if isinstance(tensor, Stored)}


def _refuse(
    names: list[str],
    what: str,
    option: str,
    allowed: bool,
    result: Converted[Lazy],
    source: Model,
) -> None:
    if names and not allowed:
        reasons = [result.unexpected[name] for name in names[:1] if name in result.unexpected]
        raise InputError(
            f"{source.where}: {len(names)} tensors are {what}: {listed(names)}"
            f"{'; ' + reasons[0] if reasons else ''}. The output would not be the whole model. "
            f"Check that source and reference are of one model; {option} writes it nevertheless and "
            "reports the names."
        )


def _vocabulary(tensors: Mapping[str, Lazy]) -> int | None:
    embedding, _ = embedding_and_head(tensors)
    return None if embedding is None else tensors[embedding].shape[0]


def _check_shapes(
    tensors: Mapping[str, Lazy],
    known: Mapping[str, Lazy],
    of_tokens: Collection[str | None],
    reference: Model,
) -> None:
    for name, tensor in tensors.items():
        other = known.get(name)
        skip = 1 if name in of_tokens else 0
        if other is not None and tensor.shape[skip:] != other.shape[skip:]:
            raise InputError(
                f"{reference.where}: is of another model: '{printable(name)}' is "
                f"{list(other.shape)} there, but {list(tensor.shape)} in the source. Give the reference "
                "of the same model."
            )


def _take_tokenizer(
    source: Model, side_files: dict[str, Path], config: dict[str, Any], layout: Layout
) -> None:
    """Replace the reference's tokenizer by the source's, and the id that depends on it."""
    own = {n: f for n, f in source.checkpoint.side_files.items() if TOKENIZER.fullmatch(n)}
    if not own:
        raise InputError(
            f"{source.where}: has no tokenizer files, so --tokenizer-from source cannot "
            "be done. Give the folder with the tokenizer, or --tokenizer-from reference."
        )
    for name in [name for name in side_files if TOKENIZER.fullmatch(name)]:
        del side_files[name]
    side_files |= own
    if layout == "hf":
        config["image_token_id"] = _image_token_id(source)


def _image_token_id(source: Model) -> int:
    token = "<IMG_CONTEXT>"  # noqa: S105 - the token of text that stands for a part of an image
    files = source.checkpoint.side_files
    found: Any = None
    if "added_tokens.json" in files:
        found = read_json_object(files["added_tokens.json"]).get(token)
    if found is None and "tokenizer_config.json" in files:
        decoder = read_json_object(files["tokenizer_config.json"]).get("added_tokens_decoder")
        for number, entry in (decoder if isinstance(decoder, dict) else {}).items():
            if isinstance(entry, dict) and entry.get("content") == token and number.isdigit():
                found = int(number)
    if found is None and "tokenizer.json" in files:
        entries = read_json_object(files["tokenizer.json"], MAX_TOKENIZER_BYTES).get("added_tokens")
        for entry in entries if isinstance(entries, list) else []:
            if isinstance(entry, dict) and entry.get("content") == token:
                found = entry.get("id")
    if not isinstance(found, int) or isinstance(found, bool):
        raise InputError(
            f"{source.where}: its tokenizer files do not say which id {token} has, and "
            "the HF config needs it as image_token_id. Use --tokenizer-from reference."
        )
    return found


def _rope_warnings(source: Model, reference: Model, family: str) -> list[str]:
    """A hint where source and reference scale rotary positions in different ways."""
    if source.config is None or reference.config is None:
        return []
    one, other = rope_scaling(source.config, family), rope_scaling(reference.config, family)
    if one == other:
        return []
    mine, theirs = printable(str(one)), printable(str(other))
    return [f"rope_scaling is {mine} in the source but {theirs} in the reference, which is written"]
