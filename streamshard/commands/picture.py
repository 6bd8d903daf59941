"""`plot`: the picture of a change, drawn by matplotlib: heat maps of modules by layers, and bars.

Colours are viridis, which all eyes can order; what has no number has a colour of its own and stands in
the legend. A scale is logarithmic where the largest is many times the smallest, and says so.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from pathlib import PurePath
from typing import TYPE_CHECKING, Any

from streamshard.commands.figure_file import rendered
from streamshard.commands.heat_map import FROM_ZERO, NOT_FINITE
from streamshard.disk.paths import PathLike
from streamshard.errors import UsageError, printable
from streamshard.extras import needed_for

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

__all__ = ["FORMATS", "drawn", "rendered"]

FORMATS = ("png", "svg", "pdf")

MANY_TIMES = 30.0  # the smallest: from here on a scale is logarithmic
UNCHANGED, ABSENT, ZERO, BROKEN = "#e3e3e3", "#ffffff", "#d55e00", "#000000"
ROW, COLUMN = 0.21, 0.085  # inches of a cell at least
FONT = 8


def drawn(heat: Mapping[str, Any]) -> Figure:
    """The figure of the `heat_map` of a report; every panel's image holds the cells that it shows."""
    with needed_for("--plot"):
        import matplotlib.figure  # noqa: F401 - the next one may have been imported before

        from streamshard.commands.change_figure import ChangeFigure
    layered = [panel for panel in heat["panels"] if panel["layers"]]
    others = [panel for panel in heat["panels"] if not panel["layers"]]
    longest = max((panel["layers"] for panel in layered), default=24)
    heights = [0.62 + ROW * len(panel["modules"]) for panel in layered]
    count = sum(len(panel["modules"]) for panel in others)
    below = max(ROW * count, 0.23 * len(heat["components"]), 1.2) + 0.9
    width = max(
        10.5, min(2.9 + COLUMN * 2 * min(longest, 48) + COLUMN * max(longest - 48, 0), 16.0)
    )
    height = 1.15 + sum(heights) + below + 0.75
    figure = ChangeFigure(figsize=(width, height), dpi=150, layout="constrained")
    figure.suptitle(_title(heat), fontsize=FONT + 3, fontweight="bold")
    grid = figure.add_gridspec(len(heights) + 1, 1, height_ratios=[*heights, below])
    norm, label = _scale(list(_numbers(heat)))
    axes = []
    for place, panel in enumerate(layered):
        axes.append(figure.add_subplot(grid[place, 0]))
        _heat(axes[-1], panel, norm)
    low = grid[len(heights), 0].subgridspec(1, 2, width_ratios=[1, 2.6])
    if others:
        axes.append(figure.add_subplot(low[0, 0]))
        _heat(axes[-1], _joined(others), norm)
    _bars(figure.add_subplot(low[0, 1] if others else grid[len(heights), 0]), heat["components"])
    if norm is not None and axes:
        from matplotlib.cm import ScalarMappable

        bar = figure.colorbar(
            ScalarMappable(norm, _colours()), ax=axes[: len(layered)] or axes, pad=0.01, aspect=30
        )
        bar.set_label(label, fontsize=FONT)
        bar.ax.tick_params(labelsize=FONT - 1)
    _legend(figure, heat)
    return figure


def _title(heat: Mapping[str, Any]) -> str:
    size = "not finite" if heat["global"] is None else f"{heat['global']:.4g}"
    return (
        f"{_plain(heat['title'])}\n{heat['changed']:,} of {heat['compared']:,} compared tensors "
        f"changed, L2 distance {size}"
    )


def _plain(text: str) -> str:
    return printable(text, 120).replace("$", r"\$")


def _numbers(heat: Mapping[str, Any]) -> Iterator[float]:
    for panel in heat["panels"]:
        for row in panel["cells"]:
            yield from (cell for cell in row if isinstance(cell, float) and cell > 0)


def _scale(values: Sequence[float]) -> tuple[Any, str]:
    """The scale of the changes, and what is said of it; None if nothing has changed."""
    from matplotlib.colors import LogNorm, Normalize

    if not values:
        return None, ""
    low, high = min(values), max(values)
    text = "relative change ‖new - old‖ / ‖old‖"
    if high > MANY_TIMES * low:
        return LogNorm(low, high), f"{text}\nlogarithmic scale"
    return Normalize(0, high), f"{text}\nlinear scale"


def _colours() -> Any:
    from matplotlib import colormaps

    return colormaps["viridis"]


