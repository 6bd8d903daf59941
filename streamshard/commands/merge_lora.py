"""`merge_lora`: adapters into a base, or the pairs of a training checkpoint into itself."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, Unpack, cast

from streamshard.checkpoint.adapter_folder import AdapterFolder
from streamshard.checkpoint.digests import files_digest
from streamshard.checkpoint.file_names import SUFFIX
from streamshard.commands.cross_layout import other_names
from streamshard.commands.drawing import Drawing
from streamshard.commands.identify import Model
from streamshard.commands.left_behind import note_left_behind
from streamshard.commands.merge_inputs import Asked, Inputs, open_inputs
from streamshard.commands.merged_folder import beside_merged
from streamshard.commands.model_card import NAMED, Card, check_card, merge_card, with_card
from streamshard.commands.provenance import check_record, other_base
from streamshard.commands.public import public
from streamshard.commands.written_merge import Folded, Written, converted, kept
from streamshard.disk.files import Files
from streamshard.disk.paths import PathLike, input_path
from streamshard.engine.job import Job, Options, OutputOptions
from streamshard.engine.output_path import check_places
from streamshard.engine.report import Report
from streamshard.errors import InputError, UsageError
from streamshard.internvl.families import Layout
from streamshard.internvl.model_config import OTHER
from streamshard.lora.base_checks import check_not_merged
from streamshard.lora.merge import Merged, alone, changes_of, merge
from streamshard.notes import note
from streamshard.tensors import kernel
from streamshard.tensors.comparing import equal_bytes
from streamshard.tensors.dtypes import FLOATS
from streamshard.tensors.workspace import Workspace

__all__ = ["merge_lora"]


@public
def merge_lora(
    *,
    base: PathLike | None = None,
    adapter: PathLike | Sequence[PathLike] | Mapping[PathLike, float] | None = None,
    checkpoint: PathLike | None = None,
    output: PathLike | None = None,
    weight: Sequence[float] | float | None = None,
    layout: Literal["keep", "custom", "hf"] = "keep",
    reference: PathLike | None = None,
    tokenizer_from: Literal["source", "reference"] | None = None,
    alpha: float | None = None,
    adapter_name: str | None = None,
    base_is_residual: bool = False,
    expert_order: Literal["peft", "unsloth"] = "peft",
    allow_merged_base: bool = False,
    allow_missing: bool = False,
    allow_unexpected: bool = False,
    card: Literal["new", "base", "none"] = "new",
    plot: PathLike | None = None,
    heatmap: bool = False,
    **options: Unpack[OutputOptions],
) -> Report:
    """Fold LoRA pairs into the weights that they adapt, and write the result to a new folder.

    Every merged element is the exact value of `W + sum of weight * s * B @ A`, rounded once to
    nearest even (DoRA: scaled by its magnitudes before), on every machine; whole modules and token
    rows that were trained replace what the base has; every other tensor and file is copied as bytes.

    `base` is a folder or a `.safetensors` file, `adapter` one adapter folder or several, whose
    updates are summed, each times its `weight`: a number, or a list in the order of the adapters (a
    mapping of adapters to weights says both). They may have been trained in another layout than the
    base's. Instead of both, `checkpoint` is a LoRA-wrapped training checkpoint of InternVL, which has
    the pairs inside; their `alpha` is twice the rank unless given, as in InternVL's trainer. `output`
    defaults to `./<base name>-merged`. `layout` "custom" or "hf" converts in the same pass; config and
    tokenizer then come from `reference`, a folder of that layout (which also gives a training
    checkpoint the remote code that it lacks). `adapter_name` chooses among
    adapters in one file. `base_is_residual` states that the base is what PiSSA or the like left
    behind, `expert_order` ("peft" or "unsloth") how the factors of fused experts are ordered,
    `allow_merged_base` that a base which seems to hold the adapter already is meant, `allow_missing` and
    `allow_unexpected` what `streamshard.ConversionOptions` says of them. `card` is "new"
    for a model card that says what was done, "base" for a copy of the base's, or "none". `plot` is a
    file (.png, .svg, .pdf) for a picture of what has changed, and with `heatmap` the report has the
    relative change of each module in each layer as `heat_map`. Further keywords are those of
    `streamshard.OutputOptions`.

    Raises a `StreamshardError`; its class says what is wrong (`streamshard.errors`).
    """
    started, chosen = time.perf_counter(), Options.of(options)
    asked = Asked(
        base=base,
        adapter=cast("PathLike | Sequence[PathLike] | None", adapter),
        checkpoint=checkpoint,
        output=output,
        weight=list(cast("Sequence[float]", weight or [])),
        layout=layout,
        reference=reference,
        tokenizer_from=tokenizer_from,
        alpha=alpha,
        adapter_name=adapter_name,
        base_is_residual=base_is_residual,
        expert_order=expert_order,
        allow_merged_base=allow_merged_base,
        allow_missing=allow_missing,
        allow_unexpected=allow_unexpected,
    )
    check_card(card)
    drawing = Drawing(plot, heatmap=heatmap)
    kernel.chosen()  # one that this machine does not have is told before anything is done
    # 6. Run; what was opened is no longer in memory by then, but for what is written.
    return drawing.run(lambda: _job(asked, card, chosen, started), chosen)


def _job(asked: Asked, card: str, chosen: Options, started: float) -> Job:
    """What is to be written, found out step by step."""
    # 1. Open the base and the adapters.
    inputs = open_inputs(asked)
    # 2. Identify: is the base to be converted, too, and where does the result go?
    goal = _goal(asked, inputs.base)
    output_path = _output(asked, inputs, chosen)
    # 3. Match every tensor of the adapters with a weight, and 4. check that it is not in there yet.
    folded = _fold(asked, inputs)
    adapters = _described(folded, inputs.folders)
    if not asked.allow_merged_base:
        check_record(inputs.base, adapters)
    for described in adapters:
        note(*other_base(described.get(NAMED), inputs.base))
    # 5. Plan what is written: tensors, their files, and what lies beside them.
    beside = beside_merged(inputs.base, folded.merged, inputs.folders)
    if goal is None:
        written = kept(asked, inputs, folded, beside, chosen.dtype)
    else:
        written = converted(asked, inputs, folded, beside, goal, chosen.dtype)
    folders = [inputs.base.path, *written.donors]
    if asked.checkpoint is not None and asked.reference is None:
        remedy = "--reference ORIGINAL takes it from the original model"
        note_left_behind(written.files, folders, remedy)
    else:
        note_left_behind(written.files, folders)
    files = with_card(card, written.files, lambda: _card(asked, inputs, written, chosen.dtype))
    return Job(
        command="merge-lora",
        output=output_path,
        started=started,
        tensors=written.tensors,
        layout=written.layout,
        shard_of=written.shard_of,
        metadata=written.metadata,
        files=files,
        l2_from=str(inputs.base.path),
        reference=written.reference,
        compares_sources=True,
        must_change=not _has_unmeasured(inputs.base, folded.merged),
        facts={
            "merged": len({*folded.merged.updated, *folded.merged.replaced}),
            "base": str(inputs.base.path),
            "adapters": adapters,
            "missing": list(written.missing),
            "unexpected": list(written.unexpected),
        },
        choices={
            "weight": asked.weight,
            "layout": asked.layout,
            "tokenizer_from": asked.tokenizer_from,
            "alpha": asked.alpha,
            "adapter_name": asked.adapter_name,
            "expert_order": asked.expert_order,
            "allow_missing": asked.allow_missing,
            "allow_unexpected": asked.allow_unexpected,
            "card": card,
        },
    )


def _goal(asked: Asked, base: Model) -> tuple[Layout, PathLike] | None:
    """The layout to convert to and its reference folder, if a merge is to convert too."""
    if asked.layout in ("keep", base.layout):
        return None
    if base.layout is None:
        raise InputError(
            f"{base.where}: is neither of the custom nor of the HF layout, so it "
            "cannot be converted: it has no tensors of an InternVL vision encoder or projector."
        )
    if asked.reference is None:
        raise UsageError(
            f"--layout {asked.layout} needs --reference: a folder of that layout, which gives config, "
            "tokenizer and code (the original model; weights are not needed)."
        )
    return OTHER[base.layout], asked.reference


def _output(asked: Asked, inputs: Inputs, chosen: Options) -> Path:
    """Where the result goes, which must be none of the inputs."""
    path = inputs.base.path.absolute()
    name = (path.resolve() if path.name == ".." else path).name.removesuffix(SUFFIX)
    output = f"{name}-merged" if asked.output is None else asked.output
    read = [inputs.base.path, *(folder.path for folder in inputs.folders)]
    if asked.reference is not None:
        read.append(input_path(asked.reference, "the reference"))
    return check_places(output, read, overwrite=chosen.may_exist)


def _fold(asked: Asked, inputs: Inputs) -> Folded:
    """Fold the adapters in, unless the base seems to have one of them already."""
    base, adapters = inputs.base, inputs.adapters
    with contextlib.closing(Files(onward=True)) as opened:
        work = Workspace(opened)
        tie = _tie(base, work)
        changes = changes_of(base.tensors, adapters, work, other_names(base), tie, _apart(base))
        note(*changes.warnings)
        merged = merge(changes, work)
        unchecked = asked.checkpoint is not None or asked.allow_merged_base
        for number, adapter in enumerate(() if unchecked else adapters):
            if len(adapters) == adapter.weight == 1:
                tensors = [merged.tensors[name] for name in merged.updated]
            else:
                tensors = alone(changes, number)
            check_not_merged(adapter.where, tensors, work)
    return Folded(merged, tie, changes.facts)


def _has_unmeasured(base: Model, merged: Merged) -> bool:
    """Whether something is changed that no distance tells: a shape, or values that are no floats."""
    before = ((base.tensors.get(name), merged.tensors[name]) for name in merged.replaced)
    return any(
        old is not None and (old.shape != new.shape or new.dtype not in FLOATS)
        for old, new in before
    )


def _tie(base: Model, work: Workspace) -> tuple[str, str] | None:
    """Embedding and head of a base where these are one tensor, stored once or twice."""
    tie = base.tie
    if tie is None or tie[1] not in base.tensors:
        return tie
    embedding, head = (base.tensors[name] for name in tie)
    return tie if equal_bytes(embedding, head, work) else None


def _apart(base: Model) -> tuple[str, str] | None:
    """Embedding and head of a base of the custom layout, which never ties them."""
    embedding, head = base.embedding_and_head
    if base.layout != "custom" or embedding is None or head is None:
        return None
    return embedding, head


def _described(folded: Folded, folders: Sequence[AdapterFolder]) -> list[dict[str, Any]]:
    """What the report says of each adapter, and of the folder that it is from."""
    if not folders:
        return [dict(facts) for facts in folded.facts]
    return [
        {
            **facts,
            "digest": files_digest([folder.path / name for name in folder.files]),
            NAMED: folder.config.get(NAMED),
        }
        for facts, folder in zip(folded.facts, folders, strict=True)
    ]


def _card(asked: Asked, inputs: Inputs, written: Written, dtype: str) -> Card:
    """The model card of what is written."""
    return merge_card(
        inputs.base,
        next(iter(written.donors), None),
        [(folder.path, folder.config) for folder in inputs.folders],
        written.files,
        layout=written.layout,
        dtype=dtype,
        is_training_checkpoint=asked.checkpoint is not None,
    )
