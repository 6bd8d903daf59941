"""The figure of a change, which a notebook shows at the end of a cell, whatever draws there otherwise."""

from __future__ import annotations

from matplotlib.figure import Figure

from streamshard.commands.figure_file import rendered

__all__ = ["ChangeFigure"]


class ChangeFigure(Figure):
    """A figure of matplotlib that knows how it is shown, as no one does that pyplot has not made."""

    def _repr_png_(self) -> bytes:
        return rendered(self, "png")
