"""`inspect`: what a checkpoint or an adapter is, by headers and configs only."""

from __future__ import annotations

import time
from collections import Counter
from pathlib import Path
from typing import Any, Unpack

from streamshard.checkpoint.adapter_folder import AdapterFolder, is_adapter, open_adapter
from streamshard.checkpoint.folder import Checkpoint, open_checkpoint
from streamshard.checkpoint.header import total_nbytes
from streamshard.checkpoint.weight_files import is_of_adapter
from streamshard.commands.identify import Model, dimensions
from streamshard.commands.public import public
from streamshard.disk.existence import is_folder
from streamshard.disk.paths import PathLike, input_path
from streamshard.disk.system import reading, system
from streamshard.engine.job import BaseOptions
from streamshard.engine.report import Report, finished, new_report
from streamshard.errors import InputError, printable
from streamshard.internvl.detection import layout_of
from streamshard.internvl.lora_targets import FLAGS
from streamshard.notes import note
from streamshard.tensor_names import factors_among

__all__ = ["inspect"]


@public
def inspect(path: PathLike, **_cache: Unpack[BaseOptions]) -> Report:
    """What a checkpoint or adapter is: layout, spelling, family, dimensions, dtypes, files, LoRA.

    Reads headers and configs only, also of models on the hub. Raises `InputError` for what is malformed.
    """
    started = time.perf_counter()
    folder = input_path(path, "a checkpoint or adapter")
    with reading(folder):
        if is_of_adapter(folder):
            return _inspect_adapter(folder.parent, started)
        adapter = is_folder(folder) and is_adapter(folder, system.listdir(folder))
    if adapter:
        return _inspect_adapter(folder, started)
    found = open_checkpoint(path)
    report = new_report("inspect", found.tensors, None)
    note(*found.warnings)
    files = Counter(dict.fromkeys(found.metadata, 0))
    for tensor in found.tensors.values():
        files[Path(tensor.path).name] += tensor.nbytes
    facts: dict[str, Any] = dict.fromkeys(("spelling", "family", "packed_experts", "evidence"))
    model = Model(found)
    try:
        seen = model.detected
        facts = {
            "layout": seen.layout,
            "spelling": seen.spelling,
            "family": seen.family,
            "packed_experts": seen.packed_experts,
            "evidence": list(seen.evidence),
        }
        note(*seen.warnings)
        if found.config is None and seen.layout is not None:
            note(
                f"{printable(str(found.path))}: there is no config.json. What it is follows from names "
                "and shapes alone, missing layers are not noticed, and nothing can load it: copy that "
                "of the original model"
            )
        if not factors_among(found.tensors):  # `verify` looks at wrapped ones, too
            model.check()
    except InputError as error:
        note(str(error))
    report |= {
        **facts,
        "path": str(found.path),
        "dimensions": dimensions(found.config),
        "dtypes": dict(Counter(tensor.dtype for tensor in found.tensors.values())),
        "files": dict(files),
        "shards": len(found.metadata),
        "lora": _lora_state(found),
    }
    return finished(report, started)


def _inspect_adapter(folder: Path, started: float) -> Report:
    adapter = open_adapter(folder)
    note(*adapter.warnings, *_beside(adapter))
    keys = (
        *("peft_type", "r", "lora_alpha", "use_rslora", "use_dora", "target_modules"),
        "base_model_name_or_path",
    )
    report = {
        **new_report("inspect", adapter.tensors, layout_of(adapter.tensors)),
        "path": str(folder),
        "adapter": {key: adapter.config.get(key) for key in keys},
        "dtypes": dict(Counter(tensor.dtype for tensor in adapter.tensors.values())),
        "files": {
            **{name: total_nbytes(tensors) for name, tensors in adapter.files.items()},
            **{
                found.file.relative_to(adapter.path).as_posix(): total_nbytes(found.tensors)
                for found in adapter.beside
            },
        },
        "shards": len(adapter.files),
    }
    return finished(report, started)


def _beside(adapter: AdapterFolder) -> list[str]:
    """That a merge also takes weights which lie beside the adapter."""
    return [
        f"{printable(found.file.name)} has {len(found.tensors)} tensors that were trained beside the "
        "adapter; a merge takes them, too"
        for found in adapter.beside
    ]


def _lora_state(found: Checkpoint) -> dict[str, Any]:
    """LoRA pairs among the tensors, and the ranks that the config states."""
    pairs = factors_among(found.tensors, "A")
    config = found.config or {}
    return {
        "wrapped": bool(pairs),
        "pairs": len(pairs),
        "ranks": sorted(
            {found.tensors[name].shape[0] for name in pairs if found.tensors[name].shape}
        ),
        **{flag: config.get(flag) for flag in FLAGS},
    }
