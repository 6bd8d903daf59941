"""What `--plot` and `--heatmap` ask for: the change measured, put into the report, and drawn.

Where a picture goes is looked at before a run, and it is drawn after it: a run does not take longer to
be complete, and only the weights of modules that have changed are read once more, for their norms.
"""

from __future__ import annotations

import contextlib
import dataclasses
import math
from collections.abc import Callable, Collection, Iterator, Mapping
from pathlib import Path
from typing import Any

from streamshard.checkpoint.file_names import REPORT_NAME
from streamshard.checkpoint.record import read_record
from streamshard.disk.paths import PathLike, output_path
from streamshard.engine.job import Job, Options, Plan
from streamshard.engine.report import Report
from streamshard.engine.run import run
from streamshard.engine.workers import collect
from streamshard.errors import StreamshardError, UsageError, printable
from streamshard.extras import needed_for
from streamshard.tensors.comparing import squared_norm
from streamshard.tensors.lazy import Lazy
from streamshard.tensors.workspace import Workspace

__all__ = ["Drawing", "name_of"]


class Drawing:
    """A picture that is asked for, a heat map for the terminal, both or none."""

    def __init__(self, file: PathLike | None, *, heatmap: bool) -> None:
        """Raises what is wrong with the file before anything is read."""
        self.is_wanted = heatmap or file is not None
        self._file = None if file is None else output_path(file, "the picture")
        self._kind = ""
        if self._file is not None:
            from streamshard.commands.picture import plot_format
            from streamshard.disk.pictures import check_place

            self._kind = plot_format(self._file)
            check_place(self._file)
            with needed_for("--plot"):
                import matplotlib.figure  # noqa: F401

    def _check_outside(self, output: Path) -> None:
        """Raise `UsageError` if the picture would lie in an output, which lists all of its files."""
        if self._file is not None and output.resolve() in self._file.resolve().parents:
            raise UsageError(
                f"--plot is {printable(str(self._file))}, which is in the output. That folder appears "
                "when it is complete, and lists all of its files: choose a place beside it."
            )

    def draw(self, heat: Mapping[str, Any]) -> None:
        """Draw the picture, if one is asked for."""
        if self._file is not None:
            from streamshard.commands.picture import drawn, rendered
            from streamshard.disk.pictures import put_in_place

            put_in_place(self._file, rendered(drawn(heat), self._kind))

    def run(self, job: Callable[[], Job], options: Options) -> Report:
        """Run a job, which nobody else keeps in memory, and draw what it has changed."""
        if not self.is_wanted:
            return run(job(), options)
        from streamshard.commands.heat_map import heat_map, wanted

        plans: list[Plan] = []
        told = options.on_plan
        measured: list[Mapping[str, float]] = []

        def on_plan(made: Plan) -> None:
            self._check_outside(made.output)
            if made.compared.source is None:
                raise UsageError(
                    "--plot and --heatmap show the distance from the reference's weights, and it has "
                    "none. Give a reference with weights, or leave them out."
                )
            plans.append(made)
            if told is not None:
                told(made)

        watched = dataclasses.replace(options, on_plan=on_plan, on_distances=measured.append)
        report = run(job(), watched)
        report["heat_map"] = None
        part = report["part"]
        if not report["dry_run"] and (part is None or part["complete"]):
            with _complete(report["output"]):
                (made,) = plans
                # Another process may have completed it: then its record knows.
                found = measured[0] if measured else _recorded(made)
                norms = _norms(made, list(wanted(found)), watched)
                title = f"{name_of(made.output)} against {name_of(made.compared.source)}"
                report["heat_map"] = heat_map(title, found, norms)
                self.draw(report["heat_map"])
        return report


def name_of(path: object) -> str:
    """What a title calls a checkpoint: the last part of its path."""
    return Path(str(path)).absolute().name or str(path)


def _recorded(made: Plan) -> dict[str, float]:
    """The squared distances of what is compared, as the record of the complete output has them."""
    squared = dict.fromkeys(made.compared.names, 0.0)
    norms = read_record(made.output / REPORT_NAME)["l2_per_tensor"]
    for name, norm in norms.items():  # of what has any
        squared[name] = math.nan if norm is None else norm * norm
    return squared


def _norms(made: Plan, names: Collection[str], options: Options) -> dict[str, float]:
    """The squared norms of what modules that have changed were before, by name."""
    tensors: dict[str, Lazy] = {}
    for shard in made.shards:
        tensors |= shard.tensors
    before = [made.compared.reference.get(name, tensors[name]) for name in names]
    if options.on_step is not None:
        options.on_step("measuring", sum(tensor.nbytes for tensor in before), 0)

    def measured(item: tuple[str, Lazy], work: Workspace) -> float:
        norm = squared_norm(item[1], work)
        if options.progress is not None:
            options.progress(item[1].nbytes, item[0])
        return norm

    pairs = zip(names, before, strict=True)
    return dict(zip(names, collect(pairs, measured, made.workers), strict=True))


@contextlib.contextmanager
def _complete(output: str) -> Iterator[None]:
    """Have it said of whatever ends the block that the output is complete."""
    said = f"{output} is complete; only the picture of the change is missing."
    try:
        yield
    except StreamshardError as error:
        error.args = (f"{error} {said}", *error.args[1:])
        raise
    except BaseException as error:
        if not isinstance(error, Exception) and not any(map(str, error.args)):
            error.args = (said,)
        raise
