"""`merge_lora`: adapters into a base, or the pairs of a training checkpoint into itself."""

from __future__ import annotations

import contextlib
import dataclasses
import math
import os
import time
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, cast

from streamshard.adapter_plan import Adapter, Merged
from streamshard.carrying import carry_of
from streamshard.checkpoint import (
    TOKENIZER,
    AdapterFolder,
    Checkpoint,
    open_adapter,
    open_checkpoint,
    tokenizer_files,
)
from streamshard.commands import conversion_job
from streamshard.conversion import carry_over, model_dims, numbered_anew
from streamshard.detection import layout_of
from streamshard.digests import file_digest
from streamshard.errors import AdapterError, InputError, UsageError, listed, printable
from streamshard.experts import EXPERT_ORDERS
from streamshard.families import (
    OTHER,
    config_layout,
    untied,
    with_vocabulary,
)
from streamshard.files import Files
from streamshard.hazards import check_not_merged
from streamshard.inputs import watched
from streamshard.layouts import convert
from streamshard.limits import told
from streamshard.lora import check_base, merge
from streamshard.paths import PathLike, input_path
from streamshard.peft_config import read_settings
from streamshard.provenance import check_given_twice, check_record, other_base
from streamshard.report import Report
from streamshard.run import Job, Options, check_places, run
from streamshard.tensors import Stored, Workspace, equal_bytes
from streamshard.ties import embedding_and_head, is_stated_tied, tied_names
from streamshard.unwrapping import open_wrapped

__all__ = ["merge_lora"]


@told
@watched
def merge_lora(
    *,
    base: PathLike | None = None,
    adapter: PathLike | Sequence[PathLike] | None = None,
    checkpoint: PathLike | None = None,
    output: PathLike | None = None,
    weight: Sequence[float] | None = None,
    layout: str = "keep",
    reference: PathLike | None = None,
    tokenizer_from: str | None = None,
    alpha: float | None = None,
    adapter_name: str | None = None,
    base_is_residual: bool = False,
    expert_order: str = "peft",
    allow_merged_base: bool = False,
    **options: Any,
) -> Report:
    """Fold LoRA pairs into the weights that they adapt, and write the result to a new folder.

    Every merged element is `W + sum of weight * s * B @ A`, accumulated in fp32 and rounded once
    to nearest even (DoRA: scaled by its magnitudes before); whole modules and token rows that were
    trained replace what the base has; every other tensor and file is copied as bytes.

    `base` is a folder or a `.safetensors` file, `adapter` one adapter folder or several, whose
    updates are summed; they may have been trained in another layout than the base's. Instead of both,
    `checkpoint` is a LoRA-wrapped training checkpoint of InternVL, which has the pairs inside; their
    `alpha` is twice the rank unless given, as in InternVL's trainer. `output` defaults to
    `./<base name>-merged`. `layout` "custom" or "hf" converts in the same pass; config and
    tokenizer then come from `reference`, a folder of that layout (which also gives a training
    checkpoint the remote code that it lacks). `adapter_name` chooses among
    adapters in one file. `base_is_residual` states that the base is what PiSSA or the like left
    behind, `expert_order` ("peft" or "unsloth") how the factors of fused experts are ordered,
    `allow_merged_base` that a base which seems to hold the adapter already is meant. Further keywords
    are those of `streamshard.run.Options`.

    Raises a `StreamshardError`; its class says what is wrong (`streamshard.errors`).
    """
    started, chosen = time.perf_counter(), Options(**options)
    if layout not in ("keep", *OTHER):
        raise UsageError(f"--layout is {layout!r}; keep, custom or hf can be chosen.")
    if expert_order not in EXPERT_ORDERS:
        raise UsageError(f"--expert-order is {expert_order!r}; {' or '.join(EXPERT_ORDERS)} it is.")
    folders: list[AdapterFolder] = []
    warnings: list[str] = []
    if checkpoint is not None:
        if base is not None or adapter is not None or weight:
            raise UsageError(
                "a training checkpoint has its base and its pairs inside: give either CHECKPOINT, or "
                "--adapter and --base."
            )
        source, adapters, warnings = open_wrapped(
            checkpoint, alpha=alpha, adapter_name=adapter_name
        )
    else:
        if base is None or adapter is None:
            raise UsageError("give --adapter and --base, or a LoRA-wrapped training CHECKPOINT.")
        if alpha is not None:
            raise UsageError(
                "--alpha is for training checkpoints; an adapter's config has its own."
            )
        if layout == "keep" and (reference is not None or tokenizer_from is not None):
            raise UsageError(
                "--reference and --tokenizer-from would change nothing here: they belong to --layout "
                "custom or hf. Give that too, or leave them out."
            )
        source = open_checkpoint(base)
        folders = _open_adapters(adapter)
        adapters = _adapters(
            folders,
            weight,
            adapter_name=adapter_name,
            base_is_residual=base_is_residual,
            expert_order=expert_order,
        )
    check_base(source.tensors, source.config)
    own = layout_of(source.tensors)
    converts = _converts(layout, own, reference, source)
    name = source.path.absolute().name.removesuffix(".safetensors")
    output = f"{name}-merged" if output is None else output
    inputs = [source.path, *(f.path for f in folders)]
    inputs += [input_path(reference, "the reference")] if reference is not None else []
    target = check_places(output, inputs, overwrite=chosen.overwrite)
    with contextlib.closing(Files()) as files:
        work = Workspace(files)
        tie = _tie(source, work)
        carry = carry_of(source, own)
        result = merge(source.tensors, adapters, work, carry, tie)
        for one in adapters if checkpoint is None and not allow_merged_base else ():
            alone = result
            if len(adapters) > 1 or one.weight != 1:
                full = dataclasses.replace(one, weight=1.0)
                alone = merge(source.tensors, [full], work, carry, tie)
            check_not_merged(alone, work)
    for own_folder, described in zip(folders, result.facts, strict=False):
        described["digest"] = file_digest(own_folder.file)
        described["base_model_name_or_path"] = own_folder.config.get("base_model_name_or_path")
        result.warnings += other_base(described["base_model_name_or_path"], source)
    check_given_twice(result.facts)
    if not allow_merged_base:
        check_record(source, result.facts)
    facts: dict[str, Any] = {
        "merged": len({*result.updated, *result.replaced}),
        "base": str(source.path),
        "adapters": result.facts,
        "warnings": [*warnings, *result.warnings],
    }
    choices = {
        "weight": list(weight or []),
        "layout": layout,
        "tokenizer_from": tokenizer_from,
        "alpha": alpha,
        "adapter_name": adapter_name,
        "expert_order": expert_order,
    }
    config, side_files = _merged_config(source, result, folders)
    if converts is not None:
        folder = open_checkpoint(converts, needs_weights=False)
        converted = carry_over(
            result.tensors, source, folder, layout, tokenizer_from=tokenizer_from
        )
        facts["warnings"] += converted.warnings
        job = conversion_job(
            "merge-lora", target, started, source, converted, str(source.path), facts, chosen.dtype
        )
        return run(
            dataclasses.replace(
                job,
                reference=_replaced_from(source, result, tie, folder, layout),
                compares_sources=True,
                must_change=True,
                choices=choices,
            ),
            chosen,
        )
    if checkpoint is not None:
        config, side_files = _with_code(config, side_files, reference, facts["warnings"])
    if config is None:
        where = printable(str(source.path))
        facts["warnings"].append(f"{where}: has no config.json; the output has none either")
    job = Job(
        command="merge-lora",
        output=target,
        started=started,
        tensors=result.tensors,
        shard_of=_shard_of(source, result.tensors, tie),
        metadata=source.metadata,
        config=config if checkpoint or config != source.config or chosen.dtype != "keep" else None,
        side_files=side_files,
        l2_from=str(source.path),
        reference=_replaced_from(source, result, tie),
        compares_sources=True,
        must_change=True,
        facts=facts,
        choices=choices,
    )
    return run(job, chosen)


