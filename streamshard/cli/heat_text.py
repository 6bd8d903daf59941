"""A heat map as text: a line a module, a letter for one layer or several, at most 80 columns."""

from __future__ import annotations

import math
import os
import sys
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from streamshard.errors import escaped

__all__ = ["heat_text"]

COLUMNS, LABEL = 80, 26
MANY_TIMES = 30.0  # the smallest: from here on a scale is logarithmic, as in pictures
SHADES = ".:-=+*#%@"
# Of the 256 colours of terminals, those nearest to viridis.
COLOURS = (54, 60, 24, 31, 37, 36, 71, 113, 226)


def heat_text(heat: Mapping[str, Any]) -> str:
    """The `heat_map` of a report as lines, in colours where standard output is a terminal for that."""
    coloured = _takes_colours()
    values = [
        cell
        for panel in heat["panels"]
        for row in panel["cells"]
        for cell in row
        if isinstance(cell, float) and cell > 0
    ]
    part, marks = _scale(values)
    lines = [f"{escaped(heat['title'])}: relative change of modules (down) by layers (across)"]
    for panel in heat["panels"]:
        lines += _panel(panel, part, coloured=coloured)
    lines.append("")
    if values:
        scale = "".join(_mark(number, coloured=coloured) for number in range(len(SHADES)))
        lines.append(marks.format(scale))
    lines.append("blank: unchanged, or no such module; !: not finite; 0: changed from all zeros")
    return "\n".join(lines)


def _scale(values: Sequence[float]) -> tuple[Callable[[float], float], str]:
    """Which part of the scale a change is, as in the picture; and the line that explains the scale."""
    if not values:
        return lambda _: 0.0, ""
    low, high = min(values), max(values)
    if high > MANY_TIMES * low:
        span = math.log(high / low)
        return (
            lambda value: math.log(value / low) / span,
            f"{low:.2g} {{}} {high:.2g} (logarithmic scale)",
        )
    return lambda value: value / high, f"0 {{}} {high:.2g} (linear scale)"


def _panel(
    panel: Mapping[str, Any], part: Callable[[float], float], *, coloured: bool
) -> list[str]:
    layers = panel["layers"] or 1
    each = -(-layers // (COLUMNS - LABEL - 2))
    title = panel["part"] if panel["layers"] else f"{panel['part']}, outside of layers"
    if panel["layers"]:
        title += f", layers 0 to {layers - 1}" + (f", {each} a column" if each > 1 else "")
    if not any(cell for row in panel["cells"] for cell in row):
        return ["", f"{title}: unchanged"]
    lines = ["", title]
    if panel["layers"]:
        lines.append(f"{'layer':>{LABEL}} {_ruler(layers, each)}")
    for module, cells in zip(panel["modules"], panel["cells"], strict=True):
        text = "".join(
            _cell(cells[start : start + each], part, coloured=coloured)
            for start in range(0, len(cells), each)
        )
        name = escaped(module)
        name = name if len(name) <= LABEL else f"…{name[1 - LABEL :]}"
        lines.append(f"{name:>{LABEL}} {text}".rstrip())
    return lines


def _ruler(layers: int, each: int) -> str:
    """The numbers of layers above their columns: every tenth one, or as there is room."""
    text = ""
    for first in range(0, layers, each):
        column = first // each
        if (column == 0 or first % 10 < each) and len(text) <= column:
            text = f"{text:<{column}}{first}" + " "
    last = (layers - 1) // each
    text = text.rstrip()
    if last > len(text):
        text = f"{text:<{last}}{layers - 1}"
    return text[: COLUMNS - LABEL - 1]


def _cell(cells: Sequence[Any], part: Callable[[float], float], *, coloured: bool) -> str:
    """The largest change of some layers."""
    for text, mark in (("not finite", "!"), ("from zero", "0")):
        if text in cells:
            return mark
    largest = max((cell for cell in cells if cell), default=0.0)
    if not largest:
        return " "
    return _mark(min(int(part(largest) * len(SHADES)), len(SHADES) - 1), coloured=coloured)


def _mark(number: int, *, coloured: bool) -> str:
    return f"\x1b[48;5;{COLOURS[number]}m \x1b[0m" if coloured else SHADES[number]


def _takes_colours() -> bool:
    try:
        is_terminal = sys.stdout.isatty()
    except ValueError:  # closed
        return False
    return is_terminal and not os.environ.get("NO_COLOR") and os.environ.get("TERM") != "dumb"
