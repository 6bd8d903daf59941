"""The Python API: one function a command, each returning its report as a dict.

The keys of a report are those of the command line's `--json`; keys that do not apply are None.
"""

from __future__ import annotations

import contextlib
import dataclasses
import math
import os
import re
import time
from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any

from streamshard.checkpoint import Checkpoint, open_adapter, open_checkpoint
from streamshard.conversion import Target, carry_over, shard_names
from streamshard.detection import layout_of
from streamshard.errors import InputError, UsageError, listed, printable
from streamshard.families import OTHER, Dims, dims_from_config
from streamshard.files import Files
from streamshard.layouts import pieces
from streamshard.lora import Adapter, Carry, Merged, Place, check_base, merge
from streamshard.peft_config import read_settings
from streamshard.report import Report
from streamshard.run import Job, Options, PathLike, check_places, run
from streamshard.spelling import flat_names
from streamshard.tensors import Workspace

__all__ = ["custom_to_hf", "hf_to_custom", "merge_lora"]


def merge_lora(
    *,
    base: PathLike,
    adapter: PathLike | Sequence[PathLike],
    output: PathLike | None = None,
    weight: Sequence[float] | None = None,
    layout: str = "keep",
    reference: PathLike | None = None,
    tokenizer_from: str | None = None,
    **options: Any,
) -> Report:
    """Fold PEFT LoRA adapters into a base checkpoint and write the result to a new folder.

    Every merged element is `W + sum of weight * s * B @ A`, accumulated in fp32 and rounded once
    to nearest even; every other tensor and file is copied as bytes.

    `base` is a folder or a `.safetensors` file, `adapter` one adapter folder or several, whose
    updates are summed; they may have been trained in another layout than the base's. `output`
    defaults to `./<base name>-merged`. `layout` "custom" or "hf" converts in the same pass; config and
    tokenizer then come from `reference`, a folder of that layout. Further keywords are those of
    `streamshard.run.Options`.

    Raises a `StreamshardError`; its class says what is wrong (`streamshard.errors`).
    """
    started, chosen = time.perf_counter(), Options(**options)
    source = open_checkpoint(base)
    check_base(source.tensors, source.config)
    own = layout_of(source.tensors)
    converts = _converts(layout, own, reference, source)
    adapters = _read_adapters(adapter, weight)
    name = source.path.absolute().name.removesuffix(".safetensors")
    target = Path(f"{name}-merged" if output is None else output)
    inputs = [source.path, *_paths(adapter), *([Path(reference)] if reference is not None else [])]
    check_places(target, inputs, overwrite=chosen.overwrite)
    with contextlib.closing(Files()) as files:
        result = merge(source.tensors, adapters, Workspace(files), _carry(source, own))
    _check_ties(source, result)
    facts: dict[str, Any] = {
        "merged": len(result.changed),
        "base": str(source.path),
        "adapters": [_describe(adapter) for adapter in adapters],
        "warnings": list(result.warnings),
    }
    choices = {
        "weight": list(weight or []),
        "layout": layout,
        "tokenizer_from": tokenizer_from,
    }
    if converts is not None:
        folder = open_checkpoint(converts, needs_weights=False)
        converted = carry_over(
            result.tensors, source, folder, layout, tokenizer_from=tokenizer_from
        )
        facts["warnings"] += converted.warnings
        job = _job(
            "merge-lora", target, started, source, converted, str(source.path), facts, chosen.dtype
        )
        return run(dataclasses.replace(job, must_change=True, choices=choices), chosen)
    if source.config is None:
        where = printable(str(source.path))
        facts["warnings"].append(f"{where}: has no config.json; the output has none either")
    job = Job(
        command="merge-lora",
        output=target,
        started=started,
        tensors=result.tensors,
        shard_of=source.shard_of,
        metadata=source.metadata,
        config=source.config if chosen.dtype != "keep" else None,
        side_files=source.side_files,
        l2_from=str(source.path),
        must_change=True,
        facts=facts,
        choices=choices,
    )
    return run(job, chosen)


def hf_to_custom(
    *, hf_path: PathLike, custom_path: PathLike, save_path: PathLike, **options: Any
) -> Report:
    """Convert HF weights (`InternVLForConditionalGeneration`) to the custom layout.

    Config, remote code and tokenizer come from `custom_path`, which may have no weights; if it has
    some, the report's `l2` is the distance from them. `tokenizer_from` ("source" or "reference")
    says whose tokenizer is meant where the vocabularies differ; `allow_missing` and `allow_unexpected`
    turn tensors that only one side has from an error into an entry of the report. Further
    keywords are those of `streamshard.run.Options`.

    Raises a `StreamshardError`; its class says what is wrong (`streamshard.errors`).
    """
    return _convert("hf2custom", hf_path, custom_path, save_path, "custom", **options)


def custom_to_hf(
    *, custom_path: PathLike, hf_path: PathLike, save_path: PathLike, **options: Any
) -> Report:
    """Convert custom weights (`InternVLChatModel`) to the HF layout, in the *flat* spelling.

    The inverse of `hf_to_custom`, with the same keywords; config, tokenizer and processor come
    from `hf_path`.
    """
    return _convert("custom2hf", custom_path, hf_path, save_path, "hf", **options)


