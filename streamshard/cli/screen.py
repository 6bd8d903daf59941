"""Where progress, messages and results go, and what is set up before anything heavy is imported."""

from __future__ import annotations

import contextlib
import json
import logging
import os
import sys
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import streamshard
from streamshard.cli import texts
from streamshard.cli.console import say, show
from streamshard.errors import escaped
from streamshard.wording import command_line

if TYPE_CHECKING:
    from tqdm import tqdm

__all__ = ["begin", "write"]


def begin(*, as_json: bool, quiet: bool, verbose: bool) -> _Screen:
    """Set up logging and memory before anything heavy is imported."""
    _log_to_stderr(verbose=verbose)
    _one_blas_thread()
    _return_memory()
    return _Screen(as_json=as_json, quiet=quiet)


def write(
    function: str,
    text: Callable[[dict[str, Any]], str],
    *,
    as_json: bool,
    quiet: bool,
    verbose: bool,
    **options: Any,
) -> None:
    """Run a writing command of the Python API and print its report."""
    screen = begin(as_json=as_json, quiet=quiet, verbose=verbose)
    with contextlib.closing(screen), command_line(options):
        report = getattr(streamshard, function)(
            on_plan=lambda plan: screen.begin(plan.tensor_nbytes),
            progress=screen.progress,
            **options,
        )
    screen.result(report, texts.plan_text if report["dry_run"] else text)


class _Screen:
    """Where progress, messages and results go."""

    def __init__(self, *, as_json: bool, quiet: bool) -> None:
        self._as_json = as_json
        self._quiet = quiet
        self._bar: tqdm[Any] | None = None

    def close(self) -> None:
        """End the progress bar."""
        bar, self._bar = self._bar, None
        if bar is not None:
            with contextlib.suppress(OSError, ValueError):
                bar.close()

    def begin(self, nbytes: int) -> None:
        """Begin the progress bar."""
        # A log file gets no bar; a terminal does.
        if self._quiet or not sys.stderr.isatty():
            return
        from tqdm import tqdm

        with contextlib.suppress(OSError, ValueError):
            self._bar = tqdm(
                total=nbytes,
                unit="B",
                unit_scale=True,
                dynamic_ncols=True,
                mininterval=0.2,
                file=sys.stderr,
            )

    def progress(self, nbytes: int, name: str) -> None:
        """Move the progress bar."""
        bar = self._bar
        if bar is not None:
            try:
                bar.set_postfix({"tensor": escaped(name[-40:])}, refresh=False)
                bar.update(nbytes)
            except (OSError, ValueError):  # the terminal is gone; the work is not
                self._bar = None

    def result(self, report: dict[str, Any], text: Callable[[dict[str, Any]], str]) -> None:
        """Print the report, as JSON or as `text` puts it."""
        if not self._as_json:
            report = texts.printable_report(report)
        if not self._as_json and not self._quiet:
            for warning in report["warnings"]:
                say(f"warning: {warning}")
        if self._quiet and not self._as_json:
            return
        written = report["output"] and not report.get("dry_run")
        done = f"; {report['output']} is complete" if written else ""
        # In pieces: a report on all tensors of a large model has megabytes.
        show(json.JSONEncoder().iterencode(report) if self._as_json else [text(report)], done)


def _log_to_stderr(*, verbose: bool) -> None:
    logging.basicConfig(
        stream=sys.stderr,
        level=logging.DEBUG if verbose else logging.WARNING,
        format="%(levelname)s %(name)s: %(message)s",
    )
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
