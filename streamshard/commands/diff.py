"""`diff`: two checkpoints compared: names, shapes, dtypes and distances, layouts reconciled."""

from __future__ import annotations

import itertools
import math
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from typing import Any, Unpack

from streamshard.checkpoint.folder import open_checkpoint
from streamshard.checkpoint.header import total_parameters
from streamshard.commands.drawing import Drawing, name_of
from streamshard.commands.heat_map import heat_map
from streamshard.commands.identify import Model, dims_of, model_dims
from streamshard.commands.public import public
from streamshard.disk.paths import PathLike
from streamshard.engine.budget import workers_or_default
from streamshard.engine.fetching import fetch, stored
from streamshard.engine.job import CacheOptions
from streamshard.engine.report import Report, finished, new_report
from streamshard.engine.workers import OnStep, collect
from streamshard.errors import AdapterError, InputError, UsageError, argument, printable
from streamshard.internvl.families import Layout
from streamshard.internvl.layouts import convert
from streamshard.internvl.model_config import Dims
from streamshard.lora.wrapped_names import unwrap
from streamshard.notes import note
from streamshard.tensor_names import factors_among
from streamshard.tensors.comparing import Distances, is_comparable, tensor_distance
from streamshard.tensors.lazy import Lazy
from streamshard.tensors.workspace import Workspace

__all__ = ["diff"]


@public
def diff(
    a: PathLike,
    b: PathLike,
    *,
    names: bool = False,
    plot: PathLike | None = None,
    workers: int | None = None,
    progress: Callable[[int, str], None] | bool | None = None,
    on_total: Callable[[int], None] | None = None,
    on_step: OnStep | None = None,
    **_cache: Unpack[CacheOptions],
) -> Report:
    """L2 distances of two checkpoints and what differs in names, shapes and dtypes.

    Layouts are reconciled: names are those of `b`. `missing` are names that only `b` has,
    `unexpected` ones that only `a` has; `differ` says whether there is any difference, or what could not
    be compared. With `names` only headers are read, also on the hub: there are no distances then, and
    `equal` counts tensors of equal name, shape and dtype. `plot` is a file (.png, .svg, .pdf) for a
    picture of `heat_map`, which has the relative change of each module in each layer. `on_total` is told
    how many bytes will be read, `progress` the bytes and the name of each finished tensor, `on_step`
    what is downloaded before.
    """
    if names and plot is not None:
        raise UsageError(
            "--plot shows distances, which --names does not measure: leave one of them out."
        )
    started, drawing = time.perf_counter(), Drawing(plot, heatmap=True)
    one, other = Model(open_checkpoint(a)), Model(open_checkpoint(b))
    note(*one.checkpoint.warnings, *other.checkpoint.warnings)
    wrapped = [bool(factors_among(model.tensors)) for model in (one, other)]
    if wrapped[0] != wrapped[1]:
        path = (one if wrapped[0] else other).path
        note(
            f"{printable(str(path))}: is a LoRA-wrapped training checkpoint: the weights under its pairs "
            f"are compared, without the updates: see what `merge-lora {argument(path)}` makes of it"
        )
        one, other = (
            _inside(model) if is_it else model
            for model, is_it in zip((one, other), wrapped, strict=True)
        )
    ours, theirs = _reconciled(one, other)
    both = [] if names else [name for name in theirs if name in ours]
    compared = [name for name in both if is_comparable(ours[name], theirs[name])]
    fetch({t.path for n in compared for one in (ours, theirs) for t in stored(one[n])}, on_step)
    if on_total is not None:
        on_total(sum(ours[name].nbytes for name in compared))
    pairs = ((name, ours[name], theirs[name]) for name in compared)
    watching = progress if callable(progress) else None
    squared, norms = _measure(pairs, workers_or_default(workers), watching)
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
    shapes, dtypes = _unequal(ours, theirs, "shape"), _unequal(ours, theirs, "dtype")
    title = f"{name_of(one.path)} against {name_of(other.path)}"
    heat = None if names else heat_map(title, squared, norms)
    if heat is not None:
        drawing.draw(heat)
    missing, unexpected = sorted(theirs.keys() - ours.keys()), sorted(ours.keys() - theirs.keys())
    unequal = bool(different or shapes or dtypes or missing or unexpected)
    alike = ours.keys() & theirs.keys() - shapes.keys() - dtypes.keys()
    report = {
        **new_report("diff", ours, other.layout),
        "l2": None if names else distances.report(),
        "missing": missing,
        "unexpected": unexpected,
        "a": str(one.path),
        "b": str(other.path),
        "shapes": shapes,
        "dtypes": dtypes,
        "different": different,
        "equal": len(alike) if names else len(squared) - len(different),
        "differ": unequal or bool(distances.skipped and not names),
        "heat_map": heat,
    }
    return finished(report, started)


def _inside(wrapped: Model) -> Model:
    """A wrapped checkpoint with the names of the model inside, and its pairs under their own."""
    tensors = wrapped.tensors
    try:
        names = unwrap(tensors)
    except (AdapterError, InputError):  # whoever merges it says what is wrong
        return wrapped
    plain = {name: tensors[given] for name, given in names.base.items()}
    others = {given: tensors[given] for given in names.tensors.values()}
    return Model(replace(wrapped.checkpoint, tensors={**plain, **others}))


def _reconciled(one: Model, other: Model) -> tuple[Mapping[str, Lazy], Mapping[str, Lazy]]:
    """Both checkpoints under the names of the second one's layout."""
    mine, theirs = one.layout, other.layout
    if mine is None or theirs is None or mine == theirs == "custom":
        return one.tensors, other.tensors
    if mine == theirs:
        config, its_config = one.config or other.config, other.config or one.config
        if config is None or its_config is None:
            return one.tensors, other.tensors
        left, right = dims_of(config), dims_of(its_config)
    elif one.relative is not None and one.relative == other.relative:
        left, right = one.dims, other.dims
    else:
        dims = model_dims(one, other, theirs)
        # What one of them ties is no word about the other.
        left, right = (replace(dims, tied=tied) for tied in (_ties(one), _ties(other)))
    return _renamed(one, left, mine, theirs), _renamed(other, right, theirs, theirs)


def _ties(model: Model) -> bool:
    """Whether a model's own config has embedding and head as one."""
    return model.config is not None and bool(dims_of(model.config).tied)


def _renamed(model: Model, dims: Dims, mine: Layout, theirs: Layout) -> dict[str, Lazy]:
    """All tensors under the names of a layout; what cannot be carried keeps its own."""
    given = model.given(mine)
    found = convert(model.tensors, dims, theirs, side=mine, given=given)
    left = {name: model.tensors[given[name]] for name in found.left if name in given}
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
    """Squared distances of pairs of tensors, and the squared norms of the second ones."""
    lock = threading.Lock()

    def measured(pair: tuple[str, Lazy, Lazy], work: Workspace) -> tuple[str, float, float]:
        name, left, right = pair
        distance, size = tensor_distance(left, right, work)
        if progress is not None:
            with lock:
                progress(left.nbytes, name)
        return name, distance, size

    found = collect(pairs, measured, workers)
    squared = {name: distance for name, distance, _ in found}
    return squared, {name: size for name, _, size in found}
