"""Carrying a checkpoint to the other layout, beside a reference folder of that layout.

Weights come from the source; config, remote code, tokenizer and processor from the reference.
What the two disagree on is an error, as it would be a wrong model.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import replace
from typing import Any

from streamshard.checkpoint.file_names import MODEL_CONFIG_NAME
from streamshard.checkpoint.tokenizer import Content, Tokenizer
from streamshard.commands.identify import Model, model_dims
from streamshard.commands.whose_tokenizer import after_conversion, image_token_id, note_beyond
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
from streamshard.lora.base_checks import quantization_keys
from streamshard.notes import note
from streamshard.tensors.dtypes import TORCH_DTYPES
from streamshard.tensors.lazy import Lazy, Stored
from streamshard.values import frozen

__all__ = ["Differences", "Target", "carry_over"]


@frozen(kw_only=True)
class Differences:
    """What to do where source and reference differ: whose tokenizer counts, what may be absent."""

    tokenizer_from: str | None = None
    allow_missing: bool = False
    allow_unexpected: bool = False


@frozen
class Target:
    """A checkpoint carried over: its tensors and files, and what was missing or unexpected."""

    tensors: dict[str, Lazy]
    config: dict[str, Any] | None
    """`config.json` if the reference's must be changed; None if it can be copied."""
    base_config: dict[str, Any]
    """The reference's own."""
    side_files: Mapping[str, Content]
    reference: dict[str, Stored] | None
    missing: list[str]
    unexpected: list[str]
    layout: Layout
    dims: Dims

    def files(self, dtype: str) -> dict[str, Content]:
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
    tokenizer: Tokenizer | None = None,
) -> Target:
    """Bring `tensors` (those of `source`, perhaps merged) to `layout`, with what lies beside them.

    `tokenizer` is that of the tensors, by default the source's. Raises `InputError` for missing or
    unexpected tensors that are not allowed, shapes other than the reference's, and tokenizers that
    differ while it is not said which of them belongs to the weights.
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
    reference.check()
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
    for key in quantization_keys(config):
        raise InputError(
            f"{reference.where}: its config.json has a {key}, but the weights to write are not "
            "quantized. Give the unquantized original model; if that key is left over, remove it."
        )
    rows = None if embedding is None else result.tensors[embedding].shape[0]
    head = rows if head_name is None else result.tensors[head_name].shape[0]
    if rows != head:
        raise InputError(
            f"{source.where}: the embedding has {rows} rows, but the head has {head}. "
            "No model can load that: the checkpoint is damaged or was put together wrongly."
        )
    side_files = after_conversion(
        source.tokenizer if tokenizer is None else tokenizer,
        reference.tokenizer,
        reference.checkpoint.side_files,
        (rows, _vocabulary(known or {}) or config[INNER[layout]].get("vocab_size")),
        tokenizer_from,
        layout,
    )
    _check_shapes(result.tensors, known or {}, (embedding, head_name), reference)
    if tokenizer_from == "source" and layout == "hf":
        config["image_token_id"] = image_token_id(Tokenizer.of(source.where, side_files))
    note_beyond(side_files, rows, reference.tokenizer, source.tokenizer)
    if rows is not None:
        config[INNER[layout]]["vocab_size"] = rows
    note(*_rope_warnings(source, reference, dims.family))
    config = _true_dtype(config, result.tensors)
    return Target(
        tensors=result.tensors,
        config=None if config == reference.config else config,
        base_config=dict(reference.config),
        side_files=side_files,
        reference=known,
        missing=missing,
        unexpected=unexpected,
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


def _rope_warnings(source: Model, reference: Model, family: str) -> list[str]:
    """A hint where source and reference scale rotary positions in different ways."""
    if source.config is None or reference.config is None:
        return []
    one, other = rope_scaling(source.config, family), rope_scaling(reference.config, family)
    if one == other:
        return []
    mine, theirs = printable(str(one)), printable(str(other))
    return [f"rope_scaling is {mine} in the source but {theirs} in the reference, which is written"]
