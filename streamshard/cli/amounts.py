"""Numbers and lists of names as people read them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

__all__ = ["files_text", "l2_text", "number_text", "shortened"]


def files_text(count: int) -> str:
    """How many files."""
    return f"{count} file" if count == 1 else f"{count} files"


def shortened(names: list[str], limit: int = 12) -> str:
    """The first names in quotes, and how many more there are."""
    more = f" and {len(names) - limit:,} more" if len(names) > limit else ""
    return (", ".join(f"'{name}'" for name in names[:limit]) or "none") + more


def number_text(value: float | None, how: str = ".6g") -> str:
    """A number of a report, which has None for NaN and infinities as JSON has none of these."""
    return "not finite" if value is None else format(value, how)


def l2_text(l2: Mapping[str, Any]) -> str:
    """The three numbers of a distance, everywhere in these words and this order."""
    return (
        f"{number_text(l2['global'])} (sum over tensors {number_text(l2['sum'])}, per parameter "
        f"{number_text(l2['per_parameter'])})"
    )