def _joined(panels: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """What is outside of layers, as one panel."""
    return {
        "part": "projector, and what is outside of layers",
        "layers": None,
        "modules": [_short(f"{one['part']}: {m}") for one in panels for m in one["modules"]],
        "left_out": sum(one["left_out"] for one in panels),
        "cells": [row for one in panels for row in one["cells"]],
    }


def _short(text: str, limit: int = 38) -> str:
    return text if len(text) <= limit else f"{text[: limit // 2 - 1]}…{text[-limit // 2 :]}"


def _heat(axes: Axes, panel: Mapping[str, Any], norm: Any) -> None:
    """One heat map: modules down, layers across."""
    import numpy as np
    from matplotlib.colors import to_rgb

    colours, cells = _colours(), panel["cells"]
    image = np.ones((len(cells), len(cells[0]), 3))
    own = {FROM_ZERO: ZERO, NOT_FINITE: BROKEN, None: ABSENT, 0: UNCHANGED}
    for row, values in enumerate(cells):
        for column, cell in enumerate(values):
            plain = own.get(cell)
            image[row, column] = to_rgb(plain) if plain else colours(norm(cell))[:3]
    axes.imshow(image, aspect="auto", interpolation="nearest")
    left = f" (and {panel['left_out']} that changed less)" if panel["left_out"] else ""
    joined = any(".experts" in module for module in panel["modules"])
    title = f"{panel['part']}{' (all experts of a layer together)' if joined else ''}{left}"
    axes.set_title(title, loc="left", fontsize=FONT + 1, fontweight="bold")
    axes.set_yticks(range(len(cells)), [_plain(name) for name in panel["modules"]], fontsize=FONT)
    if panel["layers"]:
        step = 1 if panel["layers"] <= 32 else 2 if panel["layers"] <= 64 else 5
        axes.set_xticks(range(0, panel["layers"], step))
        axes.tick_params(axis="x", labelsize=FONT - 1)
        axes.set_xlabel("layer", fontsize=FONT)
        axes.set_xticks([x - 0.5 for x in range(1, panel["layers"])], minor=True)
    else:
        axes.set_xticks([])
    axes.set_yticks([y - 0.5 for y in range(1, len(cells))], minor=True)
    axes.grid(which="minor", color="white", linewidth=0.6)
    axes.tick_params(which="minor", length=0)
    axes.spines[:].set_visible(False)


def _bars(axes: Axes, components: Sequence[Mapping[str, Any]]) -> None:
    """Absolute L2 by component, each with its number."""
    sizes = [one["l2"] for one in components]
    finite = [size for size in sizes if size]
    names = [f"{one['part']}: {one['kind']}" if one["kind"] else one["part"] for one in components]
    logarithmic = bool(finite) and max(finite) > MANY_TIMES * min(finite)
    axes.barh(range(len(sizes)), [size or 0 for size in sizes], color="#0072b2", height=0.7)
    if logarithmic:
        low, high = math.log10(min(finite)), math.log10(max(finite))
        axes.set_xscale("log")
        axes.set_xlim(10 ** (low - 0.3), 10 ** (high + 0.25 * (high - low)))
    else:
        axes.set_xlim(0, 1.25 * max(finite, default=1.0))
    for place, size in enumerate(sizes):
        text = "not finite" if size is None else f"{size:.3g}" if size else "unchanged"
        start = size or axes.get_xlim()[0]
        axes.annotate(
            text,
            (start, place),
            xytext=(3, 0),
            textcoords="offset points",
            va="center",
            fontsize=FONT - 1,
        )
    axes.set_yticks(range(len(names)), names, fontsize=FONT)
    axes.invert_yaxis()
    axes.tick_params(axis="x", labelsize=FONT - 1)
    how = "logarithmic" if logarithmic else "linear"
    axes.set_xlabel(f"L2 norm, {how} scale", fontsize=FONT)
    axes.set_title("absolute L2 by component", loc="left", fontsize=FONT + 1, fontweight="bold")
    axes.spines[["top", "right"]].set_visible(False)


def _legend(figure: Figure, heat: Mapping[str, Any]) -> None:
    """What the colours mean that are not on the scale."""
    from matplotlib.patches import Patch

    found = {
        cell
        for panel in heat["panels"]
        for row in panel["cells"]
        for cell in row
        if not cell or isinstance(cell, str)
    }
    words = {
        0.0: (UNCHANGED, "unchanged"),
        None: (ABSENT, "no such module in this layer"),
        FROM_ZERO: (ZERO, "changed from all zeros"),
        NOT_FINITE: (BROKEN, "not finite"),
    }
    patches = [
        Patch(facecolor=colour, edgecolor="#888888", linewidth=0.5, label=text)
        for value, (colour, text) in words.items()
        if value in found
    ]
    if patches:
        figure.legend(
            handles=patches, loc="outside lower center", ncols=4, fontsize=FONT, frameon=False
        )


def plot_format(file: PathLike, option: str = "--plot") -> str:
    """The format that a picture's name asks for; raises `UsageError` for any other."""
    kind = PurePath(file).suffix[1:].lower()
    if kind not in FORMATS:
        raise UsageError(
            f"{option} is {printable(str(file))}: a picture's name ends in .png, .svg or .pdf."
        )
    return kind
