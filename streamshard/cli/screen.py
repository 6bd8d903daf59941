"""Where progress, messages and results go, and what is set up before anything heavy is imported."""

from __future__ import annotations

import contextlib
import logging
import os
import sys
from collections.abc import Callable, Iterator
from typing import Any

import streamshard
from streamshard.cli import texts
from streamshard.cli.console import error_document, say, show, show_json
from streamshard.cli.heat_text import heat_text
from streamshard.cli.plan_texts import is_complete, part_text, plan_text
from streamshard.cli.progress import Progress
from streamshard.errors import StreamshardError, escaped
from streamshard.wording import command_line

__all__ = ["begin", "with_picture", "write"]


_NONE_FINISHED = "No file was finished, so nothing is kept: run the same command again."
_REPLACING = (
    "No file was finished, so nothing of it is kept, and an earlier output is as it was: run the same "
    "command again."
)


def begin(writing: str = "", *, as_json: bool, quiet: bool, verbose: bool) -> Screen:
    """Set up logging and memory before anything heavy is imported.

    `writing` is what writing is called in this command.
    """
    screen = Screen(writing, as_json=as_json, quiet=quiet)
    _log(screen.progress, quiet=quiet, verbose=verbose)
    _one_blas_thread()
    _return_memory()
    return screen


def write(
    function: str,
    writing: str,
    text: Callable[[dict[str, Any]], str],
    *,
    as_json: bool = False,
    quiet: bool = False,
    verbose: bool = False,
    **options: Any,
) -> None:
    """Run a writing command of the Python API and print its report."""
    screen = begin(writing, as_json=as_json, quiet=quiet, verbose=verbose)
    none = _REPLACING if options.get("overwrite") else _NONE_FINISHED
    none = "" if options.get("dry_run") else none
    with (
        _said_if_ended(none),
        contextlib.closing(screen.progress) as progress,
        command_line(options),
    ):
        progress.step("checking")
        report = getattr(streamshard, function)(
            on_step=progress.step, progress=progress.piece, **options
        )
    if options.get("heatmap") and report.get("heat_map") is not None:
        screen.heat = heat_text(report["heat_map"])
    done = is_complete(report)
    place = escaped(str(report["output"] or (report["pushed"] or {}).get("url")))
    text = with_picture(text, options.get("plot"))
    with _said_if_ended(f"{place} is complete." if done else ""):
        screen.result(report, text if done else plan_text if report["dry_run"] else part_text)


def with_picture(
    text: Callable[[dict[str, Any]], str], file: str | None
) -> Callable[[dict[str, Any]], str]:
    """A text that also says where a picture is, if one was drawn."""
    if file is None:
        return text
    return lambda report: f"{text(report)}\n  picture: {escaped(file)}"


@contextlib.contextmanager
def _said_if_ended(text: str) -> Iterator[None]:
    """What a signal that arrives here says, unless it says something already."""
    try:
        yield
    except BaseException as error:
        if not isinstance(error, Exception) and text and not any(map(str, error.args)):
            error.args = (text,)
        raise


class Screen:
    """Where progress, messages and results go."""

    def __init__(self, writing: str, *, as_json: bool, quiet: bool) -> None:
        self._as_json = as_json
        self._quiet = quiet
        self.heat = ""
        """What follows the result, in lines that are not to be broken."""
        self.progress = Progress({"writing": writing}, quiet=quiet)

    def result(
        self,
        report: dict[str, Any],
        text: Callable[[dict[str, Any]], str],
        error: StreamshardError | None = None,
    ) -> None:
        """Print the report, as JSON or as `text` puts it; with the `error` that it led to, if any."""
        place = report["output"] or (report.get("pushed") or {}).get("url")
        done = f"; {place} is complete" if place and is_complete(report) else ""
        if self._as_json:
            if error is not None:
                name = type(error).__name__
                report = {**report, **error_document(name, error.exit_code, str(error))}
            show_json(report, done)
            return
        if not self._quiet:
            report = texts.printable_report(report)
            for warning in report["warnings"]:
                say(f"warning: {warning}")
            show(text(report), done, self.heat)


class _Handler(logging.Handler):
    """Says what is logged, above the progress."""

    def __init__(self, progress: Progress) -> None:
        super().__init__()
        self._progress = progress

    def emit(self, record: logging.LogRecord) -> None:
        text = escaped(self.format(record)) if record.exc_info is None else self.format(record)
        if record.name.partition(".")[0] != "streamshard":
            text = f"{record.levelname} {record.name}: {text}"
        elif record.levelno >= logging.WARNING:
            text = f"{record.levelname.lower()}: {text}"
        self._progress.message(text)


def _log(progress: Progress, *, quiet: bool, verbose: bool) -> None:
    """Have logs said: of this package also what is no warning, and of others only warnings."""
    root = logging.getLogger()
    root.setLevel(logging.DEBUG if verbose else logging.WARNING)
    for handler in [one for one in root.handlers if isinstance(one, _Handler)]:
        root.removeHandler(handler)
    root.addHandler(_Handler(progress))
    own = logging.ERROR if quiet else logging.INFO
    logging.getLogger("streamshard").setLevel(logging.DEBUG if verbose else own)
    logging.captureWarnings(capture=True)
    logging.raiseExceptions = False  # a log that cannot be written is no reason for tracebacks


def _one_blas_thread() -> None:
    # Read when numpy is first imported; saves the memory that each BLAS thread would reserve.
    for name in ("OPENBLAS_NUM_THREADS", "OMP_NUM_THREADS", "MKL_NUM_THREADS"):
        os.environ[name] = "1"


def _return_memory() -> None:
    """Have glibc give back the memory of freed tables of names, which otherwise stays its own.

    It raises the size from which blocks are mapped by themselves whenever such a block is freed;
    saying the size (`M_MMAP_THRESHOLD`, malloc.h) ends that. One arena is enough for threads that
    keep their buffers (`M_ARENA_MAX`).
    """
    if sys.platform != "linux":
        return
    import ctypes

    with contextlib.suppress(AttributeError, OSError):  # another C library
        libc = ctypes.CDLL(None)
        libc.mallopt(-3, 1024 * 1024)
        libc.mallopt(-8, 1)
