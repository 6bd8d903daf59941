"""Looking at checkpoints: `inspect` reads headers and configs only, `diff` compares two."""

from __future__ import annotations

import contextlib
import itertools
import math
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from streamshard.checkpoint import Checkpoint, open_adapter, open_checkpoint
from streamshard.conversion import model_dims
from streamshard.detection import detect, layout_of
from streamshard.distance import Distances, is_comparable, tensor_distance
from streamshard.errors import InputError
from streamshard.families import Dims, dims_from_config
from streamshard.files import Files, reading
from streamshard.format import total_nbytes, total_parameters
from streamshard.inputs import watched
from streamshard.layouts import convert
from streamshard.limits import told
from streamshard.paths import PathLike, input_path
from streamshard.report import Report, finished, new_report
from streamshard.resources import workers_or_default
from streamshard.spelling import flat_names
from streamshard.tensors import Lazy, Workspace

__all__ = ["diff", "inspect"]


@told
@watched
def inspect(path: PathLike) -> Report:
    """What a checkpoint or adapter is: layout, spelling, family, dimensions, dtypes, files, LoRA.

    Reads headers and configs only. Raises `InputError` for what is malformed.
    """
    started = time.perf_counter()
    folder = input_path(path, "a checkpoint or adapter")
    with reading(folder):
        adapter = folder / "adapter_config.json"
        is_adapter = adapter.is_file() and not (folder / "config.json").is_file()
    if is_adapter:
        return _inspect_adapter(folder, started)
    found = open_checkpoint(path)
    report = new_report("inspect", found.tensors)
    files = Counter(dict.fromkeys(found.metadata, 0))
    for name, tensor in found.tensors.items():
        files[found.shard_of(name)] += tensor.nbytes
    facts: dict[str, Any] = dict.fromkeys(("spelling", "family", "packed_experts", "evidence"))
    try:
        seen = detect(list(found.tensors), found.config)
        facts = {
            "layout": seen.layout,
            "spelling": seen.spelling,
            "family": seen.family,
            "packed_experts": seen.packed_experts,
            "evidence": list(seen.evidence),
        }
        report["warnings"] += seen.warnings
    except InputError as error:
        report["warnings"].append(str(error))
    report |= {
        **facts,
        "path": str(found.path),
        "dimensions": _dimensions(found),
        "dtypes": dict(Counter(tensor.dtype for tensor in found.tensors.values())),
        "files": dict(files),
        "shards": len(found.metadata),
        "lora": _lora_state(found),
    }
    return finished(report, started)


@told
@watched
def diff(
    a: PathLike,
    b: PathLike,
    *,
    workers: int | None = None,
    progress: Callable[[int, str], None] | None = None,
    on_total: Callable[[int], None] | None = None,
) -> Report:
    """L2 distances of two checkpoints and what differs in names, shapes and dtypes.

    Layouts are reconciled: names are those of `b`. `missing` are names that only `b` has,
    `unexpected` ones that only `a` has. `on_total` is told how many bytes will be read, `progress`
    the bytes and the name of each finished tensor.
    """
    started = time.perf_counter()
    one, other = open_checkpoint(a), open_checkpoint(b)
    ours, theirs = _reconciled(one, other)
    compared = [n for n in theirs if n in ours and is_comparable(ours[n], theirs[n])]
    if on_total is not None:
        on_total(sum(ours[name].nbytes for name in compared))
    pairs = ((name, ours[name], theirs[name]) for name in compared)
    squared, norms = _measure(pairs, workers_or_default(workers), progress)
    distances = Distances(
        str(other.path),
        squared,
        total_parameters({name: ours[name] for name in squared}),
        sorted({n for n in itertools.chain(ours, theirs) if n not in squared}),
    )
    different: list[dict[str, Any]] = [
        {
            "name": name,
            "l2": math.sqrt(value),
            "relative": math.sqrt(value / norms[name]) if norms[name] else None,
        }
        for name, value in squared.items()
        if value
    ]
    different.sort(key=lambda row: (not math.isnan(row["l2"]), -row["l2"]))
    report = {
        **new_report("diff", ours),
        "layout": layout_of(theirs),
        "l2": distances.report(),
        "missing": sorted(theirs.keys() - ours.keys()),
        "unexpected": sorted(ours.keys() - theirs.keys()),
        "a": str(one.path),
        "b": str(other.path),
        "shapes": _unequal(ours, theirs, "shape"),
        "dtypes": _unequal(ours, theirs, "dtype"),
        "different": different,
        "equal": len(squared) - len(different),
    }
    return finished(report, started)


