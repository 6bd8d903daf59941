"""The Python API: one function a command, each returning its report as a dict.

The keys of a report are those of the command line's `--json`; keys that do not apply are None.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

from streamshard import __version__
from streamshard.checkpoint import REPORT_NAME, Checkpoint, open_adapter, open_checkpoint
from streamshard.errors import InputError, OutputError, UsageError, WriteError, listed, printable
from streamshard.files import Files, copy_files, disk_free, write_new
from streamshard.format import total_parameters
from streamshard.layouts import layout_of
from streamshard.lora import Adapter, Merged, check_base, merge
from streamshard.peft_config import read_settings
from streamshard.resources import memory_estimate, parse_size, peak_rss_bytes, worker_count
from streamshard.tensors import Lazy, Workspace, cast
from streamshard.writer import Shard, index_bytes, output_folder, plan_shards, write_shards

__all__ = ["Plan", "merge_lora"]

PathLike: TypeAlias = "str | os.PathLike[str]"
Report: TypeAlias = dict[str, Any]

DTYPES = {"bf16": "BF16", "fp16": "F16", "fp32": "F32"}
_TORCH_DTYPES = {"BF16": "bfloat16", "F16": "float16", "F32": "float32"}


@dataclass(frozen=True, slots=True)
class Plan:
    """What a run would do, known before any weight is read; handed to `on_plan`."""

    output: Path
    shards: tuple[Shard, ...]
    nbytes: int
    free_nbytes: int
    workers: int
    memory_nbytes: int
    merged: int

    def as_dict(self) -> Report:
        """The plan as the report of `--dry-run` shows it."""
        return {
            "files": [{"name": shard.name, "bytes": shard.nbytes} for shard in self.shards],
            "free_bytes": self.free_nbytes,
            "workers": self.workers,
            "memory_bytes": self.memory_nbytes,
            "merged": self.merged,
        }


def merge_lora(
    *,
    base: PathLike,
    adapter: PathLike | Sequence[PathLike],
    output: PathLike | None = None,
    weight: Sequence[float] | None = None,
    max_shard_size: int | str | None = None,
    dtype: str = "keep",
    workers: int | None = None,
    max_memory: int | str | None = None,
    overwrite: bool = False,
    dry_run: bool = False,
    on_plan: Callable[[Plan], None] | None = None,
    progress: Callable[[int, str], None] | None = None,
) -> Report:
    """Fold PEFT LoRA adapters into a base checkpoint and write the result to a new folder.

    Every merged element is `W + sum of weight * s * B @ A`, accumulated in fp32 and rounded once
    to nearest even; every other tensor and file is copied as bytes.

    `base` is a folder or a `.safetensors` file, `adapter` one adapter folder or several, whose
    updates are summed. `output` defaults to `./<base name>-merged`. `max_shard_size` (bytes or
    "5GB") re-shards; by default files are those of the base. `dtype` is "keep", "bf16", "fp16" or
    "fp32". `max_memory` lowers the number of `workers`. `dry_run` checks everything and
    writes nothing. `on_plan` is called once before writing, `progress` with the bytes and
    the tensor of each finished piece.

    Raises a `StreamshardError`; its class says what is wrong (`streamshard.errors`).
    """
    started = time.perf_counter()
    source = open_checkpoint(base)
    check_base(source.tensors)
    adapters = _read_adapters(adapter, weight)
    target = _output_path(output, source)
    _check_places(target, [source.path, *(Path(a) for a in _paths(adapter))], overwrite=overwrite)
    with contextlib.closing(Files()) as files:
        result = merge(source.tensors, adapters, Workspace(files))
    _check_ties(source, result)
    tensors = _cast_all(result.tensors, dtype)
    shards = plan_shards(
        tensors,
        shard_of=source.shard_of,
        metadata=source.metadata,
        max_shard_size=_size(max_shard_size, "--max-shard-size"),
    )
    plan = _plan(target, source, shards, result, workers, _size(max_memory, "--max-memory"))
    if on_plan is not None:
        on_plan(plan)
    report: Report = {
        "command": "merge-lora",
        "version": __version__,
        "output": str(target),
        "layout": layout_of(source.tensors),
        "tensors": len(tensors),
        "parameters": total_parameters(tensors),
        "bytes": plan.nbytes,
        "shards": len(shards),
        "seconds": None,
        "peak_rss_bytes": None,
        "merged": len(result.updates),
        "base": str(source.path),
        "adapters": [_describe(a) for a in adapters],
        "l2": None,
        "missing": [],
        "unexpected": [],
        "warnings": [*result.warnings, *_side_warnings(source)],
        "dry_run": dry_run,
        "plan": plan.as_dict() if dry_run else None,
    }
    if not dry_run:
        report["l2"] = _write(plan, source, dtype, overwrite, progress, report, started)
    report["seconds"] = round(time.perf_counter() - started, 3)
    report["peak_rss_bytes"] = peak_rss_bytes()
    return report


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


def _output_path(output: PathLike | None, source: Checkpoint) -> Path:
    if output is not None:
        return Path(output)
    return Path(f"{source.path.resolve().name.removesuffix('.safetensors')}-merged")


def _check_places(target: Path, inputs: Sequence[Path], *, overwrite: bool) -> None:
    """Refuse an output that exists, is an input, or lies inside one (also through links)."""
    if target.is_symlink():
        raise OutputError(
            f"{printable(str(target))}: is a symbolic link, and links are never written through. "
            "Give the folder itself."
        )
    if target.exists() and not overwrite:
        raise OutputError(
            f"{printable(str(target))}: exists. Choose another --output, or pass --overwrite."
        )
    place = target.resolve()
    for path in inputs:
        folder = path.resolve() if path.is_dir() else path.resolve().parent
        # By identity and not only by name: bind mounts and case-insensitive disks have two names.
        if _is_within(place, folder) and (path.is_dir() or place == folder):
            raise OutputError(
                f"{printable(str(target))}: is, or lies inside, the input {printable(str(path))}. "
                "Inputs are never changed: choose an --output outside of it."
            )
        if _is_within(folder, place):
            raise OutputError(
                f"{printable(str(target))}: contains the input {printable(str(path))}, which "
                "replacing it would delete. Choose another --output."
            )


def _is_within(path: Path, folder: Path) -> bool:
    return any(
        candidate == folder
        or (candidate.exists() and folder.exists() and candidate.samefile(folder))
        for candidate in (path, *path.parents)
    )


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


def _cast_all(tensors: Mapping[str, Lazy], dtype: str) -> dict[str, Lazy]:
    if dtype == "keep":
        return dict(tensors)
    if dtype not in DTYPES:
        raise UsageError(f"--dtype is {dtype!r}; keep, {', '.join(DTYPES)} can be chosen.")
    return {name: cast(tensor, DTYPES[dtype]) for name, tensor in tensors.items()}


def _size(size: int | str | None, option: str) -> int | None:
    if size is None:
        return None
    try:
        nbytes = parse_size(size)
    except ValueError as error:
        raise UsageError(f"{option}: {error}") from error
    return nbytes


def _plan(
    target: Path,
    source: Checkpoint,
    shards: Sequence[Shard],
    result: Merged,
    workers: int | None,
    max_memory: int | None,
) -> Plan:
    side = sum(file.stat().st_size for file in source.side_files)
    nbytes = sum(shard.nbytes for shard in shards)
    free = disk_free(target.absolute())
    needed = nbytes + side + 64 * 1024 * len(shards)
    if needed > free:
        raise WriteError(
            f"{printable(str(target))}: {needed:,} bytes are needed but {free:,} are free. "
            "Free some space, or choose an --output on another disk."
        )
    count = worker_count(shards, workers, max_memory)
    memory = memory_estimate(shards, count)
    return Plan(target, tuple(shards), nbytes, free, count, memory, len(result.updates))


def _write(
    plan: Plan,
    source: Checkpoint,
    dtype: str,
    overwrite: bool,
    progress: Callable[[int, str], None] | None,
    report: Report,
    started: float,
) -> Report:
    """Write everything into place and return the L2 part of the report."""
    with output_folder(plan.output, overwrite=overwrite) as staging:
        squared = write_shards(plan.shards, staging, workers=plan.workers, progress=progress)
        norms = {name: math.sqrt(value) for name, value in squared.items()}
        l2: Report = {
            "reference": str(source.path),
            "sum": math.fsum(norms.values()),
            "per_parameter": math.fsum(norms.values()) / max(report["parameters"], 1),
            "global": math.sqrt(math.fsum(squared.values())),
            "compared": report["tensors"],
            "skipped": [],
        }
        rewritten = _config_bytes(source, dtype)
        carried = [
            f for f in source.side_files if f.name not in rewritten or f.parent != source.path
        ]
        copy_files(carried, source.folder, staging)
        for name, data in rewritten.items():
            write_new(staging / name, data)
        kept = {
            **report,
            "l2": l2,
            "seconds": round(time.perf_counter() - started, 3),
            "peak_rss_bytes": peak_rss_bytes(),
            "l2_per_tensor": norms,
        }
        if len(plan.shards) > 1:
            write_new(staging / "model.safetensors.index.json", index_bytes(plan.shards))
        write_new(staging / REPORT_NAME, _json_bytes(kept))
    return l2


def _config_bytes(source: Checkpoint, dtype: str) -> dict[str, bytes]:
    """`config.json` with the new dtype, if that changes; otherwise it is copied as bytes."""
    if dtype == "keep" or source.config is None:
        return {}
    name = _TORCH_DTYPES[DTYPES[dtype]]

    def renamed(value: Any) -> Any:
        if isinstance(value, dict):
            return {
                key: name
                if key in ("torch_dtype", "dtype") and inner is not None
                else renamed(inner)
                for key, inner in value.items()
            }
        return value

    return {"config.json": _json_bytes(renamed(source.config))}


def _json_bytes(content: Mapping[str, Any]) -> bytes:
    return (json.dumps(content, indent=2, ensure_ascii=False) + "\n").encode()


def _describe(adapter: Adapter) -> Report:
    settings = adapter.settings
    return {
        "file": adapter.where,
        "weight": adapter.weight,
        "r": settings.r,
        "lora_alpha": settings.lora_alpha,
        "use_rslora": settings.use_rslora,
    }


def _side_warnings(source: Checkpoint) -> list[str]:
    if source.config is None:
        return [f"{printable(str(source.path))}: has no config.json; the output has none either"]
    return []
