"""Text that fits a terminal: how wide it is, what is how wide, and lines broken between words."""

from __future__ import annotations

import os
import re
from typing import TextIO

__all__ = ["columns_of", "cut", "fitted", "shortened", "width"]


def columns_of(stream: TextIO) -> int | None:
    """How many columns a terminal has; None if the stream leads to none."""
    try:
        if not stream.isatty():
            return None
        return os.get_terminal_size(stream.fileno()).columns or 80
    except (OSError, ValueError):
        return None


def width(text: str) -> int:
    """The columns that text takes: letters of East Asia take two, marks on letters none.

    >>> width("ab"), width("模型"), width("e\u0301")
    (2, 4, 1)
    """
    if text.isascii():
        return len(text)
    import unicodedata  # a megabyte, for few names

    wide = sum(unicodedata.east_asian_width(letter) in "WF" for letter in text)
    return len(text) + wide - sum(unicodedata.combining(letter) != 0 for letter in text)


def fitted(text: str, columns: int | None) -> str:
    """Text whose lines are broken between words where they are too long; words stay whole.

    What follows a break is indented by two more than its line.

    >>> print(fitted("  read 3 of 3 tensors", 14))
      read 3 of 3
        tensors
    """
    if columns is None:
        return text
    return "\n".join(_broken(line, columns) for line in text.split("\n"))


def _broken(line: str, columns: int) -> str:
    if width(line) <= columns:
        return line
    words = re.findall(r" *[^ ]+", line)
    indent = " " * (len(line) - len(line.lstrip(" ")) + 2)
    lines: list[str] = []
    used = 0
    for word in words:
        if lines and used + width(word) <= columns:
            lines[-1] += word
            used += width(word)
        else:
            lines.append(indent + word.lstrip(" ") if lines else word)
            used = width(lines[-1])
    return "\n".join(lines)


def shortened(name: str, columns: int, mark: str = "…") -> str:
    """The end of a dotted name that has room, in at least two whole parts; else nothing.

    >>> shortened("model.layers.3.mlp.up_proj.weight", 20)
    '…mlp.up_proj.weight'
    """
    if width(name) <= columns:
        return name
    parts = name.split(".")
    for first in range(1, len(parts) - 1):
        end = mark + ".".join(parts[first:])
        if width(end) <= columns:
            return end
    return ""


def cut(name: str, columns: int, mark: str = "…") -> str:
    """A name with beginning and end, and a mark for what is left out between them.

    >>> cut("language_model.model.layers.3.mlp.up_proj.weight", 30)
    'language_…3.mlp.up_proj.weight'
    """
    room = max(columns, 12) - width(mark)
    if width(name) <= columns:
        return name
    start = room // 3
    return name[:start] + mark + name[start - room :]