def _converts(
    layout: str, own: str | None, reference: PathLike | None, source: Checkpoint
) -> PathLike | None:
    """The reference folder if a merge is to convert too; raises `UsageError` if it lacks one."""
    if layout in ("keep", own):
        return None
    if own is None:
        raise InputError(
            f"{printable(str(source.path))}: is neither of the custom nor of the HF layout, so it "
            "cannot be converted: it has no tensors of an InternVL vision encoder or projector."
        )
    if reference is None:
        raise UsageError(
            f"--layout {layout} needs --reference: a folder of that layout, which gives config, "
            "tokenizer and code (the original model; weights are not needed)."
        )
    return reference


def _with_code(
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


def _open_adapters(adapter: PathLike | Sequence[PathLike]) -> list[AdapterFolder]:
    one = isinstance(adapter, (str, bytes, os.PathLike)) or not isinstance(adapter, Iterable)
    paths = [cast("PathLike", adapter)] if one else list(cast("Iterable[PathLike]", adapter))
    if not paths:
        raise UsageError("no adapter given: pass --adapter.")
    return [open_adapter(path) for path in paths]


def _adapters(
    folders: Sequence[AdapterFolder],
    weight: Sequence[float] | None,
    *,
    adapter_name: str | None,
    base_is_residual: bool,
    expert_order: str,
) -> list[Adapter]:
    weights = [1.0] * len(folders) if not weight else list(weight)
    if len(weights) != len(folders):
        raise UsageError(
            f"{len(folders)} adapters but {len(weights)} weights: give --weight once per --adapter, "
            "or not at all."
        )
    if not all(math.isfinite(value) for value in weights):
        raise UsageError("--weight must be a finite number.")
    return [
        Adapter(
            printable(str(folder.file)),
            read_settings(
                folder.config,
                printable(str(folder.path / "adapter_config.json")),
                base_is_residual=base_is_residual,
            ),
            folder.tensors,
            factor,
            adapter_name,
            expert_order,
        )
        for folder, factor in zip(folders, weights, strict=True)
    ]


def _tie(source: Checkpoint, work: Workspace) -> tuple[str, str] | None:
    """Embedding and head of a base where these are one tensor, stored once or twice."""
    tie = tied_names(source.tensors, source.config)
    if tie is None or tie[1] not in source.tensors:
        return tie
    embedding, head = (source.tensors[name] for name in tie)
    return tie if equal_bytes(embedding, head, work) else None


def _merged_config(
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


def _replaced_from(
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


def _shard_of(
    source: Checkpoint, tensors: Iterable[str], tie: tuple[str, str] | None
) -> dict[str, str]:
    """The base's files; a head that was none before goes where the embedding is."""
    twins = {} if tie is None else {tie[1]: tie[0]}
    files = {n: source.shard_of(n if n in source.tensors else twins[n]) for n in tensors}
    return numbered_anew(files, len(source.metadata))
