"""The Python API: one function a command, each returning its report as a dict.

The keys of a report are those of the command line's `--json`; keys that do not apply are None.
"""

from __future__ import annotations

import contextlib
import math
import os
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from streamshard.checkpoint import Checkpoint, open_adapter, open_checkpoint
from streamshard.errors import InputError, UsageError, listed, printable
from streamshard.files import Files
from streamshard.lora import Adapter, Merged, check_base, merge
from streamshard.peft_config import read_settings
from streamshard.run import Job, Options, PathLike, Report, check_places, run
from streamshard.tensors import Workspace

__all__ = ["merge_lora"]


def merge_lora(
    *,
    base: PathLike,
    adapter: PathLike | Sequence[PathLike],
    output: PathLike | None = None,
    weight: Sequence[float] | None = None,
    **options: Any,
) -> Report:
    """Fold PEFT LoRA adapters into a base checkpoint and write the result to a new folder.

    Every merged element is `W + sum of weight * s * B @ A`, accumulated in fp32 and rounded once
    to nearest even; every other tensor and file is copied as bytes.

    `base` is a folder or a `.safetensors` file, `adapter` one adapter folder or several, whose
    updates are summed. `output` defaults to `./<base name>-merged`. Further keywords are those of
    `streamshard.run.Options`.

    Raises a `StreamshardError`; its class says what is wrong (`streamshard.errors`).
    """
    started, chosen = time.perf_counter(), Options(**options)
    source = open_checkpoint(base)
    check_base(source.tensors, source.config)
    adapters = _read_adapters(adapter, weight)
    name = source.path.resolve().name.removesuffix(".safetensors")
    target = Path(f"{name}-merged" if output is None else output)
    check_places(target, [source.path, *_paths(adapter)], overwrite=chosen.overwrite)
    with contextlib.closing(Files()) as files:
        result = merge(source.tensors, adapters, Workspace(files))
    _check_ties(source, result)
    warnings = list(result.warnings)
    if source.config is None:
        where = printable(str(source.path))
        warnings.append(f"{where}: has no config.json; the output has none either")
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
        facts={
            "merged": len(result.updates),
            "base": str(source.path),
            "adapters": [_describe(adapter) for adapter in adapters],
            "warnings": warnings,
        },
    )
    return run(job, chosen)


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
    ends = ("lm_head.weight", "embed_tokens.weight")
    touched = [name for name in result.updates if name.endswith(ends)]
    config = source.config
    if not touched or config is None or config.get("model_type") == "internvl_chat":
        return  # the custom class never ties
    inner = config.get("text_config")
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