def _inspect_adapter(folder: Path, started: float) -> Report:
    adapter = open_adapter(folder)
    keys = ("peft_type", "r", "lora_alpha", "use_rslora", "use_dora", "base_model_name_or_path")
    report = {
        **new_report("inspect", adapter.tensors),
        "path": str(folder),
        "adapter": {key: adapter.config.get(key) for key in keys},
        "dtypes": dict(Counter(tensor.dtype for tensor in adapter.tensors.values())),
        "files": {adapter.file.name: total_nbytes(adapter.tensors)},
        "shards": 1,
    }
    return finished(report, started)


def _dimensions(found: Checkpoint) -> dict[str, Any] | None:
    """The dimensions in `config.json`, as far as they can be told without another folder."""
    if found.config is None:
        return None
    try:
        dims = dims_from_config(found.config)
    except InputError:
        try:
            # What HF calls llama has several custom classes; the dimensions are the same.
            dims = dims_from_config(found.config, architecture="LlamaForCausalLM")
        except InputError:
            return None
    return {
        "vision_layers": dims.blocks,
        "vision_hidden": dims.vision_hidden,
        "layers": dims.layers,
        "heads": dims.heads,
        "kv_heads": dims.kv_heads,
        "head_dim": dims.head_dim,
        "experts": dims.experts,
    }


def _lora_state(found: Checkpoint) -> dict[str, Any]:
    """LoRA pairs among the tensors, and the ranks that the config states."""
    pairs = [name for name in found.tensors if ".lora_A." in name]
    config = found.config or {}
    return {
        "wrapped": bool(pairs),
        "pairs": len(pairs),
        "ranks": sorted(
            {found.tensors[name].shape[0] for name in pairs if found.tensors[name].shape}
        ),
        "use_llm_lora": config.get("use_llm_lora"),
        "use_backbone_lora": config.get("use_backbone_lora"),
    }


def _reconciled(
    one: Checkpoint, other: Checkpoint
) -> tuple[Mapping[str, Lazy], Mapping[str, Lazy]]:
    """Both checkpoints under the names of the second one's layout."""
    mine, theirs = layout_of(one.tensors), layout_of(other.tensors)
    if mine is None or theirs is None or mine == theirs == "custom":
        return one.tensors, other.tensors
    if mine == theirs:
        pair = [_dims(found, one.config or other.config) for found in (one, other)]
        if None in pair:
            return one.tensors, other.tensors
        left, right = (dims for dims in pair if dims is not None)
    else:
        left = right = model_dims(one, other, theirs)
    return _renamed(one.tensors, left, mine, theirs), _renamed(other.tensors, right, theirs, theirs)


def _dims(found: Checkpoint, config: Mapping[str, Any] | None) -> Dims | None:
    """The dimensions of an HF checkpoint; None if it has no config, and cannot get one."""
    config = found.config or config
    if config is None:
        return None
    inner = config.get("text_config")
    llama = isinstance(inner, dict) and inner.get("model_type") == "llama"
    return dims_from_config(config, architecture="LlamaForCausalLM" if llama else None)


def _renamed(tensors: Mapping[str, Lazy], dims: Dims, mine: str, theirs: str) -> dict[str, Lazy]:
    """All tensors under the names of a layout; what cannot be carried keeps its own."""
    found = convert(tensors, dims, theirs, side=mine)
    given = flat_names(tensors, mine)
    left = {name: tensors[given[name]] for name in found.left if name in given}
    return {**left, **found.tensors}


def _unequal(
    ours: Mapping[str, Lazy], theirs: Mapping[str, Lazy], what: str
) -> dict[str, list[Any]]:
    return {
        name: [getattr(ours[name], what), getattr(other, what)]
        for name, other in theirs.items()
        if name in ours and getattr(ours[name], what) != getattr(other, what)
    }


def _measure(
    pairs: Iterator[tuple[str, Lazy, Lazy]],
    workers: int,
    progress: Callable[[int, str], None] | None,
) -> tuple[dict[str, float], dict[str, float]]:
    """Squared distances of pairs of tensors, and the squared norms of the second ones that differ."""
    from threadpoolctl import threadpool_limits

    lock, local = threading.Lock(), threading.local()
    squared: dict[str, float] = {}
    norms: dict[str, float] = {}
    with (
        threadpool_limits(1, user_api="blas"),
        contextlib.closing(Files()) as files,
        ThreadPoolExecutor(workers) as pool,
    ):

        def measured(pair: tuple[str, Lazy, Lazy]) -> tuple[str, float, float]:
            if not hasattr(local, "work"):
                local.work = Workspace(files)
            name, left, right = pair
            distance, size = tensor_distance(left, right, local.work)
            if progress is not None:
                with lock:
                    progress(left.nbytes, name)
            return name, distance, size

        # The pool remembers all that it is given, more than a kilobyte each.
        while batch := list(itertools.islice(pairs, 64 * workers)):
            for name, distance, size in pool.map(measured, batch):
                squared[name] = distance
                if distance:
                    norms[name] = size
    return squared, norms