def _convert(
    command: str,
    source_path: PathLike,
    reference_path: PathLike,
    save_path: PathLike,
    layout: str,
    *,
    tokenizer_from: str | None = None,
    allow_missing: bool = False,
    allow_unexpected: bool = False,
    **options: Any,
) -> Report:
    started, chosen = time.perf_counter(), Options(**options)
    source = open_checkpoint(source_path)
    check_base(source.tensors, source.config)
    reference = open_checkpoint(reference_path, needs_weights=False)
    target = Path(save_path)
    check_places(target, [source.path, reference.path], overwrite=chosen.overwrite)
    converted = carry_over(
        source.tensors,
        source,
        reference,
        layout,
        tokenizer_from=tokenizer_from,
        allow_missing=allow_missing,
        allow_unexpected=allow_unexpected,
    )
    facts = {
        "source": str(source.path),
        "missing": converted.missing,
        "unexpected": converted.unexpected,
        "warnings": converted.warnings,
    }
    compared = None if converted.reference is None else str(reference.path)
    job = _job(command, target, started, source, converted, compared, facts, chosen.dtype)
    choices = {
        "tokenizer_from": tokenizer_from,
        "allow_missing": allow_missing,
        "allow_unexpected": allow_unexpected,
    }
    return run(dataclasses.replace(job, reference=converted.reference, choices=choices), chosen)


def _job(
    command: str,
    target: Path,
    started: float,
    source: Checkpoint,
    converted: Target,
    l2_from: str | None,
    facts: Mapping[str, Any],
    dtype: str,
) -> Job:
    config = converted.config if dtype == "keep" else converted.config or converted.base_config
    return Job(
        command=command,
        output=target,
        started=started,
        tensors=converted.tensors,
        shard_of=shard_names(converted.tensors, source),
        metadata={},
        config=config,
        side_files=converted.side_files,
        l2_from=l2_from,
        facts=facts,
    )


def _converts(
    layout: str, own: str | None, reference: PathLike | None, source: Checkpoint
) -> PathLike | None:
    """The reference folder if a merge is to convert too; raises `UsageError` if it lacks one."""
    if layout not in ("keep", "custom", "hf"):
        raise UsageError(f"--layout is {layout!r}; keep, custom or hf can be chosen.")
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


def _carry(source: Checkpoint, own: str | None) -> Carry | None:
    """Finds where updates of the other layout's weights go; None if the base is no InternVL."""
    if own is None or source.config is None:
        return None
    config, other = source.config, OTHER[own]
    spelled = flat_names(source.tensors, own)

    @cache
    def dims_of(architecture: str | None) -> Dims:
        return dims_from_config(config, architecture=architecture)

    def places(name: str, rows: int) -> list[Place]:
        try:
            dims = dims_of(_adapter_architecture(config, name))
            found = pieces(name, rows, dims, own)
        except InputError:
            return []
        made = []
        for piece in found:
            target = spelled.get(piece.target)
            if target is None:
                return []
            back = pieces(piece.target, source.tensors[target].rows, dims, other)
            whole = len(back) == 1 and sum(p.target == piece.target for p in found) == 1
            made.append(Place(target, piece.target_start, piece.source_start, piece.rows, whole))
        return made

    return places


def _adapter_architecture(config: Mapping[str, Any], name: str) -> str | None:
    """The custom class that an adapter's name is of, where the base is HF and of type llama."""
    inner = config.get("text_config")
    if isinstance(inner, dict) and inner.get("model_type") == "llama":
        # Such a base does not say which custom class it came from; the adapter's names do.
        internlm2 = re.search(
            r"\.(?:attention\.w|feed_forward\.w|tok_embeddings\.)|language_model\.output\.", name
        )
        return "InternLM2ForCausalLM" if internlm2 else "LlamaForCausalLM"
    return None


def _read_adapters(
    adapter: PathLike | Sequence[PathLike], weight: Sequence[float] | None
) -> list[Adapter]:
    paths = _paths(adapter)
    weights = [1.0] * len(paths) if not weight else list(weight)
    if len(weights) != len(paths):
        raise UsageError(
            f"{len(paths)} adapters but {len(weights)} weights: give --weight once per --adapter, "
            "or not at all."
        )
    if not all(math.isfinite(value) for value in weights):
        raise UsageError("--weight must be a finite number.")
    adapters = []
    for path, factor in zip(paths, weights, strict=True):
        found = open_adapter(path)
        settings = read_settings(found.config, printable(str(found.path / "adapter_config.json")))
        adapters.append(Adapter(printable(str(found.file)), settings, found.tensors, factor))
    return adapters


def _paths(adapter: PathLike | Sequence[PathLike]) -> list[Path]:
    one = [adapter] if isinstance(adapter, (str, os.PathLike)) else list(adapter)
    if not one:
        raise UsageError("no adapter given: pass --adapter.")
    return [Path(path) for path in one]


def _check_ties(source: Checkpoint, result: Merged) -> None:
    """Refuse an update of a head or embedding that loading would tie to its twin again."""
    ends = ("lm_head.weight", "embed_tokens.weight", ".output.weight", "tok_embeddings.weight")
    touched = [name for name in result.changed if name.endswith(ends)]
    config = source.config
    if not touched or config is None:
        return
    inner = config.get("text_config", config.get("llm_config"))
    default = config.get("model_type") == "internvl"
    flags = [config.get("tie_word_embeddings", default)]
    flags += [inner.get("tie_word_embeddings", False)] if isinstance(inner, dict) else []
    if any(flags):
        raise InputError(
            f"{printable(str(source.path / 'config.json'))}: the config ties embedding and head, "
            f"and the adapter changes {listed(touched)}: loaders would overwrite one by the other. "
            "If both are stored, set tie_word_embeddings to false, at the top and in text_config."
        )


def _describe(adapter: Adapter) -> Report:
    settings = adapter.settings
    return {
        "file": adapter.where,
        "weight": adapter.weight,
        "r": settings.r,
        "lora_alpha": settings.lora_alpha,
        "use_rslora": settings.use_rslora,
    }
