"""`plot`: the picture of what a report tells, for notebooks and scripts."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from streamshard.checkpoint.file_names import REPORT_NAME
from streamshard.checkpoint.json_files import read_json_object
from streamshard.checkpoint.nothing_there import instead
from streamshard.checkpoint.record import MAX_RECORD_BYTES
from streamshard.commands.arguments import shown
from streamshard.commands.diff import diff
from streamshard.commands.picture import drawn, plot_format, rendered
from streamshard.disk.existence import has_name, is_there
from streamshard.disk.paths import PathLike, input_path, output_path
from streamshard.disk.pictures import check_place, put_in_place
from streamshard.errors import InputError, StreamshardError, UsageError, argument
from streamshard.wording import spoken

if TYPE_CHECKING:
    from matplotlib.figure import Figure
else:
    Figure = Any  # matplotlib may not be there

__all__ = ["plot"]


def plot(report: Mapping[str, Any] | PathLike, file: PathLike | None = None) -> Figure:
    """What has changed, as a figure of matplotlib, which has to be installed.

    `report` is what `diff`, `merge_lora` or a conversion returned, or an output folder of these. Of a
    run that was not asked for a `heatmap` or `plot`, output and reference are compared first, which
    reads both. `file`, whose name ends in `.png`, `.svg` or `.pdf`, is written, too.

    Raises a `StreamshardError` if there is nothing to compare, or no place for the file.
    """
    try:
        return _plot(report, file)
    except StreamshardError as error:
        error.args = (spoken(str(error), "plot"), *error.args[1:])
        raise error.with_traceback(None)  # noqa: B904 - as of every command


def _plot(report: Mapping[str, Any] | PathLike, file: PathLike | None) -> Figure:
    place = None if file is None else output_path(file, "the picture")
    kind = "" if place is None else plot_format(place, "`file`")
    if place is not None:
        check_place(place)
    figure = drawn(_heat(report))
    if place is not None:
        put_in_place(place, rendered(figure, kind))
    return figure


def _heat(report: Mapping[str, Any] | PathLike) -> Mapping[str, Any]:
    if not isinstance(report, Mapping):
        if not isinstance(report, (str, bytes, os.PathLike)):
            raise UsageError(
                f"`report` is {shown(report)}; a report, or the path of an output, was expected."
            )
        folder = input_path(report, "an output")
        if not has_name(folder / REPORT_NAME):
            if not is_there(folder):
                raise InputError.missing(folder, f"no such folder. {instead(folder)}")
            raise InputError.at(
                folder,
                f"is no output of streamshard: it has no {REPORT_NAME}. What has changed in it tells "
                f"`diff {argument(folder)} OTHER`.",
            )
        report = read_json_object(folder / REPORT_NAME, MAX_RECORD_BYTES) | {"output": folder}
    heat: Mapping[str, Any] | None = report.get("heat_map")
    if heat is not None:
        return heat
    output, l2 = report.get("output"), report.get("l2")
    reference = l2.get("reference") if isinstance(l2, Mapping) else None
    if output is None or reference is None or report.get("dry_run"):
        raise UsageError(
            "this report compares nothing with anything. Give one of `diff`, of `merge-lora`, or of a "
            "conversion whose reference has weights."
        )
    compared: Mapping[str, Any] = diff(output, reference)["heat_map"]
    return compared
