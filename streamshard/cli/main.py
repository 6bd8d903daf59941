"""From the command line to an exit code: signals, errors, and how they are said."""

from __future__ import annotations

import contextlib
import gc
import os
import signal
import sys
import threading
import traceback
from pathlib import Path
from types import FrameType

import click

import streamshard.cli.reading_commands  # noqa: F401 - adds its commands
from streamshard.cli import console
from streamshard.cli.app import cli
from streamshard.cli.endings import Terminated, ending
from streamshard.errors import WriteError
from streamshard.limits import told

__all__ = ["main"]


_signalled: list[int] = []
"""The signal that ends this process, once there is one."""


_COMPLETION = "_STREAMSHARD_COMPLETE"  # set where a shell asks click to complete a line


def _handle_signals() -> None:
    _signalled.clear()
    handlers = {"SIGINT": _on_interrupt, "SIGTERM": _on_terminate, "SIGHUP": _on_terminate}
    for signal_name, handler in handlers.items():
        number = getattr(signal, signal_name, None)  # Windows has no SIGHUP
        # Under nohup a hang-up is ignored, and stays so.
        if number is not None and signal.getsignal(number) is not signal.SIG_IGN:
            signal.signal(number, handler)


def _on_interrupt(number: int, _frame: FrameType | None) -> None:
    _ignore_signals()
    _signalled.append(number)
    raise KeyboardInterrupt


def _on_terminate(number: int, _frame: FrameType | None) -> None:
    _ignore_signals()
    _signalled.append(number)
    raise Terminated


def _ignore_signals() -> None:
    # A second Ctrl-C must not interrupt the removal of what is half written.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)


def main(command: click.Command = cli) -> None:
    """Run the command line and exit with the code of what happened."""
    console.open_streams()
    console.forget_document()
    # A plan has some 100,000 objects and no circles: looking for these took a fifth of its time.
    gc.set_threshold(50_000, 20, 50)
    if threading.current_thread() is threading.main_thread():
        _handle_signals()
    code = _run(command)
    # Who was interrupted is not kept waiting by what a library still has to do.
    console.end(code, at_once=bool(_signalled))


def _run(command: click.Command) -> int:
    """Run a command; the exit code of what happened, which is told."""
    try:
        told(_invoke)(command)
    except click.exceptions.Exit as error:  # --help, --version
        return error.exit_code
    except BaseException as error:  # noqa: BLE001 - each has its code
        return _tell(error, as_json=command is cli and _is_asked("--json"))
    return 0


def _invoke(command: click.Command) -> None:
    name = "streamshard" if command is cli else Path(sys.argv[0]).name
    if command is cli and _COMPLETION in os.environ:
        try:
            command.main(prog_name=name)
        except SystemExit as done:  # with what the shell asked for, or 1
            raise click.exceptions.Exit(int(done.code or 0)) from done
    # Not by `main`, which has ends of its own for errors of streams and for interrupts.
    with command.make_context(name, sys.argv[1:]) as context:
        command.invoke(context)


def _is_asked(*names: str) -> bool:
    """Whether there is such an option, also where the options could not be understood."""
    arguments = sys.argv[1:]
    options = arguments[: arguments.index("--")] if "--" in arguments else arguments
    return any(name in options for name in names)


def _tell(error: BaseException, *, as_json: bool) -> int:
    """Tell why a command ended; returns the exit code."""
    end = ending(error, _signalled[0] if _signalled else None)
    if end.is_error and _is_asked("-v", "--verbose"):
        console.say("".join(traceback.format_exception(error)).rstrip(), fits=False)
    console.say(end.text)
    if as_json:
        with contextlib.suppress(WriteError, ValueError):  # the code says it, too
            console.show_json(console.error_document(end.kind, end.code, end.message))
    return end.code
