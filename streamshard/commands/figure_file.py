"""A figure of matplotlib as a file."""

from __future__ import annotations

import io
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["rendered"]


def rendered(figure: Figure, kind: str) -> bytes:
    """The file of a figure, the same whenever it is made."""
    buffer = io.BytesIO()
    dates = {"svg": {"Date": None}, "pdf": {"CreationDate": None}}
    from matplotlib import rc_context

    with rc_context({"svg.hashsalt": "streamshard", "svg.fonttype": "none"}):
        figure.savefig(buffer, format=kind, metadata=dates.get(kind))
    return buffer.getvalue()
