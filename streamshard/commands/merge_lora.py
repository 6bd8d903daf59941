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

from streamshard.checkpoint.adapter_folder import AdapterFolder, open_adapter
from streamshard.checkpoint.digests import file_digest
from streamshard.checkpoint.file_names import ADAPTER_CONFIG_NAME, MODEL_CONFIG_NAME, SUFFIX
from streamshard.checkpoint.folder import Checkpoint, open_checkpoint
from streamshard.commands.carry_over import carry_over
from streamshard.commands.convert import conversion_job
from streamshard.commands.cross_layout import other_names
from streamshard.commands.merged_folder import merged_config, replaced_from, shard_of, with_code
from streamshard.commands.provenance import check_given_twice, check_record, other_base
from streamshard.commands.training_checkpoint import open_wrapped
from streamshard.commands.written_config import config_bytes
from streamshard.disk.files import Files
from streamshard.disk.inputs import watched
from streamshard.disk.paths import PathLike, input_path
from streamshard.engine.job import Job, Options
from streamshard.engine.output_path import check_places
from streamshard.engine.report import Report
from streamshard.engine.run import run
from streamshard.errors import InputError, UsageError, printable
from streamshard.internvl.detection import layout_of
from streamshard.internvl.model_config import OTHER
from streamshard.internvl.tied_embeddings import tied_names
from streamshard.limits import told
from streamshard.lora.adapter import Adapter
from streamshard.lora.base_checks import check_base, check_not_merged
from streamshard.lora.experts import EXPERT_ORDERS
from streamshard.lora.merge import merge
from streamshard.lora.settings import read_settings
from streamshard.tensors.comparing import equal_bytes
from streamshard.tensors.workspace import Workspace

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
    are those of `streamshard.engine.job.Options`.

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
    name = source.path.absolute().name.removesuffix(SUFFIX)
    output = f"{name}-merged" if output is None else output
    inputs = [source.path, *(f.path for f in folders)]
    inputs += [input_path(reference, "the reference")] if reference is not None else []
    target = check_places(output, inputs, overwrite=chosen.overwrite)
    with contextlib.closing(Files()) as opened:
        work = Workspace(opened)
        tie = _tie(source, work)
        others = other_names(source, own)
        result = merge(source.tensors, adapters, work, others, tie)
        for one in adapters if checkpoint is None and not allow_merged_base else ():
            alone = result
            if len(adapters) > 1 or one.weight != 1:
                full = dataclasses.replace(one, weight=1.0)
                alone = merge(source.tensors, [full], work, others, tie)
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
    config, side_files = merged_config(source, result, folders)
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
                reference=replaced_from(source, result, tie, folder, layout),
                compares_sources=True,
                must_change=True,
                choices=choices,
            ),
            chosen,
        )
    if checkpoint is not None:
        config, side_files = with_code(config, side_files, reference, facts["warnings"])
    if config is None:
        where = printable(str(source.path))
        facts["warnings"].append(f"{where}: has no config.json; the output has none either")
    files: dict[str, Path | bytes] = dict(side_files)
    if config is not None and (checkpoint or config != source.config or chosen.dtype != "keep"):
        files[MODEL_CONFIG_NAME] = config_bytes(config, chosen.dtype)
    job = Job(
        command="merge-lora",
        output=target,
        started=started,
        tensors=result.tensors,
        layout=layout_of(result.tensors),
        shard_of=shard_of(source, result.tensors, tie),
        metadata=source.metadata,
        files=files,
        l2_from=str(source.path),
        reference=replaced_from(source, result, tie),
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
                printable(str(folder.path / ADAPTER_CONFIG_NAME)),
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
